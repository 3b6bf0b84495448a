"""The WebSocket endpoint of API v2: moves frames between a socket, the protocol state and the engine.

Two tasks serve a connection. One reads, all the time, so that a client that goes away is noticed in the
middle of a generation. The other performs the protocol's actions, one after the other; each send waits until
the socket takes the frame, so a client that reads slowly slows its generation down, and nothing is buffered
beyond the engine's small window. (Answers go on whoever reads them; `petals_chat.gateway.answers` keeps what they
come to.) While both wait they hold nothing of what was asked before, which may be large. What may be sent, and when,
is `petals_chat.gateway.session_v2`'s affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import aclosing, suppress
from typing import NoReturn

from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from petals_chat.engine.interface import Engine, EngineSession
from petals_chat.errors import (
    DeadlineExceededError,
    HistoryDisabledError,
    PetalsChatError,
    TooManyRequestsError,
    UnknownChatError,
)
from petals_chat.gateway.admission import Slots
from petals_chat.gateway.answers import Answers, Generation
from petals_chat.gateway.error_responses import ErrorResponses
from petals_chat.gateway.models import ModelRegistry
from petals_chat.gateway.origins import is_same_origin
from petals_chat.gateway.owners import owner_among, owner_of
from petals_chat.gateway.session_v2 import (
    Action,
    Fail,
    FollowAnswer,
    OpenSession,
    SendFrame,
    SessionV2,
    StartAnswer,
    StartGeneration,
    StopAnswer,
)
from petals_chat.gateway.visitors import visitor_of
from petals_chat.history.interface import Record, Recording
from petals_chat.protocol.messages import GenerationRequest
from petals_chat.settings import LimitSettings
from petals_chat.wait_limit import WaitLimit

RecordAnswer = Callable[[str, Record], Recording]


class WebSocketV2:
    """The endpoint; it serves any number of connections.

    Args:
        record: gives what writes a visitor's answer down; None if no history is kept.
    """

    def __init__(
        self,
        models: ModelRegistry,
        engine: Engine,
        answers: Answers,
        record: RecordAnswer | None,
        errors: ErrorResponses,
        limits: LimitSettings,
    ) -> None:
        self._models = models
        self._engine = engine
        self._answers = answers
        self._record = record
        self._errors = errors
        self._limits = limits
        self._connections = Slots(limits.max_connections, "WebSocket connections")

    async def generate(self, websocket: WebSocket) -> None:
        """Serve one connection until its end."""
        await websocket.accept()
        protocol = SessionV2(self._models, self._limits, same_origin=is_same_origin(websocket))
        connection = _Connection(
            websocket, protocol, self._engine, self._answers, self._record, self._errors, self._limits
        )
        try:
            self._connections.take()
        except TooManyRequestsError as error:
            await connection.refuse(error)
            return
        try:
            await connection.run()
        finally:
            self._connections.free()


class _ConnectionEnded(Exception):
    """Ends both tasks of a connection, whichever noticed first that it is over."""


class _Connection:
    def __init__(
        self,
        websocket: WebSocket,
        protocol: SessionV2,
        engine: Engine,
        answers: Answers,
        record: RecordAnswer | None,
        errors: ErrorResponses,
        limits: LimitSettings,
    ) -> None:
        self._websocket = websocket
        self._protocol = protocol
        self._engine = engine
        self._answers = answers
        self._record = record
        self._visitor = visitor_of(websocket)
        self._errors = errors
        idle_seconds, request_seconds = limits.connection_idle_timeout_seconds, limits.request_timeout_seconds
        self._idle_limit, self._send_limit = WaitLimit(idle_seconds), WaitLimit(idle_seconds)
        self._request_limit = WaitLimit(request_seconds, lambda: DeadlineExceededError(request_seconds))
        self._actions: asyncio.Queue[Action] = asyncio.Queue()  # bounded by the protocol
        self._session: EngineSession | None = None

    async def run(self) -> None:
        """Serve the connection until its end, and free its session whatever happens."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read_frames())
                tasks.create_task(self._perform_actions())
        except* _ConnectionEnded:
            pass
        except* Exception as unexpected:
            await self.close_with(unexpected.exceptions[0])
        finally:
            self._close_limits()
            await self._start_last_answer()
            if self._session is not None:
                await self._session.close()

    async def refuse(self, error: Exception) -> None:
        """Do nothing for the connection but tell the error."""
        try:
            await self.close_with(error)
        finally:
            self._close_limits()

    async def close_with(self, error: Exception) -> None:
        """Send the error as the last frame, if the client is still there, and close the socket."""
        frame, close_code, reason = self._errors.websocket(error)
        with suppress(_ConnectionEnded, TimeoutError, WebSocketDisconnect, RuntimeError):
            await self._send(frame)
            with self._send_limit:
                await self._websocket.close(close_code, reason)

    def _close_limits(self) -> None:
        for limit in (self._idle_limit, self._send_limit, self._request_limit):
            limit.close()

    async def _read_frames(self) -> NoReturn:
        while True:
            self._receive(await self._websocket.receive())

    def _receive(self, message: Message) -> None:
        if message["type"] == "websocket.disconnect":
            raise _ConnectionEnded
        text = message.get("text")
        self._put(self._protocol.receive_bytes() if text is None else self._protocol.receive_text(text))

    async def _perform_actions(self) -> NoReturn:
        while True:
            await self._perform(await self._next_action())

    async def _perform(self, action: Action) -> None:
        match action:
            case SendFrame(text):
                await self._send(text)
            case OpenSession(model_key, max_length):
                await self._open(model_key, max_length)
            case StartGeneration(request):
                await self._generate(request)
            case StartAnswer():
                await self._start_answer(action)
            case FollowAnswer(generation, position):
                await self._attach(generation, position)
            case Fail(error):
                await self.close_with(error)
                raise _ConnectionEnded

    def _put(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, StopAnswer):
                self._stop(action.generation)
            else:
                self._actions.put_nowait(action)

    async def _next_action(self) -> Action:
        try:
            # Nothing runs while this waits, so it is the client that is idle.
            with self._idle_limit:
                return await self._actions.get()
        except TimeoutError:
            if self._actions.empty():  # else a frame came in the same moment
                self._put(self._protocol.idle_timed_out())
            return self._actions.get_nowait()

    async def _open(self, model_key: str, max_length: int) -> None:
        try:
            with self._request_limit:
                self._session = await self._engine.open_session(
                    model_key, max_length, owner=owner_of(self._websocket)
                )
        except PetalsChatError as error:
            self._put(self._protocol.failed(error))
        else:
            self._put(self._protocol.session_opened())

    async def _generate(self, request: GenerationRequest) -> None:
        assert self._session is not None
        finish_reason = None
        following: list[Action] = []  # to be done when the engine's iterator has ended
        try:
            with self._request_limit:
                async with aclosing(self._session.generate(request)) as chunks:
                    async for chunk in chunks:
                        finish_reason = chunk.finish_reason
                        for action in self._protocol.chunk_generated(chunk):
                            if isinstance(action, SendFrame):
                                await self._send(action.text)
                            else:
                                following.append(action)
            assert finish_reason is not None, "the engine ended a generation without a reason"
        except PetalsChatError as error:
            following = self._protocol.failed(error)
        self._put(following)

    async def _start(self, start: StartAnswer) -> Generation:
        return await self._answers.start(
            start.model,
            start.request,
            owner=owner_among(owner_of(self._websocket), self._visitor),
            visitor=self._visitor,
            recording=None if start.record is None else self._recording(start.record),
        )

    async def _start_last_answer(self) -> None:
        """Who asks for an answer that is written down, and leaves at once, finds it there later."""
        while not self._actions.empty():
            action = self._actions.get_nowait()
            if isinstance(action, StartAnswer) and action.record is not None:
                with suppress(PetalsChatError):  # there is nobody to tell
                    await self._start(action)

    async def _start_answer(self, start: StartAnswer) -> None:
        try:
            generation = await self._start(start)
        except PetalsChatError as error:
            self._put(self._protocol.failed(error))
            return
        for action in self._protocol.answer_started(generation.id):
            assert isinstance(action, SendFrame)
            await self._send(action.text)
        await self._follow(generation, 0)

    def _recording(self, record: Record) -> Recording:
        if self._record is None:
            raise HistoryDisabledError
        if self._visitor is None:
            raise UnknownChatError
        return self._record(self._visitor, record)

    async def _attach(self, generation_id: str, position: int) -> None:
        try:
            generation = self._answers.find(generation_id, self._visitor)
            await self._follow(generation, position)
        except PetalsChatError as error:
            self._put(self._protocol.failed(error))

    async def _follow(self, generation: Generation, position: int) -> None:
        async with aclosing(generation.follow(position)) as followed:
            async for what in followed:
                for action in self._protocol.followed(what):
                    if isinstance(action, SendFrame):
                        await self._send(action.text)
                    else:
                        self._put([action])

    def _stop(self, generation_id: str) -> None:
        try:
            self._answers.find(generation_id, self._visitor).stop()
        except PetalsChatError as error:
            self._put(self._protocol.refused(error))

    async def _send(self, text: str) -> None:
        try:
            # A client that takes nothing for so long is gone, though its end of the socket may still be open.
            with self._send_limit:
                await self._websocket.send({"type": "websocket.send", "text": text})
        except (TimeoutError, WebSocketDisconnect, RuntimeError):
            # RuntimeError is what starlette and uvicorn raise if the socket was closed from this side.
            raise _ConnectionEnded from None
