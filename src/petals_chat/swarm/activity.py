"""What a host is doing, counted by its connection handlers and read by the process that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any


class Activity:
    """Counts in shared memory; handlers inherit it when they are forked."""

    def __init__(self) -> None:
        self._sessions = multiprocessing.Value(ctypes.c_int64, 0)
        self._tokens = multiprocessing.Value(ctypes.c_int64, 0)

    @property
    def sessions(self) -> int:
        """Inference sessions that are open now."""
        return int(self._sessions.value)

    @property
    def tokens(self) -> int:
        """Tokens that went through the host's blocks in sessions, prompts included, since it started."""
        return int(self._tokens.value)

    def forget_sessions(self) -> None:
        """To be called when new handlers take the place of those who had the sessions."""
        with self._sessions.get_lock():
            self._sessions.value = 0

    async def count(self, responses: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Pass on the responses of one session: each has one step's hidden states [batch, tokens, hidden size]."""
        with self._session():
            async for response in responses:
                batch, tokens = response.tensors[0].size[:2]
                with self._tokens.get_lock():
                    self._tokens.value += batch * tokens
                yield response

    @contextmanager
    def _session(self) -> Iterator[None]:
        self._add_sessions(1)
        try:
            yield
        finally:
            self._add_sessions(-1)

    def _add_sessions(self, count: int) -> None:
        with self._sessions.get_lock():
            self._sessions.value += count
