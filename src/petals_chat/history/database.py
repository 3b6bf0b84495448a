"""The connection to the database: its URL, its migrations, and its transactions. It knows no chats.

Database work happens in threads (SQLite) or over a socket (PostgreSQL), never in the event loop's way. What people
wrote is kept out of the log: parameters of statements are hidden, and of errors only the kind is told.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from petals_chat.errors import ConfigurationError, HistoryFullError, HistoryUnavailableError
from petals_chat.history import tables
from petals_chat.settings import HistorySettings

logger = logging.getLogger(__name__)
logging.getLogger("aiosqlite").setLevel(logging.INFO)  # for debugging it tells what is written

FILE_NAME = "history.sqlite3"
LOCK_TIMEOUT_SECONDS = 15.0
"""How long a writer waits for others. Each transaction takes milliseconds."""
STATEMENT_TIMEOUT_SECONDS = 30.0

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
}
_MIGRATIONS = Path(__file__).with_name("migrations")


class Database:
    """One database, which must be opened before use.

    Args:
        data_dir: where the SQLite file is, if the settings name no other database.

    Raises:
        ConfigurationError: the URL cannot be understood, or its driver is not installed.
    """

    def __init__(self, settings: HistorySettings, data_dir: Path) -> None:
        self._url = _url(settings, data_dir)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        try:
            self._engine = create_async_engine(
                self._url,
                hide_parameters=True,
                pool_pre_ping=not self._is_sqlite,
                connect_args=self._connect_args(),
            )
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise self._unusable(error) from None
        # Who is going to write says so at once: SQLite cannot turn a reading transaction into a writing one if
        # another has written in between.
        self._writing_engine = self._engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        if self._is_sqlite:
            _prepare_sqlite(self._engine.sync_engine, settings.max_file_bytes)

    async def open(self) -> None:
        """Connect, and bring the tables to their present form.

        Raises:
            ConfigurationError: the database cannot be used.
        """
        if self._is_sqlite and self._url.database:
            _make_private(Path(self._url.database))
        try:
            async with self._writing_engine.begin() as connection:
                await connection.run_sync(_migrate)
        except (SQLAlchemyError, OSError, sqlite3.Error) as error:
            await self.close()
            raise self._unusable(error) from None
        except ConfigurationError:
            await self.close()
            raise

    async def close(self) -> None:
        """Disconnect."""
        await self._engine.dispose()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that changes nothing.

        Raises:
            HistoryUnavailableError: the database does not answer.
        """
        try:
            async with self._engine.connect() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise _translated(error) from None

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is committed at the end of the block, unless it raises.

        Raises:
            HistoryUnavailableError: the database does not answer.
            HistoryFullError: it takes no more.
        """
        try:
            async with self._writing_engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise _translated(error) from None

    def _connect_args(self) -> dict[str, Any]:
        if self._is_sqlite:
            return {"timeout": LOCK_TIMEOUT_SECONDS}
        if self._url.get_driver_name() == "asyncpg":
            return {"timeout": LOCK_TIMEOUT_SECONDS, "command_timeout": STATEMENT_TIMEOUT_SECONDS}
        return {}

    def _unusable(self, error: Exception) -> ConfigurationError:
        shown = self._url.render_as_string(hide_password=True)
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        if isinstance(error, ImportError):
            reason = f"{reason}. For PostgreSQL, install petals-chat[postgresql]"
        return ConfigurationError(f"history.url: the database {shown} cannot be used: {reason}")


def _url(settings: HistorySettings, data_dir: Path) -> URL:
    if settings.url is None:
        return URL.create(_DRIVERS["sqlite"], database=str(data_dir / FILE_NAME))
    try:
        url = make_url(settings.url)
    except ArgumentError:
        raise ConfigurationError(
            'history.url: it must be a URL like "sqlite:////var/lib/chats.sqlite3" or "postgresql://user@host/name"'
        ) from None
    return url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))


def _make_private(file: Path) -> None:
    """Make the file so that only this user can read it; what SQLite puts beside it gets the same mode."""
    if str(file) == ":memory:" or str(file).startswith("file:"):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        file.chmod(0o600)
    except OSError as error:
        raise ConfigurationError(
            f"history.url: the database {file} cannot be used: {os.strerror(error.errno or 0)}"
        ) from None


def _prepare_sqlite(engine: Any, max_file_bytes: int) -> None:
    @event.listens_for(engine, "connect")
    def set_up(connection: Any, record: object) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        connection.create_function("lower", 1, _lower, deterministic=True)
        cursor = connection.cursor()
        # Readers and the writer do not wait for each other. A crash of the machine may cost the last transactions, one
        # of the process costs nothing.
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA secure_delete = ON")  # what was deleted is not in the file any more
        cursor.execute("PRAGMA page_size")
        cursor.execute(f"PRAGMA max_page_count = {max_file_bytes // cursor.fetchone()[0]}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


def _lower(value: object) -> object:
    """SQLite's own knows the letters of English only."""
    return value.lower() if isinstance(value, str) else value


def _migrate(connection: Connection) -> None:
    if inspect(connection).has_table("alembic_version"):
        revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        if revision == tables.REVISION:
            return
    # Here, since each start would take a tenth of a second longer.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    try:
        command.upgrade(config, "head")
    except CommandError:
        raise ConfigurationError(
            "history.url: a newer version of Petals Chat has used this database"
        ) from None


def _translated(error: Exception) -> HistoryFullError | HistoryUnavailableError:
    original = getattr(error, "orig", None) or error
    if isinstance(error, DBAPIError) and "database or disk is full" in str(original):
        logger.error("the history's database is full")
        return HistoryFullError("the server has no room for more chats")
    # Not the message, which may quote what people wrote.
    logger.error("the history's database failed: %s", type(original).__name__)
    return HistoryUnavailableError()
