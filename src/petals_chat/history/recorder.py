"""Writes answers down while they are made, so that they survive their connection, and even the process."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from petals_chat.errors import PetalsChatError
from petals_chat.history.interface import AnswerState, Message, Record, Recording, RunningAnswer
from petals_chat.history.store import ChatStore

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 1.0
"""How much of an answer is lost at most if the process is killed."""
LAST_ATTEMPTS = 5
"""How often to try to write the end of an answer, a period apart, if the database does not answer."""


class Recorder:
    """Gives what writes one answer down."""

    def __init__(self, store: ChatStore) -> None:
        self._store = store

    def record(self, visitor: str, where: Record) -> Recording:
        """What writes one answer of this visitor down."""
        return _Recording(self._store, visitor, where)


class _Recording:
    def __init__(self, store: ChatStore, visitor: str, where: Record) -> None:
        self._store = store
        self._visitor = visitor
        self._where = where
        self._chat_pk = 0
        self._before: Message | None = None

    async def begin(self, answer: RunningAnswer) -> None:
        message = Message(
            id=self._where.message,
            parent=self._where.parent,
            role="assistant",
            content="",
            model=answer.model_key,
            created_at=time.time(),
            state=AnswerState.ANSWERING,
            generation=answer.id,
        )
        self._chat_pk, self._before = await self._store.begin_answer(
            self._visitor, self._where.chat, message, continues=answer.continues
        )

    def values(self, answer: RunningAnswer) -> dict[str, Any]:
        before = self._before
        assert before is not None
        first = (
            answer.first_token_seconds if before.first_token_seconds is None else before.first_token_seconds
        )
        return {
            "content": before.content + answer.text.replace("\0", "\N{REPLACEMENT CHARACTER}"),
            "tokens": (before.tokens or 0) + answer.tokens,
            "seconds": (before.seconds or 0.0) + answer.seconds,
            "first_token_seconds": first,
        }

    async def write(self, answer: RunningAnswer) -> None:
        written = 0
        while answer.state is AnswerState.ANSWERING:
            try:
                async with asyncio.timeout(PERIOD_SECONDS):
                    await answer.wait_until_ended()
            except TimeoutError:
                if len(answer.text) > written and await self._try(self.values(answer)):
                    written = len(answer.text)
        for _ in range(LAST_ATTEMPTS):
            if await self._try(self.values(answer) | self._end(answer)):
                return
            await asyncio.sleep(PERIOD_SECONDS)
        logger.error("the end of an answer could not be written into the history")

    async def _try(self, values: dict[str, Any]) -> bool:
        try:
            await self._store.write_answer(self._chat_pk, self._where.message, **values)
        except PetalsChatError:
            return False  # the database's trouble is logged there
        return True

    def _end(self, answer: RunningAnswer) -> dict[str, Any]:
        failed = answer.state is AnswerState.FAILED
        return {
            "state": answer.state,
            "generation": None,
            "finish_reason": answer.finish_reason,
            "error": answer.error_code if failed else None,
        }
