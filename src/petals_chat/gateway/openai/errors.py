"""Errors in the shape of the OpenAI API: ``{"error": {"message", "type", "param", "code"}}``. No I/O.

Their HTTP statuses are those of `petals_chat.gateway.error_responses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

import msgspec

from petals_chat.errors import (
    CapacityError,
    InvalidParameterError,
    MaximumLengthExceededError,
    PetalsChatError,
    RequestError,
    UnknownModelError,
)

_TYPES: Mapping[type[PetalsChatError], str] = {
    RequestError: "invalid_request_error",
    CapacityError: "rate_limit_error",
    PetalsChatError: "server_error",
}
"""The first class that an error belongs to counts."""

_CODES: Mapping[type[PetalsChatError], str] = {
    UnknownModelError: "model_not_found",
    MaximumLengthExceededError: "context_length_exceeded",
}
"""Errors that OpenAI has too; all others keep their own codes."""


_NO_FIELDS: Mapping[str, str] = {}


class ErrorObject(msgspec.Struct, frozen=True):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(msgspec.Struct, frozen=True):
    """The body of a reply, or of an event in a stream, that says what is wrong."""

    error: ErrorObject


def error_reply(error: PetalsChatError, fields: Mapping[str, str] = _NO_FIELDS) -> ErrorReply:
    """The reply for an error of ours.

    Args:
        fields: how the request's fields are called that became the engine's parameters, as ``inputs``.
    """
    param = error.data.get("parameter") if isinstance(error, InvalidParameterError) else None
    message = error.message
    if isinstance(error, UnknownModelError):
        param = "model"
    elif isinstance(error, MaximumLengthExceededError):
        param = fields.get("inputs")
    elif isinstance(param, str) and (field := fields.get(param.partition("[")[0])) is not None:
        message = message.replace(param, field, 1)
        param = field
    return ErrorReply(
        ErrorObject(
            message=" ".join(message.splitlines()),
            type=next(name for kind, name in _TYPES.items() if isinstance(error, kind)),
            param=None if param is None else str(param),
            code=_CODES.get(type(error), error.code),
        )
    )


def unknown_address_reply(method: str, path: str) -> tuple[int, ErrorReply]:
    """The HTTP status and the reply for what this API has not."""
    message = f"unknown request URL: {method} {path}. See docs/openai.md for what this server has"
    return HTTPStatus.NOT_FOUND, ErrorReply(ErrorObject(message, "invalid_request_error", code="unknown_url"))
