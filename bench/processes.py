"""The processes of the benchmark: host, gateway, reference, bare loop and load; started, spoken to, ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from petals_chat.swarm.host_options import HostReady

BENCH = Path(__file__).resolve().parent
START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 10.0


class BenchError(Exception):
    """A process did not do what the benchmark needs."""


@dataclasses.dataclass(frozen=True)
class Served:
    """A model and the swarm that serves it."""

    repository: str
    dtype: str
    """As in the settings: "auto" or the name of one."""
    peers: tuple[str, ...]
    dht_prefix: str


class Process:
    """A child in a session of its own, so that nothing it starts can be missed at the end.

    Its errors go to a file, whose end is shown when it fails.
    """

    def __init__(
        self, name: str, command: Sequence[str], directory: Path, *, pass_fds: Sequence[int] = ()
    ) -> None:
        self.name = name
        self._command, self._directory, self._pass_fds = command, directory, pass_fds
        self._errors = directory / f"{name}.log"
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._errors.open("wb") as errors:
            return subprocess.Popen(
                [sys.executable, *self._command],
                cwd=self._directory,
                env={**os.environ, "TMPDIR": str(self._directory)},  # what is left there goes with it
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=self._pass_fds,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it: in order, and after a while the hard way, with all that it has started."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_SECONDS)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.pid:
                    process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def restart(self) -> None:
        """End it however it is, and start it again."""
        self.stop()
        self._process = self._start()
        self.wait_until_ready()

    def ask_to_stop(self) -> None:
        """The end of its standard input says so already."""

    def wait_until_ready(self) -> Any:
        """Wait until it can be used; what it says then.

        Raises:
            BenchError: it takes too long, or has ended.
        """
        raise NotImplementedError

    def failure(self, what: str) -> BenchError:
        lines = self._errors.read_text(errors="replace").strip().splitlines()[-5:]
        return BenchError(f"{self.name} {what}" + "".join(f"\n    {line}" for line in lines))

    def read_line(self, fd: int, timeout: float) -> dict[str, Any]:
        """The next line of JSON from ``fd``."""
        deadline, line = time.monotonic() + timeout, b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise self.failure(f"did not answer within {timeout:g} s")
            if not (data := os.read(fd, 1 << 16)):
                raise self.failure("has ended")
            line += data
        message: dict[str, Any] = json.loads(line)
        return message


class Host(Process):
    """``petals-chat host``: all blocks of a model, in a new swarm."""

    program: tuple[str, ...] = ("-m", "petals_chat")

    def __init__(self, repository: str, dtype: str, cache_tokens: int, directory: Path, threads: int) -> None:
        self._ready_fd, ready_fd = os.pipe()
        super().__init__(
            "host",
            [
                *(*self.program, "host", repository, "--new-swarm", "--address=127.0.0.1"),
                *(f"--dtype={dtype}", f"--cache-tokens={cache_tokens}", f"--threads={threads}"),
                *(f"--ready-fd={ready_fd}", "--exit-with-stdin"),
            ],
            directory,
            pass_fds=[ready_fd],
        )
        os.close(ready_fd)

    def wait_until_ready(self) -> HostReady:
        try:
            message = self.read_line(self._ready_fd, START_TIMEOUT_SECONDS)
        finally:
            os.close(self._ready_fd)
        if "error" in message:
            raise BenchError(f"the host cannot start: {message['error']['message']}")
        return HostReady(**{**message, "peers": tuple(message["peers"])})


class ApiServer(Process):
    """Answers API v2."""

    url: str
    """Known when it is ready."""


class Gateway(ApiServer):
    """``petals-chat serve``, as a client of the host's swarm."""

    def __init__(self, model: Mapping[str, object], served: Served, directory: Path, threads: int) -> None:
        self._port = _free_port()
        self.url = f"ws://127.0.0.1:{self._port}/api/v2/generate"
        values = {
            "server.port": self._port,
            "server.log_level": "warning",
            "engine.data_dir": str(directory / "data"),
            "engine.dtype": served.dtype,
            "engine.threads": threads,
            "swarm.initial_peers": list(served.peers),
            "swarm.dht_prefix": served.dht_prefix,
            **model,
        }
        settings = [f"--set={name}={json.dumps(value)}" for name, value in values.items()]
        super().__init__("gateway", ["-m", "petals_chat", "serve", *settings], directory)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self.failure("has ended")
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/readyz", timeout=5),
            ):
                return
            time.sleep(0.05)
        raise self.failure("did not become ready")

    def ask_to_stop(self) -> None:
        self._process.send_signal(signal.SIGINT)


class Script(Process):
    """A script of the benchmark, which answers commands."""

    def __init__(self, name: str, directory: Path, **options: object) -> None:
        super().__init__(name, [str(BENCH / f"{name}.py"), json.dumps(options)], directory)

    def wait_until_ready(self) -> dict[str, Any]:
        return self.read_line(self._answers, START_TIMEOUT_SECONDS)

    @property
    def _answers(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def ask(self, command: str, limit: float, /, **arguments: object) -> Any:
        """Have a command executed within ``limit`` seconds."""
        assert self._process.stdin is not None
        line = json.dumps({"command": command, **arguments}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError:
            raise self.failure("has ended") from None
        return self.read_line(self._answers, limit)


class Reference(Script, ApiServer):
    """See reference.py."""

    def wait_until_ready(self) -> dict[str, Any]:
        ready = super().wait_until_ready()
        self.url = f"ws://127.0.0.1:{ready['port']}/api/v2/generate"
        return ready


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
