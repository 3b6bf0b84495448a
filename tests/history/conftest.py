"""A PostgreSQL server of these tests' own, and stores in SQLite and in PostgreSQL."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from petals_chat.history.history import History
from petals_chat.settings import HistorySettings

POSTGRES_USER = "postgres"
_names = itertools.count()


def program(name: str) -> str:
    """Where PostgreSQL's program is; Debian puts only some of them where they are found by name."""
    found = shutil.which(name) or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)), None
    )
    if found is None:
        message = f"PostgreSQL's {name} is not installed (Debian's package postgresql)"
        if "CI" in os.environ:
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Path]:
    """The directory with the socket of a server that nobody else knows."""
    as_root = os.geteuid() == 0  # as whom the server would not run
    options: dict[str, Any] = {"user": POSTGRES_USER, "group": POSTGRES_USER} if as_root else {}
    initdb, postgres, createdb = program("initdb"), program("postgres"), program("createdb")
    with tempfile.TemporaryDirectory(prefix="petals-chat-pg-", dir="/tmp") as directory:
        if as_root:
            shutil.chown(directory, POSTGRES_USER, POSTGRES_USER)
        data = f"{directory}/data"
        subprocess.run(
            [initdb, "-D", data, "-U", POSTGRES_USER, "--auth=trust", "--encoding=UTF8", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=directory,
            **options,
        )
        command = [postgres, "-D", data, "-k", directory, "-c", "listen_addresses=", "-c", "fsync=off"]
        with Path(directory, "log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory, **options)
        try:
            ask = [createdb, "-h", directory, "-U", POSTGRES_USER, "petals_ready"]
            for _ in range(600):
                if subprocess.run(ask, check=False, capture_output=True, cwd=directory).returncode == 0:
                    break
                assert server.poll() is None, Path(directory, "log").read_text()
            yield Path(directory)
        finally:
            server.terminate()
            server.wait()


@pytest.fixture
def postgresql_url(postgresql: Path) -> str:
    """An empty database."""
    name = f"petals{next(_names)}"
    createdb = [program("createdb"), "-h", str(postgresql), "-U", POSTGRES_USER, name]
    subprocess.run(createdb, check=True, cwd=postgresql)
    return f"postgresql://{POSTGRES_USER}@/{name}?host={postgresql}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/chats.sqlite3"
    found: str = request.getfixturevalue("postgresql_url")
    return found


@pytest.fixture
async def history(url: str, tmp_path: Path) -> AsyncIterator[History]:
    """An open history."""
    async with History(HistorySettings(url=url), tmp_path) as history:
        yield history
