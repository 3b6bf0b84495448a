"""How the database is opened, brought to its present form, and what is said if it cannot be used."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from petals_chat.errors import ConfigurationError, HistoryUnavailableError
from petals_chat.history import database as database_module
from petals_chat.history.database import Database
from petals_chat.history.history import check_database
from petals_chat.history.tables import REVISION, metadata
from petals_chat.settings import HistorySettings


def database(url: str | None, directory: Path) -> Database:
    return Database(HistorySettings(url=url), directory)


async def test_the_migrations_make_the_tables(url: str, tmp_path: Path) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    opened = database(url, tmp_path)
    for _ in range(2):
        await opened.open()
        async with opened.writing() as connection:
            assert await connection.run_sync(differences) == []
        await opened.close()


def test_the_newest_migration_is_the_one_that_is_asked_for() -> None:
    config = Config()
    config.set_main_option("script_location", str(database_module._MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [REVISION]


async def test_a_database_of_a_newer_version_is_left_alone(url: str, tmp_path: Path) -> None:
    opened = database(url, tmp_path)
    await opened.open()
    async with opened.writing() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await opened.close()
    with pytest.raises(ConfigurationError, match="a newer version of Petals Chat has used this database"):
        await opened.open()


async def test_the_file_is_made_with_its_directory_for_this_user_alone(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "data"
    opened = database(None, directory)
    await opened.open()
    await opened.close()
    assert stat.S_IMODE((directory / "history.sqlite3").stat().st_mode) == 0o600


async def test_a_file_that_others_could_read_is_theirs_no_more(tmp_path: Path) -> None:
    file = tmp_path / "history.sqlite3"
    file.touch(mode=0o644)
    opened = database(None, tmp_path)
    await opened.open()
    await opened.close()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_a_path_may_have_any_characters(tmp_path: Path) -> None:
    opened = database(None, tmp_path / "100% of öur data?#")
    await opened.open()
    await opened.close()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("chats.sqlite3", "it must be a URL"),
        ("nosuch://host/name", "cannot be used: Can't load plugin"),
        ("mysql+nosuch://host/name", "cannot be used"),
        ("sqlite:////proc/no/such.sqlite3", "cannot be used: No such file or directory"),
        ("postgresql://user:secret@127.0.0.1:1/name", "cannot be used: .*Connect"),
    ],
)
async def test_what_cannot_be_used_is_said_without_the_password(
    url: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=f"history.url: .*{reason}") as refusal:
        await database(url, tmp_path).open()
    assert "secret" not in refusal.value.message
    assert "\n" not in refusal.value.message


async def test_a_server_does_not_start_on_a_database_that_cannot_be_used(tmp_path: Path) -> None:
    await check_database(HistorySettings(), tmp_path)
    with pytest.raises(ConfigurationError):
        await check_database(HistorySettings(url="sqlite:////proc/no/such"), tmp_path)


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "history.sqlite3").write_text("This is a text, and no database at all. " * 50)
    with pytest.raises(ConfigurationError, match="file is not a database"):
        await database(None, tmp_path).open()


async def test_a_database_that_fails_is_reported_without_what_was_written(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = database(url, tmp_path)
    await opened.open()
    with pytest.raises(HistoryUnavailableError):
        async with opened.writing() as connection:
            await connection.execute(text("INSERT INTO nowhere VALUES (:text)"), {"text": "secret"})
    await opened.close()
    assert "the history's database failed" in caplog.text
    assert "secret" not in caplog.text


async def test_what_sqlite_deletes_is_not_in_its_file(tmp_path: Path) -> None:
    opened = database(None, tmp_path)
    await opened.open()
    async with opened.reading() as connection:
        assert (await connection.execute(text("PRAGMA secure_delete"))).scalar() == 1
        assert (await connection.execute(text("PRAGMA foreign_keys"))).scalar() == 1
    await opened.close()
    with sqlite3.connect(tmp_path / "history.sqlite3") as connection_:
        assert connection_.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection_.close()
