"""Errors as clients see them: wire format, HTTP statuses, WebSocket close codes. The only place for these.

It knows no endpoint. Which errors exist, and their sentences, is `petals_chat.errors`' affair.
"""

from __future__ import annotations

import logging
import traceback as python_traceback
from http import HTTPStatus
from typing import Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from petals_chat.errors import (
    CapacityError,
    EngineError,
    ForeignOriginError,
    HistoryConflictError,
    HistoryDisabledError,
    HistoryFullError,
    InternalError,
    InvalidApiKeyError,
    InvalidParameterError,
    MessageTooLargeError,
    ModelNotAllowedError,
    ModelNotPublicError,
    PetalsChatError,
    RequestError,
    SwarmError,
    UnknownChatError,
    UnknownGenerationError,
    UnknownMessageError,
    UnknownModelError,
    UnknownShareError,
)

logger = logging.getLogger(__name__)

# The first class that an error belongs to counts. RFC 9110 section 15; RFC 6455 section 7.4.1, and 1013
# ("try again later") of its IANA registry.
_HTTP_STATUSES: dict[type[PetalsChatError], int] = {
    MessageTooLargeError: 413,
    UnknownModelError: 404,
    UnknownGenerationError: 404,
    HistoryDisabledError: 404,
    UnknownChatError: 404,
    UnknownMessageError: 404,
    UnknownShareError: 404,
    HistoryConflictError: 409,
    HistoryFullError: 409,
    ForeignOriginError: 403,
    InvalidApiKeyError: 401,
    ModelNotAllowedError: 403,
    ModelNotPublicError: 403,
    RequestError: 400,
    CapacityError: 429,
    InternalError: 500,
    EngineError: 503,
    SwarmError: 503,
}
_CLOSE_CODES: dict[type[PetalsChatError], int] = {
    MessageTooLargeError: 1009,
    RequestError: 1008,
    CapacityError: 1013,
    PetalsChatError: 1011,
}


class ErrorReply(BaseModel):
    """Why a request failed, in all JSON replies but the OpenAI-compatible API's."""

    ok: Literal[False] = False
    code: str = Field(
        description="Which error it is, for programs: it never changes.", examples=["maximum_length_exceeded"]
    )
    traceback: str = Field(
        description="For people. The last line is the error's name and a sentence; unless the server is in "
        "debug mode, there is no other line.",
        examples=[
            "MaximumLengthExceededError: Maximum length exceeded: the session's 1024 tokens are used up"
        ],
    )


def http_status(error: PetalsChatError) -> int:
    """The HTTP status that fits."""
    return next((status for kind, status in _HTTP_STATUSES.items() if isinstance(error, kind)), 500)


class ErrorResponses:
    """Translates any exception for a client.

    Args:
        debug: put whole Python tracebacks into the replies.
    """

    def __init__(self, *, debug: bool) -> None:
        self._debug = debug

    def v1(self, error: Exception) -> Response:
        """The reply of API v1, whose clients would not read it under another status than 200.

        A body over the limit is refused before the API is reached, and so gets its 413.
        """
        known = self.known(error)
        status = 413 if isinstance(known, MessageTooLargeError) else 200
        return self._json(known, error, status)

    def http(self, error: Exception) -> Response:
        """The reply of everything else that speaks HTTP, with the fitting status."""
        known = self.known(error)
        return self._json(known, error, http_status(known))

    def websocket(self, error: Exception) -> tuple[str, int, str]:
        """The error frame, and the code and reason to close the connection with after it."""
        known = self.known(error)
        close_code = next(code for kind, code in _CLOSE_CODES.items() if isinstance(known, kind))
        return self._reply(known, error).model_dump_json(), close_code, known.code

    def register(self, app: FastAPI) -> None:
        """Make the app answer with these wherever an endpoint raises, or none is found."""

        async def handle(request: Request, error: Exception) -> Response:
            return self.http(error)

        async def handle_invalid(request: Request, error: Exception) -> Response:
            assert isinstance(error, RequestValidationError)
            first = error.errors()[0]
            return self.http(InvalidParameterError(str(first["loc"][-1]), first["msg"]))

        async def handle_unexpected(request: Request, error: Exception) -> Response:
            # No logging: starlette raises the error again after this reply, and the server logs it.
            return self._json(InternalError(), error, 500)

        app.add_exception_handler(PetalsChatError, handle)
        app.add_exception_handler(RequestValidationError, handle_invalid)
        app.add_exception_handler(HTTPException, _handle_http_exception)
        app.add_exception_handler(Exception, handle_unexpected)

    def known(self, error: Exception) -> PetalsChatError:
        """The error as one of the tree; what is not expected is logged, and becomes an `InternalError`."""
        if isinstance(error, PetalsChatError):
            return error
        logger.error("unexpected error in a request", exc_info=error)
        return InternalError()

    def _json(self, known: PetalsChatError, cause: Exception, status: int) -> Response:
        return JSONResponse(self._reply(known, cause).model_dump(), status)

    def _reply(self, known: PetalsChatError, cause: Exception) -> ErrorReply:
        sentence = f"{known.name}: {' '.join(known.message.splitlines())}"
        if not self._debug:
            return ErrorReply(code=known.code, traceback=sentence)
        remote = getattr(cause, "remote_traceback", "")
        frames = remote or "".join(python_traceback.format_exception(cause))
        return ErrorReply(code=known.code, traceback=f"{frames.rstrip()}\n{sentence}")


async def _handle_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors, like 404 and 405, in the same shape; the standard's phrase gives the name."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    reply = ErrorReply(
        code=phrase.lower().replace(" ", "_"),
        traceback=f"{phrase.title().replace(' ', '')}Error: {request.method} is not answered at this address",
    )
    return JSONResponse(reply.model_dump(), error.status_code, error.headers)
