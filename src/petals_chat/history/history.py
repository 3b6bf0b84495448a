"""The history as one thing: opened with the gateway, closed with it, and tidied in between."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Self

from petals_chat.history.database import Database
from petals_chat.history.recorder import Recorder
from petals_chat.history.store import ChatStore
from petals_chat.settings import HistorySettings


async def check_database(settings: HistorySettings, data_dir: Path) -> None:
    """Open the database once, so that what is wrong with it is said before anything else begins.

    Raises:
        ConfigurationError: it cannot be used.
    """
    database = Database(settings, data_dir)
    await database.open()
    await database.close()


class History:
    """What keeps the chats, and what writes answers into them, while the ``async with`` block runs.

    Args:
        data_dir: where the SQLite file is, if the settings name no other database.

    Raises:
        ConfigurationError: the database's URL cannot be used; when entered, also if the database itself cannot.
    """

    def __init__(self, settings: HistorySettings, data_dir: Path) -> None:
        self._database = Database(settings, data_dir)
        self.store = ChatStore(self._database, settings)
        self.recorder = Recorder(self.store)
        self._expiring: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._database.open()
        await self.store.begin()
        self._expiring = asyncio.create_task(self.store.expire())
        return self

    async def __aexit__(self, *reason: object) -> None:
        assert self._expiring is not None
        self._expiring.cancel()
        try:
            with suppress(asyncio.CancelledError):
                await self._expiring
        finally:
            await self._database.close()
