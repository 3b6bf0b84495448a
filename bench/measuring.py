"""What processes use, read from /proc (Linux), and percentiles.

A contender is a process with all its descendants: Petals and hivemind fork helpers (the DHT process, p2pd) that
belong to its cost.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """The process and all its descendants, now; empty if it has ended."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


class CpuClock:
    """Processor time of some processes and those that they have started by now.

    The list of processes is made once, so that reading the clock takes well under a millisecond.
    """

    def __init__(self, roots: Iterable[int]) -> None:
        self._pids = [pid for root in roots for pid in family(root)]

    def seconds(self) -> float:
        """User and system time so far; the kernel counts in ticks of 10 ms for each process."""
        return sum(_cpu_ticks(pid) for pid in self._pids) / _TICKS_PER_SECOND


def cpu_seconds(pid: int) -> float:
    """User and system time of the process and its descendants."""
    return CpuClock([pid]).seconds()


def pss_megabytes(pid: int) -> float:
    """Memory of the process and its descendants; pages that n processes share count 1/n for each (PSS)."""
    kilobytes = 0
    for member in family(pid):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kilobytes += int(line.split()[1])
    return kilobytes * 1024 / 1e6


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest of ``values`` that is not below ``percent`` of them; None if there are none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])  # utime and stime: fields 14 and 15 of proc(5), counted from 3
