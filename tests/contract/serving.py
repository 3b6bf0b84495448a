"""`petals-chat serve` as people start it: a process of its own, watched until nothing is left of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

START_TIMEOUT_SECONDS = 180.0
STOP_TIMEOUT_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that can be asked."""

    address: str
    """Host and port."""
    process: psutil.Process

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def v2_url(self) -> str:
        return f"ws://{self.address}/api/v2/generate"

    def worker(self, checkpoint: Path) -> psutil.Process:
        """The worker process that has mapped the checkpoint's weights into its memory."""
        (worker,) = [
            process
            for process in self.process.children()
            if "petals_chat.engine.worker" in process.cmdline()
            and any(map_.path.startswith(f"{checkpoint}/") for map_ in process.memory_maps())
        ]
        return worker


@contextlib.contextmanager
def running_server(config: Path | None, *arguments: str) -> Iterator[Server]:
    """A server whose models are ready, or known not to be.

    At the end it is stopped by SIGINT, as Ctrl-C does, and must have printed no Python traceback and leave no
    process behind.

    Args:
        config: the configuration file; None = none.
        arguments: more arguments of the command line.
    """
    command = [
        sys.executable,
        "-m",
        "petals_chat",
        "serve",
        "--config",
        str(config or os.devnull),
        *arguments,
    ]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        process = psutil.Process(popen.pid)
        family = [process]
        try:
            yield Server(_wait_for_address(popen, output), process)
            with contextlib.suppress(psutil.NoSuchProcess):  # a test may have ended it
                family += process.children(recursive=True)
            popen.send_signal(signal.SIGINT)
            popen.wait(STOP_TIMEOUT_SECONDS)
            assert (left := _survivors(family)) == [], left
            assert "Traceback" not in (printed := _read(output)), printed
        finally:
            for member in [*family, *_members(family)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            popen.wait()


def _wait_for_address(popen: subprocess.Popen[bytes], output: IO[str]) -> str:
    """Host and port in the line that invites people to open the page."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if announced := re.search(r"Open http://localhost:(\d+)", _read(output)):
            return f"127.0.0.1:{announced[1]}"
        assert popen.poll() is None, _read(output)
        time.sleep(0.05)
    raise AssertionError(f"the server did not start: {_read(output)}")


def _read(output: IO[str]) -> str:
    # By its descriptor, since the server shares the file's position.
    return os.pread(output.fileno(), 1 << 20, 0).decode()


def _survivors(family: list[psutil.Process]) -> list[str]:
    """Those that do not end: of the processes, and of others in sessions that they began."""
    _, alive = psutil.wait_procs({*family, *_members(family)}, timeout=STOP_TIMEOUT_SECONDS)
    return [str(process) for process in alive]


def _members(family: list[psutil.Process]) -> list[psutil.Process]:
    """Processes in sessions that one of the family began; its own forks stay in them when it is gone."""
    leaders = {process.pid for process in family}
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) in leaders:
                members.append(process)
    return members
