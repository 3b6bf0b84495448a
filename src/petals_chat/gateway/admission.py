"""How many things may be going on at once: WebSocket connections, and sessions of all models and APIs.

What is over a limit is refused at once, never queued: who waits here would hold memory without an owner.
(Waiting for the swarm's memory is the engine's affair.)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager

from petals_chat.engine.interface import Chunk, Engine, EngineSession, EngineTokenizer, ModelStatus
from petals_chat.errors import TooManyRequestsError
from petals_chat.protocol.messages import GenerationRequest
from petals_chat.settings import LimitSettings


class Slots:
    """A fixed number of places for ``things``; ``things`` is what the error calls them."""

    def __init__(self, limit: int, things: str) -> None:
        self._limit = limit
        self._things = things
        self.taken = 0

    def take(self) -> None:
        """Take a place; whoever takes one gives it back with `free`.

        Raises:
            TooManyRequestsError: all are taken.
        """
        if self.taken >= self._limit:
            raise TooManyRequestsError(
                f"this server already has {self._limit} {self._things}, and allows no more. Try again later"
            )
        self.taken += 1

    def free(self) -> None:
        """Give a place back."""
        assert self.taken > 0
        self.taken -= 1

    @contextmanager
    def one(self) -> Iterator[None]:
        """Take a place for the time of a ``with`` block; raises like `take`."""
        self.take()
        try:
            yield
        finally:
            self.free()


class LimitedEngine:
    """An `Engine` that opens no more than ``limits.max_sessions`` sessions at once."""

    def __init__(self, engine: Engine, limits: LimitSettings) -> None:
        self._engine = engine
        self._sessions = Slots(limits.max_sessions, "open inference sessions")

    @property
    def statuses(self) -> Mapping[str, ModelStatus]:
        """See `Engine.statuses`."""
        return self._engine.statuses

    async def open_session(
        self, model_key: str, max_length: int, *, owner: str = "", is_stateless: bool = False
    ) -> EngineSession:
        """See `Engine.open_session`.

        Raises:
            TooManyRequestsError: too many are open; and what the engine raises.
        """
        self._sessions.take()
        try:
            session = await self._engine.open_session(
                model_key, max_length, owner=owner, is_stateless=is_stateless
            )
        except BaseException:
            self._sessions.free()
            raise
        return _LimitedSession(session, self._sessions)

    def tokenizer(self, model_key: str) -> EngineTokenizer:
        """See `Engine.tokenizer`."""
        return self._engine.tokenizer(model_key)


class _LimitedSession:
    """An engine's session that gives its place back when it is closed."""

    def __init__(self, session: EngineSession, slots: Slots) -> None:
        self._session = session
        self._slots: Slots | None = slots

    @property
    def session_id(self) -> str:
        return self._session.session_id

    @property
    def max_length(self) -> int:
        return self._session.max_length

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        return self._session.generate(request)

    async def close(self) -> None:
        slots, self._slots = self._slots, None
        try:
            await self._session.close()
        finally:
            if slots is not None:
                slots.free()
