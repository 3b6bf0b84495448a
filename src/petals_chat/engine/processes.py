"""Child processes that bring processes of their own: started in a process group, and ended with all of it.

hivemind forks daemons (the DHT process, p2pd) that outlive a parent which is killed. A child is therefore
started as the leader of a new process group; when it is gone, whatever is left of its group is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Self

STOP_TIMEOUT_SECONDS = 3.0
"""How long a child may take to end in order before it is killed."""


class ChildProcess:
    """A Python module of ours that runs as a child process.

    Its standard input is a pipe that ends when this process ends, however it ends: children watch it, or a
    socket of their own, and stop by themselves.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, module: str, *arguments: str, pass_fds: Sequence[int] = ()) -> Self:
        """Run ``python -m module arguments``, its output going where this process's goes."""
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )
        )

    @property
    def pid(self) -> int:
        """The process id, which is also that of its group."""
        return self._process.pid

    async def wait(self) -> int:
        """Wait for its end, and end what it left behind; returns its exit code."""
        code = await self._process.wait()
        self._kill_group()
        return code

    async def stop(self) -> None:
        """End it, in order if it does so in time, else at once. Waits until it is gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._kill_group()
            await self._process.wait()
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
