"""Real hosts for tests: ``python -m petals_chat host``, watched until nothing is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from petals_chat.swarm.host_options import HostReady

START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 5.0


class HostProcess:
    """A host that was started, and may not be ready yet.

    Args:
        model: directory of the checkpoint, or its name on the hub; None = the one of the swarm that is joined.
        initial_peers: none = it begins a swarm, unless it has a token.
        join: token of the swarm to join.
        environment: variables that the host has beside those of this process.
        arguments: more arguments of the command line.
    """

    def __init__(
        self,
        model: Path | str | None,
        *arguments: str,
        initial_peers: Sequence[str] = (),
        join: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        words = [] if model is None else [str(model)]
        if join:
            words += ["--join", join]
        elif initial_peers:
            words += ["--initial-peers", *initial_peers]
        self._ready_fd, ready_fd = os.pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._seen: list[psutil.Process] = []
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "petals_chat", "host", *words),
                *("--address=127.0.0.1", "--dtype=float32", "--threads=1"),
                *(f"--ready-fd={ready_fd}", "--exit-with-stdin", *arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            pass_fds=[ready_fd],
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        os.close(ready_fd)

    def read_ready_line(self) -> dict[str, Any] | None:
        """The line in which the host says that it serves, or why not; None if it ended without a word."""
        line = b""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([self._ready_fd], [], [], max(0, deadline - time.monotonic()))
            assert readable, f"no ready line: {self.stderr()}"
            if not (data := os.read(self._ready_fd, 65536)):
                return None
            line += data
        message: dict[str, Any] = json.loads(line)
        return message

    def wait_until_ready(self) -> HostReady:
        """Wait until the host serves."""
        message = self.read_ready_line()
        assert message is not None, self.stderr()
        assert "error" not in message, message
        return HostReady(**{**message, "peers": tuple(message["peers"])})

    def family(self) -> list[psutil.Process]:
        """The host's process and all that it has started, now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            host = psutil.Process(self.process.pid)
            self._seen += [host, *host.children(recursive=True)]
        return [process for process in set(self._seen) if process.is_running()]

    def cpu_seconds(self) -> float:
        """Processor time that the host and its processes have used."""
        times = [process.cpu_times() for process in self.family()]
        return float(sum(time.user + time.system for time in times))

    def survivors(self, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> list[str]:
        """Command lines of those that were seen by `family`, and others of their session, that do not end."""
        others = (process for process in psutil.process_iter() if _session(process.pid) == self.process.pid)
        _, alive = psutil.wait_procs([*set(self._seen), *others], timeout=timeout_seconds)
        return [str(process) for process in alive]

    def catches(self, number: signal.Signals) -> bool:
        """Whether the host has got so far that it handles the signal (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the host alone."""
        self.process.send_signal(number)

    def stderr(self) -> str:
        """What the host and its processes have written there so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def close_stdin(self) -> None:
        """What happens when the parent dies."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(STOP_TIMEOUT_SECONDS)

    def release(self) -> None:
        """Kill what is left, and close files."""
        for process in [*self.family(), *self._seen]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            assert stream is not None
            stream.close()
        os.close(self._ready_fd)


@contextlib.contextmanager
def running_host(model: Path, *arguments: str, initial_peers: Sequence[str] = ()) -> Iterator[HostReady]:
    """A host that serves. At the end it is stopped, and must have been quiet and leave nothing behind."""
    host = HostProcess(model, *arguments, initial_peers=initial_peers)
    try:
        yield host.wait_until_ready()
        host.family()
        host.close_stdin()
        assert host.wait() == 0, host.stderr()
        assert host.stderr() == "", host.stderr()
        assert host.survivors() == []
    finally:
        host.release()


def _session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid)
    return None
