"""Every error that a user of Petals Chat can meet, as one tree.

An error has a stable machine-readable ``code``, says whether trying again can help (``retryable``), carries
its data, and builds its own sentence. The branches say whose fault it is: `RequestError` (what was asked
for), `CapacityError` (too much at once), `EngineError` (this machine), `SwarmError` (the other machines).

There is no HTTP here: `petals_chat.gateway.error_responses` alone knows statuses and wire formats.
An error crosses the socket between a worker and the gateway as an `ErrorReport`.
"""

from __future__ import annotations

import traceback as python_traceback
from collections.abc import Iterable, Iterator
from typing import ClassVar

import msgspec

ErrorData = str | int | float | bool | tuple[int | str, ...] | None


class ErrorReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error in the form in which it crosses the socket.

    ``traceback`` is Python's own text; clients see it only if the debug setting asks for it.
    """

    code: str
    message: str
    data: dict[str, ErrorData] = {}
    traceback: str = ""


class PetalsChatError(Exception):
    """The root of the tree; never raised itself."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    wire_name: ClassVar[str | None] = None
    """The name in front of the sentence on the wire, where clients expect another one than the class's."""

    def __init__(self, message: str, **data: ErrorData) -> None:
        super().__init__(message)
        self.message = message
        self.data = data
        self.remote_traceback = ""

    @property
    def name(self) -> str:
        """The error's name on the wire."""
        return self.wire_name or type(self).__name__

    def report(self) -> ErrorReport:
        """The error with its Python traceback, ready to cross the socket."""
        lines = python_traceback.format_exception(type(self), self, self.__traceback__)
        return ErrorReport(self.code, self.message, self.data, self.remote_traceback or "".join(lines))


class ConfigurationError(PetalsChatError):
    """The configuration cannot be used; the message names the key, the value and what would be right."""

    code = "invalid_configuration"


class RequestError(PetalsChatError):
    """The request cannot be done as it stands; the client has to change it."""

    code = "invalid_request"


class InvalidParameterError(RequestError):
    """A parameter is missing or has a value that cannot be used."""

    code = "invalid_parameter"

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter}: {problem}", parameter=parameter)


class MessageTooLargeError(RequestError):
    """A message or body is over the size limit."""

    code = "message_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"the message is larger than the {limit_bytes} bytes allowed here", limit_bytes=limit_bytes
        )


class ProtocolViolationError(RequestError):
    """A frame that makes no sense at this point of the conversation."""

    code = "protocol_violation"


class UnknownModelError(RequestError):
    """No such model here."""

    code = "unknown_model"
    wire_name = "KeyError"  # what existing clients look for

    def __init__(self, model: str, known: Iterable[str]) -> None:
        names = tuple(known)
        super().__init__(
            f"model {model!r} is not served here. Models: {', '.join(names)}", model=model, models=names
        )


class ModelNotPublicError(RequestError):
    """The licence of this model forbids a public API."""

    code = "model_not_public"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"the licence of model {model!r} does not allow a public API: it can only be used from this "
            "server's own page",
            model=model,
        )


class InvalidApiKeyError(RequestError):
    """No key was given, or one that this server does not know."""

    code = "invalid_api_key"

    def __init__(self, *, is_missing: bool) -> None:
        super().__init__(
            "this server needs an API key: send it in the header Authorization, as Bearer KEY"
            if is_missing
            else "the API key is not one of this server's"
        )


class ModelNotAllowedError(RequestError):
    """The key may not use this model."""

    code = "model_not_allowed"

    def __init__(self, model: str) -> None:
        super().__init__(f"this API key may not use model {model!r}", model=model)


class MaximumLengthExceededError(RequestError):
    """The context has no room for what was asked."""

    code = "maximum_length_exceeded"

    def __init__(self, explanation: str, *, limit: int) -> None:
        super().__init__(f"Maximum length exceeded: {explanation}", limit=limit)

    @property
    def limit(self) -> int:
        """How many tokens there may be."""
        limit = self.data["limit"]
        assert isinstance(limit, int)
        return limit


class SessionExpiredError(RequestError):
    """The session is unknown, was closed, or ended by itself after idling."""

    code = "session_expired"

    def __init__(self, session_id: str, reason: str = "it was closed, or idle for too long") -> None:
        super().__init__(f"Session {session_id} expired: {reason}", session_id=session_id)


class UnknownGenerationError(RequestError):
    """There is no such answer to follow."""

    code = "unknown_generation"

    def __init__(self) -> None:
        super().__init__(
            "there is no such generation: it never was, is another visitor's, or ended too long ago"
        )


class ForeignOriginError(RequestError):
    """A page of another site wants to change a visitor's chats."""

    code = "foreign_origin"

    def __init__(self) -> None:
        super().__init__("chats can be changed from this server's own page only")


class HistoryDisabledError(RequestError):
    """This server keeps no chats."""

    code = "history_disabled"

    def __init__(self) -> None:
        super().__init__("this server keeps no history of chats")


class UnknownChatError(RequestError):
    """The visitor has no such chat."""

    code = "unknown_chat"

    def __init__(self) -> None:
        super().__init__("you have no such chat: it never was, was deleted, expired, or is another visitor's")


class UnknownMessageError(RequestError):
    """The chat has no such message."""

    code = "unknown_message"

    def __init__(self, message_id: str) -> None:
        super().__init__(f"the chat has no message {message_id!r}", message_id=message_id)


class UnknownShareError(RequestError):
    """Nothing is shared under this link."""

    code = "unknown_share"

    def __init__(self) -> None:
        super().__init__("nothing is shared under this link any more, if ever")


class HistoryConflictError(RequestError):
    """Something else is there already, or happens to it."""

    code = "history_conflict"


class HistoryFullError(RequestError):
    """A limit on what one visitor may keep is reached; the message says which."""

    code = "history_full"


class CapacityError(PetalsChatError):
    """Too much at once; later it may work."""

    code = "over_capacity"
    retryable = True


class AttentionCacheFullError(CapacityError):
    """The swarm's servers have no memory left for one more session."""

    code = "attention_cache_full"

    def __init__(self, reason: str = "too many sessions are open at once") -> None:
        super().__init__(
            f"the swarm's attention cache is full: {reason}. Try again in a moment, or add a host to the swarm"
        )


class TooManyRequestsError(CapacityError):
    """A limit of this server on things at once is reached; the message says which."""

    code = "too_many_requests"


class RateLimitExceededError(CapacityError):
    """The client has used up what it may in a minute, or at once."""

    code = "rate_limit_exceeded"

    def __init__(self, limit: int, things: str, retry_after_seconds: float) -> None:
        super().__init__(
            f"you may have {limit} {things}, and have that many. Try again in {max(1, round(retry_after_seconds))} s",
            limit=limit,
            retry_after_seconds=retry_after_seconds,
        )


class EngineError(PetalsChatError):
    """This machine's part of the work failed."""

    code = "engine_error"
    retryable = True


class ModelLoadingError(EngineError):
    """The model is not ready yet."""

    code = "model_loading"

    def __init__(self, model: str) -> None:
        super().__init__(f"model {model!r} is still loading. Try again in a moment", model=model)


class ModelUnavailableError(EngineError):
    """The model could not be started. The reason, which may name files and machines, is for the log only."""

    code = "model_unavailable"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"model {model!r} could not be started; the server's log says why. It is tried again and again",
            model=model,
        )


class WorkerLostError(EngineError):
    """The model's worker process ended in the middle of the request."""

    code = "worker_lost"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"the process serving model {model!r} ended in the middle of the request. It is being restarted: "
            "try again in a moment",
            model=model,
        )


class DeadlineExceededError(EngineError):
    """The request took longer than the time allowed for one."""

    code = "deadline_exceeded"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request took longer than the {seconds:g} s allowed here", seconds=seconds)


class HistoryUnavailableError(EngineError):
    """The database cannot be asked at the moment. The reason is for the log only."""

    code = "history_unavailable"

    def __init__(self) -> None:
        super().__init__("the server's database does not answer. Try again in a moment")


class InternalError(EngineError):
    """A fault of this program. The log has the details, the client only the kind."""

    code = "internal_error"
    retryable = False

    def __init__(self) -> None:
        super().__init__("an internal error; the server's log has the details")


class SwarmError(PetalsChatError):
    """The other machines' part of the work failed."""

    code = "swarm_error"
    retryable = True


class MissingBlocksError(SwarmError):
    """A part of the model is served by nobody."""

    code = "missing_blocks"

    def __init__(self, blocks: list[int]) -> None:
        super().__init__(
            f"No servers holding blocks {blocks} are online: this part of the model is not served at the moment",
            blocks=tuple(blocks),
        )


class SwarmUnreachableError(SwarmError):
    """Servers hold the blocks, but did not answer, or broke off."""

    code = "swarm_unreachable"


def error_from_report(report: ErrorReport) -> PetalsChatError:
    """The error that ``report`` was made from; an unknown code becomes an `EngineError`."""
    kind = _CLASSES_BY_CODE.get(report.code, EngineError)
    error = kind.__new__(kind)
    PetalsChatError.__init__(error, report.message, **report.data)
    error.remote_traceback = report.traceback
    return error


def error_classes() -> Iterator[type[PetalsChatError]]:
    """Every class of the tree, the root first."""

    def walk(kind: type[PetalsChatError]) -> Iterator[type[PetalsChatError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from walk(child)

    return walk(PetalsChatError)


_CLASSES_BY_CODE = {kind.code: kind for kind in error_classes()}
