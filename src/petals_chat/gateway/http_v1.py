"""API v1: generation by plain HTTP requests, with or without a session between them.

Every reply has HTTP status 200, errors included: the clients of this API read no body under another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from petals_chat.engine.interface import Engine, EngineSession
from petals_chat.errors import EngineError, SessionExpiredError
from petals_chat.gateway.deadlines import ClientDisconnectedError, deadline, while_connected
from petals_chat.gateway.error_responses import ErrorReply, ErrorResponses
from petals_chat.gateway.models import ModelRegistry
from petals_chat.gateway.openapi import query_parameters, request_body
from petals_chat.gateway.origins import is_same_origin
from petals_chat.gateway.owners import owner_of
from petals_chat.gateway.parameters import (
    DEFAULT_SESSION_LENGTH,
    GenerationParametersV1,
    SessionParametersV1,
    SessionReference,
    parse,
    parse_generation,
)
from petals_chat.gateway.request_body import Values, read_values
from petals_chat.gateway.sessions_v1 import SessionRegistry
from petals_chat.protocol.messages import FinishReason, GenerationRequest
from petals_chat.settings import LimitSettings, ModelSettings

Endpoint = Callable[[Request], Awaitable[Response]]

_SESSION_ID = "b63a6a1c-8e2d-4c4f-9d7e-3d5f0f2f4c1a"
_GENERATE_EXAMPLE = {"inputs": "A cat sat on", "max_new_tokens": 16}
_OPEN_EXAMPLE = {"max_length": 1024}
_CLOSE_EXAMPLE = {"session_id": _SESSION_ID}


class GenerateReply(BaseModel):
    """The generated text."""

    ok: Literal[True] = True
    outputs: str = Field(description="The new text alone, its leading space kept.", examples=[" the mat."])


class OpenReply(BaseModel):
    """A session was opened."""

    ok: Literal[True] = True
    session_id: str = Field(examples=[_SESSION_ID])


class CloseReply(BaseModel):
    """The session was closed."""

    ok: Literal[True] = True


class HttpV1:
    """The endpoints of API v1."""

    def __init__(
        self,
        models: ModelRegistry,
        engine: Engine,
        sessions: SessionRegistry,
        errors: ErrorResponses,
        limits: LimitSettings,
    ) -> None:
        self._models = models
        self._engine = engine
        self._sessions = sessions
        self._errors = errors
        self._limits = limits

    def router(self) -> APIRouter:
        """The routes, with their documentation."""
        router = APIRouter(prefix="/api/v1", tags=["API v1"])

        def add(
            method: str, endpoint: Endpoint, reply: type[BaseModel], documentation: dict[str, Any]
        ) -> None:
            router.add_api_route(
                f"/{endpoint.__name__}",
                endpoint,
                methods=[method],
                response_model=reply | ErrorReply,
                responses={413: {"model": ErrorReply, "description": "The body is too large."}},
                openapi_extra=documentation,
            )

        add("POST", self.generate, GenerateReply, request_body(GenerationParametersV1, _GENERATE_EXAMPLE))
        add("GET", self.open_inference_session, OpenReply, query_parameters(SessionParametersV1))
        add("POST", self.open_inference_session, OpenReply, request_body(SessionParametersV1, _OPEN_EXAMPLE))
        add("GET", self.close_inference_session, CloseReply, query_parameters(SessionReference))
        add("POST", self.close_inference_session, CloseReply, request_body(SessionReference, _CLOSE_EXAMPLE))
        return router

    async def generate(self, request: Request) -> Response:
        """Generate text.

        Parameters may come as JSON, as an urlencoded or multipart form, or in the query string. The text is
        generated in the session `session_id`, going on from what is there, or else from nothing. One of
        `max_new_tokens` and `max_length` is needed.
        """
        return await self._answer(request, self._generate)

    async def open_inference_session(self, request: Request) -> Response:
        """Open a session, so that later requests go on from a text without processing it again.

        A session that is not used for some minutes is closed by the server.
        """
        return await self._answer(request, self._open)

    async def close_inference_session(self, request: Request) -> Response:
        """Close a session, ending what runs in it."""
        return await self._answer(request, self._close)

    async def _answer(
        self, request: Request, endpoint: Callable[[Request, Values], Awaitable[BaseModel]]
    ) -> Response:
        async def work(values: Values) -> BaseModel:
            return await endpoint(request, values)

        try:
            async with deadline(self._limits.request_timeout_seconds):
                values = await read_values(request, self._limits.max_message_bytes)
                reply = await while_connected(request.receive, work(values))
        except (ClientDisconnect, ClientDisconnectedError):
            return Response()  # nobody reads it
        except asyncio.CancelledError:
            # The server stops, and has waited long enough. The client shall know, instead of being cut off.
            return self._errors.v1(EngineError("the server is being stopped. Try again in a moment"))
        except Exception as error:
            return self._errors.v1(error)
        return JSONResponse(reply.model_dump())

    async def _generate(self, request: Request, values: Values) -> GenerateReply:
        parameters = parse_generation(GenerationParametersV1, values)
        same_origin = is_same_origin(request)
        if parameters.session_id is None:
            model = self._models.find_usable(parameters.model, same_origin=same_origin)
            return await self._generate_alone(model, parameters, owner_of(request))
        named = None if parameters.model is None else self._models.find(parameters.model)
        async with self._sessions.use(parameters.session_id, named, same_origin=same_origin) as session:
            return await _generate_in(session, parameters.single_chunk_request())

    async def _generate_alone(
        self, model: ModelSettings, parameters: GenerationParametersV1, owner: str
    ) -> GenerateReply:
        limit = self._session_limit(model)
        length = min(limit, parameters.context_limit or limit)
        session = await self._engine.open_session(model.key, length, owner=owner, is_stateless=True)
        try:
            return await _generate_in(session, parameters.single_chunk_request())
        finally:
            await session.close()

    async def _open(self, request: Request, values: Values) -> OpenReply:
        parameters = parse(SessionParametersV1, values)
        model = self._models.find_usable(parameters.model, same_origin=is_same_origin(request))
        max_length = parameters.max_length or min(DEFAULT_SESSION_LENGTH, self._session_limit(model))
        session_id = await self._sessions.open(
            model, max_length, owner=owner_of(request), model_was_given=parameters.model is not None
        )
        return OpenReply(session_id=session_id)

    async def _close(self, request: Request, values: Values) -> CloseReply:
        await self._sessions.close(parse(SessionReference, values).session_id)
        return CloseReply()

    def _session_limit(self, model: ModelSettings) -> int:
        """Tokens that a session may have; while the worker is not up, the configured limit stands in."""
        worker = self._engine.statuses[model.key].worker
        return worker.max_session_length if worker else model.chat.max_session_length


async def _generate_in(session: EngineSession, request: GenerationRequest) -> GenerateReply:
    texts = []
    finish_reason = None
    async with aclosing(session.generate(request)) as chunks:
        async for chunk in chunks:
            texts.append(chunk.text)
            finish_reason = chunk.finish_reason
    assert finish_reason is not None, "the engine ended a generation without a reason"
    if finish_reason is FinishReason.CANCELLED:
        raise SessionExpiredError(session.session_id, "it was closed while it generated")
    return GenerateReply(outputs="".join(texts))
