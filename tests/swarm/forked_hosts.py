"""Many real hosts, started quickly: each is forked from a process that has imported what hosts import.

Apart from that they are what ``petals-chat host`` starts: processes of their own, with sockets of their own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from petals_chat.swarm.host_options import HostReady

START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 30.0
CHUNK_SIZE_BYTES = 1 << 16
"""Some twenty tokens of a tiny model."""


class ForkedHosts:
    """A context in which hosts can be started; at its end they are stopped, and must have been quiet."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.swarm.forked_hosts"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._ready: list[int] = []

    def start(self, model: Path, *arguments: str, initial_peers: Sequence[str] = ()) -> int:
        """Start a host without waiting for it; returns what `wait` wants to know."""
        path = Path(self._directory.name, str(len(self._ready)))
        os.mkfifo(path)
        ready = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._ready.append(ready)
        swarm = ["--initial-peers", *initial_peers] if initial_peers else ["--new-swarm"]
        words = ["host", str(model), *swarm, "--address=127.0.0.1", "--dtype=float32", "--threads=1"]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"words": [*words, *arguments], "ready": str(path)}) + "\n")
        self._process.stdin.flush()
        return ready

    def wait(self, ready: int) -> HostReady:
        """Wait until the host serves."""
        line = b""
        while not line.endswith(b"\n"):  # processes of the host's keep the other end open
            readable, _, _ = select.select([ready], [], [], START_TIMEOUT_SECONDS)
            assert readable, f"no ready line: {self._stderr()}"
            data = os.read(ready, 65536)
            assert data, f"the host has ended: {self._stderr()}"
            line += data
        message = json.loads(line)
        assert "error" not in message, message
        return HostReady(**{**message, "peers": tuple(message["peers"])})

    def _stderr(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(STOP_TIMEOUT_SECONDS)
            stderr = self._stderr()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._errors.close()
            for ready in self._ready:
                os.close(ready)
            self._directory.cleanup()
        if kind is None:
            assert (code, stderr) == (0, ""), f"hosts ended with {code}: {stderr}"


def main() -> int:
    """Start a host for each line of standard input; at its end stop them all."""
    from petals_chat.cli import main as run_command_line
    from petals_chat.swarm import compat, host

    compat.install()
    import petals.server.server as petals_server

    from petals_chat.swarm import server

    assert host, server  # imported for the children
    # Petals computes what a client sends as one step in chunks of this many bytes of attention scores.
    petals_server.Server = functools.partial(petals_server.Server, max_chunk_size_bytes=CHUNK_SIZE_BYTES)
    gc.freeze()
    children = []
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            ready = os.open(request["ready"], os.O_WRONLY)
            os._exit(run_command_line([*request["words"], f"--ready-fd={ready}"]))
        children.append(child)
    for child in children:
        os.kill(child, signal.SIGTERM)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return int(any(codes))


if __name__ == "__main__":
    raise SystemExit(main())
