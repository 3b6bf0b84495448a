"""The protocol of API v2 on one connection, without I/O: frames and engine events in, actions out.

A client opens one session, then sends ``generate`` requests, also ahead of the replies; they are done one
after the other, in order. Whatever is wrong takes its place in that order too: what came before it is still
answered, then its error is the last frame. Answers, which outlive their connection, need no session; only to stop
one is done at once. This class never awaits, sleeps or reads a clock; the socket and the engine are
`petals_chat.gateway.websocket_v2`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from petals_chat.engine.interface import Chunk
from petals_chat.errors import (
    InvalidParameterError,
    MaximumLengthExceededError,
    MessageTooLargeError,
    ModelLoadingError,
    PetalsChatError,
    ProtocolViolationError,
    SessionExpiredError,
    TooManyRequestsError,
)
from petals_chat.gateway.answer_log import End, Failed, Followed, Loading, Piece, QueuePlace
from petals_chat.gateway.models import ModelRegistry
from petals_chat.gateway.parameters import (
    AnswerParameters,
    AttachParameters,
    GenerationParametersV2,
    SessionParameters,
    StopParameters,
    parse,
    parse_generation,
)
from petals_chat.history.interface import Record
from petals_chat.protocol.messages import FinishReason, GenerationRequest
from petals_chat.settings import LimitSettings, ModelSettings

REMEMBERED_FRAME_CHARS = 4096
"""Frames up to this length are remembered, so that connections that wait hold little."""
_MAX_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Open the engine's session; then call `SessionV2.session_opened`, or `SessionV2.failed`."""

    model_key: str
    max_length: int


@dataclass(frozen=True, slots=True)
class StartGeneration:
    """Generate in the session; then call `SessionV2.chunk_generated` per chunk, or `SessionV2.failed`."""

    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class StartAnswer:
    """Begin an answer; then call `SessionV2.answer_started`, and go on as with `FollowAnswer`."""

    model: ModelSettings
    request: GenerationRequest
    record: Record | None


@dataclass(frozen=True, slots=True)
class FollowAnswer:
    """Call `SessionV2.followed` with all that comes of the answer after ``position``, or `SessionV2.failed`."""

    generation: str
    position: int


@dataclass(frozen=True, slots=True)
class StopAnswer:
    """End the answer now, whatever else is going on; if there is none, call `SessionV2.refused`."""

    generation: str


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Send a text frame."""

    text: str


@dataclass(frozen=True, slots=True)
class Fail:
    """Send the error as the last frame, and close the connection."""

    error: PetalsChatError


_Request = OpenSession | StartGeneration | StartAnswer | FollowAnswer
Action = _Request | StopAnswer | SendFrame | Fail

_TYPES = ("open_inference_session", "generate", "answer", "attach", "stop")


class _Reply(msgspec.Struct):
    ok: bool
    outputs: str
    stop: bool
    token_count: int


class _Place(msgspec.Struct):
    ok: bool
    queue_place: int


class _Waiting(msgspec.Struct):
    ok: bool
    waiting_for: str


class _AnswerStarted(msgspec.Struct):
    ok: bool
    generation: str


class _AnswerReply(msgspec.Struct):
    ok: bool
    outputs: str
    token_count: int
    stop: bool
    position: int


class _LastAnswerReply(_AnswerReply):
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int


_encode = msgspec.json.Encoder().encode
_OPENED = SendFrame('{"ok":true}')


class SessionV2:
    """One connection's state. Each method returns what is to be done now, in this order.

    Args:
        same_origin: the connection comes from this server's own page.
    """

    def __init__(self, models: ModelRegistry, limits: LimitSettings, *, same_origin: bool) -> None:
        self._models = models
        self._limits = limits
        self._same_origin = same_origin
        self._opening: OpenSession | None = None
        self._wants_queue_places = False
        self._last_generate: tuple[str, StartGeneration] | None = None
        """The last short one and what it says: clients that go on token by token send the same one each time."""
        self._pending: deque[_Request | Fail] = deque()
        self._running: _Request | None = None
        self._last_words = False
        """An error is among the pending, or was handed out: what the client sends after it is not read."""
        self._texts: list[str] = []
        self._token_count = 0

    def receive_text(self, frame: str) -> list[Action]:
        """A text frame came from the client."""
        if self._last_words:
            return []
        try:
            if self._last_generate is not None and frame == self._last_generate[0]:
                return self._enqueue(self._last_generate[1])
            request = self._parse(frame)
            if isinstance(request, StopAnswer):
                return [request]
            if isinstance(request, StartGeneration) and len(frame) <= REMEMBERED_FRAME_CHARS:
                self._last_generate = (frame, request)
            return self._enqueue(request)
        except PetalsChatError as error:
            return self._enqueue(Fail(error))

    def receive_bytes(self) -> list[Action]:
        """A binary frame came from the client."""
        if self._last_words:
            return []
        return self._enqueue(
            Fail(ProtocolViolationError("binary frames are not used here; send JSON as text"))
        )

    def session_opened(self) -> list[Action]:
        """The engine has opened the session."""
        assert isinstance(self._running, OpenSession)
        self._running = None
        return [_OPENED, *self._next()]

    def chunk_generated(self, chunk: Chunk) -> list[Action]:
        """The engine has generated a piece of text."""
        assert isinstance(self._running, StartGeneration)
        if chunk.queue_place is not None:
            return self._tell_place(chunk.queue_place)
        if self._running.request.stop_sequences:
            return self._stream(chunk)
        return self._collect(chunk)

    def answer_started(self, generation: str) -> list[Action]:
        """The answer has begun, under this id."""
        assert isinstance(self._running, StartAnswer)
        return [SendFrame(_encode(_AnswerStarted(True, generation)).decode())]

    def followed(self, what: Followed) -> list[Action]:
        """Something came of the answer."""
        assert isinstance(self._running, StartAnswer | FollowAnswer)
        match what:
            case QueuePlace(place):
                return [SendFrame(_encode(_Place(True, place)).decode())]
            case Loading():
                return [SendFrame(_encode(_Waiting(True, ModelLoadingError.code)).decode())]
            case Piece(text, token_count, position):
                reply = _AnswerReply(True, text, token_count, False, position)
                return [SendFrame(_encode(reply).decode())]
            case End(Piece(text, token_count, position), reason, prompt_tokens, cached_tokens):
                self._running = None
                last = _LastAnswerReply(
                    True, text, token_count, True, position, reason, prompt_tokens, cached_tokens
                )
                return [SendFrame(_encode(last).decode()), *self._next()]
            case Failed(error):
                return self.failed(error)

    def refused(self, error: PetalsChatError) -> list[Action]:
        """What was to be done at once cannot be done; the error comes when its turn does."""
        return [] if self._last_words else self._enqueue(Fail(error))

    def failed(self, error: PetalsChatError) -> list[Action]:
        """The engine could not do what was asked of it."""
        self._running = None
        self._pending.clear()
        self._last_words = True
        return [Fail(error)]

    def idle_timed_out(self) -> list[Action]:
        """The client has asked for nothing for ``limits.connection_idle_timeout_seconds``."""
        assert self._running is None
        seconds = self._limits.connection_idle_timeout_seconds
        return self.failed(
            SessionExpiredError("of this connection", f"nothing was asked for in {seconds:g} s")
        )

    def _tell_place(self, place: int) -> list[Action]:
        """Clients that did not ask to be told see nothing new."""
        return [SendFrame(_encode(_Place(True, place)).decode())] if self._wants_queue_places else []

    def _stream(self, chunk: Chunk) -> list[Action]:
        """Pass a chunk on. Only a stop text, the model's end or the asked length ends the client's turn."""
        reason = chunk.finish_reason
        stop = reason is not None and reason not in (FinishReason.CONTEXT_FULL, FinishReason.CANCELLED)
        frame = SendFrame(_encode(_Reply(True, chunk.text, stop, chunk.token_count)).decode())
        if reason is None:
            return [frame]
        if reason is FinishReason.CONTEXT_FULL:
            return [frame, *self.failed(self._context_full(chunk.context_limit))]
        if reason is FinishReason.CANCELLED:
            return [frame, *self.failed(_cancelled())]
        self._running = None
        return [frame, *self._next()]

    def _collect(self, chunk: Chunk) -> list[Action]:
        """Keep the chunk for the single reply, or send that, if it was the last one."""
        self._texts.append(chunk.text)
        self._token_count += chunk.token_count
        if chunk.finish_reason is None:
            return []
        if chunk.finish_reason is FinishReason.CANCELLED:
            return self.failed(_cancelled())
        reply = _Reply(True, "".join(self._texts), True, self._token_count)
        self._texts, self._token_count = [], 0
        self._running = None
        return [SendFrame(_encode(reply).decode()), *self._next()]

    def _enqueue(self, request: _Request | Fail) -> list[Action]:
        waiting = len(self._pending)
        if waiting >= self._limits.max_pending_requests:
            request = Fail(
                TooManyRequestsError(
                    f"{waiting} requests already wait on this connection; wait for their replies first"
                )
            )
        self._last_words = isinstance(request, Fail)
        self._pending.append(request)
        return self._next()

    def _next(self) -> list[Action]:
        if self._running is not None or not self._pending:
            return []
        request = self._pending.popleft()
        if not isinstance(request, Fail):
            self._running = request
        return [request]

    def _parse(self, frame: str) -> _Request | StopAnswer:
        message = self._decode(frame)
        match message.get("type"):
            case "open_inference_session":
                return self._parse_open(message)
            case "generate":
                return self._parse_generate(message)
            case "answer":
                return self._parse_answer(message)
            case "attach":
                attach = parse(AttachParameters, message)
                return FollowAnswer(attach.generation, attach.position)
            case "stop":
                return StopAnswer(parse(StopParameters, message).generation)
            case other:
                raise ProtocolViolationError(
                    f"type: it must be one of {', '.join(_TYPES)}, "
                    f"but {ascii(other)[:_MAX_SHOWN_CHARS]} was given"
                )

    def _decode(self, frame: str) -> Mapping[str, Any]:
        data = frame.encode()
        if len(data) > self._limits.max_message_bytes:
            raise MessageTooLargeError(self._limits.max_message_bytes)
        try:
            message = msgspec.json.decode(data)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ProtocolViolationError(f"the frame is not valid JSON: {error}") from None
        if not isinstance(message, dict):
            raise ProtocolViolationError('the frame must be a JSON object, like {"type": "generate", ...}')
        return message

    def _parse_open(self, message: Mapping[str, Any]) -> OpenSession:
        if self._opening is not None:
            raise ProtocolViolationError("this connection already has its inference session")
        parameters = parse(SessionParameters, message)
        model = self._models.find_usable(parameters.model, same_origin=self._same_origin)
        self._opening = OpenSession(model.key, parameters.max_length)
        self._wants_queue_places = parameters.queue_places
        return self._opening

    def _parse_generate(self, message: Mapping[str, Any]) -> StartGeneration:
        if self._opening is None:
            raise ProtocolViolationError("open_inference_session must come before generate")
        parameters = parse_generation(GenerationParametersV2, message)
        if (
            parameters.model is not None
            and self._models.find(parameters.model).key != self._opening.model_key
        ):
            raise InvalidParameterError(
                "model",
                f"the session was opened with {self._opening.model_key!r}, and cannot change its model",
            )
        return StartGeneration(parameters.request(self._limits))

    def _parse_answer(self, message: Mapping[str, Any]) -> StartAnswer:
        parameters = parse(AnswerParameters, message)
        model = self._models.find_usable(parameters.model, same_origin=self._same_origin)
        record = parameters.record
        return StartAnswer(
            model,
            parameters.request(model.chat),
            Record(record.chat, record.message, record.parent) if record else None,
        )

    def _context_full(self, swarm_limit: int | None) -> MaximumLengthExceededError:
        assert self._opening is not None
        if swarm_limit is not None:
            return MaximumLengthExceededError(
                f"the machines of the swarm allow {swarm_limit} tokens in one context, and the session has as many. "
                "Open a new one with less text, or serve the model on machines with more room",
                limit=swarm_limit,
            )
        limit = self._opening.max_length
        return MaximumLengthExceededError(
            f"the {limit} tokens of the session are used up. Open a new one, longer or with less text",
            limit=limit,
        )


def _cancelled() -> SessionExpiredError:
    return SessionExpiredError("of this connection", "the server ended it")
