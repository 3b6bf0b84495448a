"""A few places that are taken for a short time, round robin over clients when more want one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from petals_chat.engine.interface import client_of


class Turns:
    """So many ``places``. A client who wants many of them delays another one by no more than one turn."""

    def __init__(self, places: int) -> None:
        self.free = places
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By client; the first one's turn is next."""

    async def take(self, owner: str) -> None:
        """Take a place, as soon as it is the turn of the owner's client; `give_back` has to follow."""
        if self.free:
            self.free -= 1
            return
        client = client_of(owner)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at the same time
                self.give_back()
            elif (queue := self._waiting.get(client)) and turn in queue:
                queue.remove(turn)
                if not queue:
                    del self._waiting[client]
            raise

    def give_back(self) -> None:
        """Let the next one have the place."""
        while self._waiting:
            client = next(iter(self._waiting))
            queue = self._waiting.pop(client)
            turn = queue.popleft()
            if queue:
                self._waiting[client] = queue  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self.free += 1

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Hold a place."""
        await self.take(owner)
        try:
            yield
        finally:
            self.give_back()
