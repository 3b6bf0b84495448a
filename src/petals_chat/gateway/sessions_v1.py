"""The inference sessions of API v1, which live between HTTP requests, until they are closed or idle too long.

Knows no HTTP. What a session can do is the engine's affair; here is who may use one when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NoReturn

from petals_chat.engine.interface import Engine, EngineSession
from petals_chat.errors import (
    InvalidParameterError,
    SessionExpiredError,
    TooManyRequestsError,
    WorkerLostError,
)
from petals_chat.gateway.models import require_permission
from petals_chat.settings import LimitSettings, ModelSettings

logger = logging.getLogger(__name__)

_MAX_SHOWN_CHARS = 64


class _OpenSession:
    def __init__(
        self, engine_session: EngineSession, model: ModelSettings, model_was_given: bool, now: float
    ) -> None:
        self.engine_session = engine_session
        self.model = model
        self.model_was_given = model_was_given
        self.turn = asyncio.Lock()
        self.requests = 0
        """Those that run or wait for their turn."""
        self.last_used = now

    def check_model(self, model: ModelSettings | None) -> None:
        expected = f"the session was opened with model {self.model.key!r}"
        if model is None and self.model_was_given:
            raise InvalidParameterError("model", f"it is missing; {expected}, so it must be given here too")
        if model is not None and model.key != self.model.key:
            raise InvalidParameterError("model", f"{expected}, and cannot be used with {model.key!r}")


class SessionRegistry:
    """All open v1 sessions, by id. `expire_idle_sessions` must be running."""

    def __init__(self, engine: Engine, limits: LimitSettings) -> None:
        self._engine = engine
        self._limits = limits
        self._sessions: dict[str, _OpenSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    async def open(self, model: ModelSettings, max_length: int, *, owner: str, model_was_given: bool) -> str:
        """Open a session and return its id, a random UUID.

        Args:
            max_length: tokens of context.
            owner: whose it is; owners take turns where there is a queue.
            model_was_given: the client named the model, and so has to name it in each request.

        Raises:
            PetalsChatError: what the engine raises.
        """
        session = await self._engine.open_session(model.key, max_length, owner=owner)
        self._sessions[session.session_id] = _OpenSession(session, model, model_was_given, _now())
        return session.session_id

    @asynccontextmanager
    async def use(
        self, session_id: str, model: ModelSettings | None, *, same_origin: bool
    ) -> AsyncIterator[EngineSession]:
        """The engine's session, for one request, which waits here for its turn.

        Args:
            model: the one that the request names; None if it names none.
            same_origin: the request comes from this server's own page.

        Raises:
            SessionExpiredError: there is no such session any more, also if it ends in the meantime.
            InvalidParameterError: the session is of another model.
            ModelNotPublicError: only this server's own page may use its model.
            TooManyRequestsError: too many requests wait for the session already.
        """
        session = self._find(session_id)
        session.check_model(model)
        require_permission(session.model, same_origin=same_origin)
        if session.requests > self._limits.max_pending_requests:
            raise TooManyRequestsError(
                f"{self._limits.max_pending_requests} requests already wait for session {session_id}; "
                "wait for their replies first"
            )
        session.requests += 1
        try:
            async with session.turn:
                self._find(session_id)
                yield session.engine_session
        except WorkerLostError:
            # Its context is gone. Whoever comes next is told that the session expired, and can open another.
            await self._end([session_id])
            raise
        finally:
            session.requests -= 1
            session.last_used = _now()

    async def close(self, session_id: str) -> None:
        """Close a session, ending what runs in it.

        Raises:
            SessionExpiredError: there is no such session any more.
        """
        self._find(session_id)
        await self._end([session_id])

    async def close_all(self) -> None:
        """Close every session."""
        await self._end(list(self._sessions))

    async def expire_idle_sessions(self) -> NoReturn:
        """Close each session that has not been used for ``limits.session_idle_timeout_seconds``."""
        timeout = self._limits.session_idle_timeout_seconds
        while True:
            now = _now()
            deadlines = {
                session_id: now + timeout if session.requests else session.last_used + timeout
                for session_id, session in self._sessions.items()
            }
            await self._end([session_id for session_id, deadline in deadlines.items() if deadline <= now])
            # A session that is opened or used after this lasts longer than the sleep.
            next_deadline = min((at for at in deadlines.values() if at > now), default=now + timeout)
            await asyncio.sleep(next_deadline - _now())

    def _find(self, session_id: str) -> _OpenSession:
        try:
            return self._sessions[session_id]
        except KeyError:
            raise SessionExpiredError(session_id[:_MAX_SHOWN_CHARS]) from None

    async def _end(self, session_ids: Iterable[str]) -> None:
        sessions = [self._sessions.pop(session_id, None) for session_id in session_ids]
        for session in filter(None, sessions):
            try:
                await session.engine_session.close()
            except Exception:
                logger.exception("a session could not be closed in order")


def _now() -> float:
    return asyncio.get_running_loop().time()
