"""No more threads than CPUs that affinity and control groups let this process use."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from petals_chat.head.cpus import usable_threads

CPUS = 8


@pytest.fixture(autouse=True)
def machine_with_eight_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CPUS)), raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(CPUS)
    yield
    torch.set_num_threads(threads)


def tree(root: Path, files: dict[str, str]) -> Path:
    """A file system with these files."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


def test_without_limits_there_are_as_many_as_torch_chooses(tmp_path: Path) -> None:
    assert usable_threads(tmp_path) == CPUS
    torch.set_num_threads(3)
    assert usable_threads(tmp_path) == 3


def test_there_are_no_more_than_cpus_of_the_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5}, raising=False)
    assert usable_threads(tmp_path) == 2


@pytest.mark.parametrize(
    ("limit", "threads"),
    [("200000 100000", 2), ("350000 100000", 3), ("50000 100000", 1), ("max 100000", CPUS), ("100 0", CPUS)],
)
def test_a_container_has_its_quota(tmp_path: Path, limit: str, threads: int) -> None:
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": limit}
    assert usable_threads(tree(tmp_path, files)) == threads


def test_the_narrowest_of_nested_groups_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/chat.slice/petals.service",
        "sys/fs/cgroup/chat.slice/cpu.max": "400000 100000",
        "sys/fs/cgroup/chat.slice/petals.service/cpu.max": "600000 100000",
    }
    assert usable_threads(tree(tmp_path, files)) == 4


@pytest.mark.parametrize("path", ["/", "/docker/0123"])
@pytest.mark.parametrize(("quota", "threads"), [("150000", 3), ("-1", CPUS)])
def test_quotas_of_version_1_count_too(tmp_path: Path, path: str, quota: str, threads: int) -> None:
    files = {
        "proc/self/cgroup": f"5:memory:{path}\n4:cpu,cpuacct:{path}\n0::{path}",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": quota,
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000",
    }
    assert usable_threads(tree(tmp_path, files)) == threads
