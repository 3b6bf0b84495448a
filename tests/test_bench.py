"""The benchmark runs, reports figures of all contenders, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 300


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """Sockets are made below it, whose paths may have a hundred characters; those of pytest are long."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        yield Path(directory)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the benchmark reads /proc")
def test_the_way_of_a_token_is_measured(short_directory: Path) -> None:
    command = [sys.executable, "bench/token_path.py", "--quick", "--only", "bundled", "--users", "4"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(short_directory)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    rows = report["rows"]
    assert [row["contender"] for row in rows] == ["gateway", "gateway, stream", "reference", "bare loop"]
    assert all(row["served"] == 4 and row["errors"] == {} for row in rows)
    assert all(row["tokens"] > 0 and row["cpu_ms_per_token"] > 0 for row in rows)
    assert "CPU per token, gateway, 4 users, bundled model: times bare loop" in report["ratios"]
    assert list(short_directory.iterdir()) == []
    assert [process for process in psutil.process_iter(["cmdline"]) if _names(process, short_directory)] == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the benchmark reads /proc")
def test_hosts_with_many_sessions_are_measured(short_directory: Path) -> None:
    small = ["--hidden-size=128", "--rounds=1", "--tokens=4"]
    result = subprocess.run(
        [sys.executable, "bench/host_batching.py", *small],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(short_directory)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert [(row["users"], row["contender"]) for row in report["rows"]] == [
        *((1, "batching"), (1, "released")),
        *((8, "batching"), (8, "released")),
    ]
    assert set(report["tokens_per_second_to_released"]) == {"1 users", "8 users"}
    assert report["texts_identical"]["to released"]
    assert list(short_directory.glob("bench-*")) == []
    assert [process for process in psutil.process_iter(["cmdline"]) if _names(process, short_directory)] == []


def _names(process: psutil.Process, directory: Path) -> bool:
    return any(str(directory) in argument for argument in process.info["cmdline"] or ())
