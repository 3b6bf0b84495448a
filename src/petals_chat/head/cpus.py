"""How many threads a process may keep busy: the one rule of workers and hosts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch


def usable_threads(root: Path = Path("/")) -> int:
    """As many threads as torch chooses, but no more than CPUs that this process may use.

    Threads that compute one product wait for each other: beyond the quota of a container or a service, all of
    them stand still until the next period of its scheduler.

    Args:
        root: of the file system in which Linux tells the quotas of control groups.
    """
    quota = min(_quotas(root), default=float("inf"))
    return max(1, int(min(torch.get_num_threads(), _cpus_of_affinity(), quota)))


def _cpus_of_affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux


def _quotas(root: Path) -> Iterator[float]:
    """The CPUs that each control group around this process may use, if it has a limit."""
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            for group in _group_and_parents(mounted, path):
                yield from _quota(*_read(group / "cpu.max").split())
        elif "cpu" in controllers.split(","):
            for group in _group_and_parents(mounted / "cpu", path):
                yield from _quota(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _group_and_parents(top: Path, path: str) -> Iterator[Path]:
    """In a container the path may be the one outside, of which only the top is there."""
    relative = PurePosixPath(path.lstrip("/"))
    yield from (top / group for group in (relative, *relative.parents))


def _quota(quota: str = "", period: str = "") -> Iterator[float]:
    """Microseconds of CPU time in each period, as CPUs; nothing if there is no limit ("max", or -1)."""
    if quota.strip().isdigit() and period.strip().isdigit() and int(period):
        yield int(quota) / int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # there is no such group, or this is not Linux
        return ""
