"""The processes that this one has started, directly or not."""

from __future__ import annotations

import contextlib

import psutil


def descendants() -> list[psutil.Process]:
    """All processes that this one has started, and theirs."""
    return list(psutil.Process().children(recursive=True))


def kill(processes: list[psutil.Process]) -> None:
    """End processes at once, and wait until they are gone. One that has ended already is no error."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=1)
