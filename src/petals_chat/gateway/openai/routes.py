"""The endpoints of the OpenAI-compatible API: they read requests, run generations, and send replies.

A request has no session on the server: each of its choices gets one of its own, which goes on from the context of an
earlier request whose text this one extends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from functools import partial
from types import MappingProxyType
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from petals_chat.engine.interface import Chunk, Engine
from petals_chat.errors import EngineError, ModelNotAllowedError, PetalsChatError
from petals_chat.gateway.clients import Clients
from petals_chat.gateway.deadlines import ClientDisconnectedError, deadline, while_connected
from petals_chat.gateway.error_responses import ErrorResponses, http_status
from petals_chat.gateway.models import ModelRegistry
from petals_chat.gateway.openai import openapi
from petals_chat.gateway.openai.errors import ErrorReply, error_reply, unknown_address_reply
from petals_chat.gateway.openai.event_stream import DONE, EventStream
from petals_chat.gateway.openai.parameters import (
    ChatParameters,
    CommonParameters,
    CompletionParameters,
    Plan,
    parse,
)
from petals_chat.gateway.openai.replies import (
    ChatReplyWriter,
    Choice,
    CompletionReplyWriter,
    ReplyWriter,
    Usage,
)
from petals_chat.gateway.openai.responses import ResponseParameters, ResponsesWriter, parse_response
from petals_chat.gateway.openai.tokenizers import DetokenizeParameters, TokenizeParameters, Tokenizers
from petals_chat.gateway.origins import is_same_origin
from petals_chat.gateway.owners import owner_of
from petals_chat.gateway.request_body import read_body
from petals_chat.protocol.messages import GenerationRequest, ToolStyle
from petals_chat.settings import LimitSettings, ModelSettings

DEFAULT_MODEL = "default"
"""The server's default model goes by this name too, unless it is another one's: OpenAI's API wants a name always."""
CHOICES_AT_ONCE = 16
"""Choices of one request that have a session at the same time; the others follow."""

_TAG = "OpenAI-compatible API"
_RESPONSE_FIELDS = {"inputs": "input", "messages": "input", "grammar": "text", "response_format": "text"}
_ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


class _TextConvertor(StringConvertor):
    """Any rest of an address, also with line breaks, which Starlette's ``path`` leaves out."""

    regex = "(?s:.*)"


register_url_convertor("text", _TextConvertor())

OnChunk = Callable[[Choice, Chunk], Awaitable[None]]


class OpenAI:
    """The endpoints."""

    def __init__(
        self,
        models: ModelRegistry,
        engine: Engine,
        errors: ErrorResponses,
        limits: LimitSettings,
        clients: Clients,
    ) -> None:
        self._models = models
        self._engine = engine
        self._errors = errors
        self._limits = limits
        self._clients = clients
        self._tokenizers = Tokenizers(engine, self._find, self._session_limit)
        self._created = int(time.time())

    def routers(self) -> list[APIRouter]:
        """The routes, with their documentation."""
        return [self._tokenizer_router(), self._v1_router()]

    def refusal(self, path: str, error: PetalsChatError) -> Response:
        """The reply to a request that is refused before an endpoint sees it."""
        return self._errors.http(error) if path.startswith("/api/") else self._failure(error)

    def _v1_router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=[_TAG])
        add = partial(router.add_api_route, responses=openapi.FAILURES)
        add("/models", self.list_models, response_model=openapi.ModelList)
        add("/models/{name:text}", self.retrieve_model, response_model=openapi.Model)
        for path, endpoint, parameters, reply in (
            ("/chat/completions", self.chat_completions, ChatParameters, openapi.ChatCompletion),
            ("/completions", self.completions, CompletionParameters, openapi.Completion),
            ("/responses", self.responses, ResponseParameters, openapi.Response),
        ):
            router.add_api_route(
                path,
                endpoint,
                methods=["POST"],
                response_model=reply,
                responses=openapi.FAILURES | openapi.STREAM,
                openapi_extra=openapi.request_body(parameters),
            )
        router.add_api_route(
            "/{path:text}", self.unknown_address, methods=_ALL_METHODS, include_in_schema=False
        )
        return router

    def _tokenizer_router(self) -> APIRouter:
        router = APIRouter(tags=[_TAG])
        add = partial(router.add_api_route, responses=openapi.FAILURES)
        for path, endpoint, parameters, reply in (
            ("/tokenize", self.tokenize, TokenizeParameters, openapi.Tokenized),
            ("/detokenize", self.detokenize, DetokenizeParameters, openapi.Detokenized),
        ):
            documentation = openapi.request_body(parameters)
            add(path, endpoint, methods=["POST"], response_model=reply, openapi_extra=documentation)
        add(
            "/tokenizer_info",
            self.tokenizer_info,
            response_model=openapi.TokenizerInfo,
            openapi_extra=openapi.MODEL_IN_QUERY,
        )
        return router

    async def list_models(self, request: Request) -> Response:
        """List the models, the default one first."""
        client = self._clients.of(owner_of(request))
        models = [self._describe(model) for model in self._models if client.may_use(model.key)]
        return _json({"object": "list", "data": models})

    async def retrieve_model(self, request: Request, name: str) -> Response:
        """Describe a model."""
        try:
            model = self._models.find(name)
            if not self._clients.of(owner_of(request)).may_use(model.key):
                raise ModelNotAllowedError(model.key)
            return _json(self._describe(model))
        except PetalsChatError as error:
            return self._failure(error)

    async def chat_completions(self, request: Request) -> Response:
        """Answer the last message of a chat.

        With `stream`, the answer comes piece by piece as server-sent events.
        """
        return await self._answer(request, self._plan_chat, {"inputs": "messages"})

    async def completions(self, request: Request) -> Response:
        """Continue one text, or several.

        With `stream`, they come piece by piece as server-sent events.
        """
        return await self._answer(request, self._plan_completion, {"inputs": "prompt"})

    async def responses(self, request: Request) -> Response:
        """Answer the last message of a conversation; nothing is stored.

        With `stream`, the answer comes piece by piece as server-sent events.
        """
        return await self._answer(request, self._plan_response, _RESPONSE_FIELDS)

    async def tokenize(self, request: Request) -> Response:
        """Turn a text, or a chat as the model gets it, into token ids."""
        return await self._reply(request, self._tokenizers.tokenize, {"inputs": "prompt"})

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids into text."""
        return await self._reply(request, self._tokenizers.detokenize, {"inputs": "tokens"})

    async def tokenizer_info(self, request: Request) -> Response:
        """Describe a model's tokenizer."""
        return await self._reply(request, self._tokenizers.describe, {})

    async def unknown_address(self, request: Request) -> Response:
        """Say that there is no such endpoint."""
        status, reply = unknown_address_reply(request.method, request.url.path)
        return _json(reply, status)

    async def _reply(
        self,
        request: Request,
        work: Callable[[Request, bytes], Awaitable[object]],
        fields: Mapping[str, str],
    ) -> Response:
        try:
            async with deadline(self._limits.request_timeout_seconds):
                return _json(await work(request, await self._body(request)))
        except ClientDisconnect:
            return Response()  # nobody reads it
        except Exception as error:
            return self._failure(error, fields)

    async def _answer(
        self, request: Request, plan: Callable[[Request, bytes], _Job], fields: Mapping[str, str]
    ) -> Response:
        try:
            async with deadline(self._limits.request_timeout_seconds):
                body = await self._body(request)
            job = plan(request, body)
        except ClientDisconnect:
            return Response()  # nobody reads it
        except Exception as error:
            return self._failure(error, fields)

        def explain(error: Exception) -> tuple[int, ErrorReply]:
            known = self._errors.known(error)
            return http_status(known), error_reply(known, {"grammar": job.grammar_field, **fields})

        return _JobResponse(job, self._limits.request_timeout_seconds, explain)

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._limits.max_message_bytes)

    def _plan_chat(self, request: Request, body: bytes) -> _Job:
        parameters = parse(ChatParameters, body)
        model = self._find(request, parameters.model)
        writer = ChatReplyWriter(model.key, includes_usage=parameters.includes_usage)
        return self._job(request, model, parameters, self._chat_plan(model, parameters), writer)

    def _plan_completion(self, request: Request, body: bytes) -> _Job:
        parameters = parse(CompletionParameters, body)
        model = self._find(request, parameters.model)
        writer = CompletionReplyWriter(model.key, includes_usage=parameters.includes_usage)
        return self._job(request, model, parameters, parameters.plan(self._limits), writer)

    def _plan_response(self, request: Request, body: bytes) -> _Job:
        parameters = parse_response(body)
        chat = parameters.as_chat()
        model = self._find(request, parameters.model)
        defaults = model.chat.generation
        writer = ResponsesWriter(
            model.key, parameters, temperature=defaults.temperature, top_p=defaults.top_p
        )
        return self._job(request, model, chat, self._chat_plan(model, chat), writer)

    def _chat_plan(self, model: ModelSettings, parameters: ChatParameters) -> Plan:
        worker = self._engine.statuses[model.key].worker
        # Without a worker the request is going to fail, but not because of its functions.
        style = worker.tool_style if worker else ToolStyle.HERMES
        return parameters.plan(model.chat, self._limits, style)

    def _job(
        self,
        request: Request,
        model: ModelSettings,
        parameters: CommonParameters,
        plan: Plan,
        writer: ReplyWriter,
    ) -> _Job:
        owner = owner_of(request)
        at_once = self._clients.of(owner).limits.concurrent_generations or CHOICES_AT_ONCE
        generator = _Generator(
            self._engine, model.key, self._session_limit(model), owner, min(at_once, CHOICES_AT_ONCE)
        )
        return _Job(generator, plan, writer, is_stream=bool(parameters.stream))

    def _find(self, request: Request, name: str | None) -> ModelSettings:
        if name == DEFAULT_MODEL and not self._models.has(name):
            name = None
        model = self._models.find_usable(name, same_origin=is_same_origin(request))
        if not self._clients.of(owner_of(request)).may_use(model.key):
            raise ModelNotAllowedError(model.key)
        return model

    def _session_limit(self, model: ModelSettings) -> int:
        worker = self._engine.statuses[model.key].worker
        return worker.max_session_length if worker else model.chat.max_session_length

    def _describe(self, model: ModelSettings) -> dict[str, Any]:
        return {
            "id": model.key,
            "object": "model",
            "created": self._created,
            "owned_by": model.key.partition("/")[0],
            "max_model_len": self._session_limit(model),
        }

    def _failure(self, error: Exception, fields: Mapping[str, str] = MappingProxyType({})) -> Response:
        known = self._errors.known(error)
        return _json(error_reply(known, fields), http_status(known))


class _Generator:
    """Generates choices for one client, so many at once."""

    def __init__(self, engine: Engine, model_key: str, session_tokens: int, owner: str, at_once: int) -> None:
        self._engine = engine
        self._model_key = model_key
        self._session_tokens = session_tokens
        self._owner = owner
        self._at_once = at_once

    async def run(self, plan: Plan, on_chunk: OnChunk) -> list[Choice]:
        """All choices, when the last one has ended; ``on_chunk`` is awaited for each piece of them.

        Raises:
            PetalsChatError: one of them failed; the others were ended.
        """
        requests = plan.requests
        choices = [
            Choice(index, request, echoed=await self._text(request) if plan.echo else "", tools=plan.tools)
            for index, request in enumerate(requests)
        ]
        if len(choices) == 1:
            await self._generate(choices[0], requests[0], on_chunk)
            return choices
        slots = asyncio.Semaphore(self._at_once)

        async def generate(choice: Choice, request: GenerationRequest) -> None:
            async with slots:
                await self._generate(choice, request, on_chunk)

        try:
            async with asyncio.TaskGroup() as tasks:
                for choice, request in zip(choices, requests, strict=True):
                    tasks.create_task(generate(choice, request))
        except* Exception as group:
            raise _first_of(group) from None
        return choices

    async def _text(self, request: GenerationRequest) -> str:
        """The prompt as a text."""
        if isinstance(request.inputs, str):
            return request.inputs
        assert isinstance(request.inputs, tuple)
        return await self._engine.tokenizer(self._model_key).decode(request.inputs)

    async def _generate(self, choice: Choice, request: GenerationRequest, on_chunk: OnChunk) -> None:
        session = await self._engine.open_session(
            self._model_key, self._session_tokens, owner=self._owner, is_stateless=True
        )
        try:
            async with aclosing(session.generate(request)) as chunks:
                async for chunk in chunks:
                    if chunk.queue_place is None:
                        await on_chunk(choice, chunk)
        finally:
            await session.close()
        assert choice.finish_reason is not None, "the engine ended a generation without a reason"


class _Job:
    """A request that was understood, and how its reply is to be sent."""

    def __init__(self, generator: _Generator, plan: Plan, writer: ReplyWriter, *, is_stream: bool) -> None:
        self._generator = generator
        self._plan = plan
        self._writer = writer
        self.is_stream = is_stream

    async def whole(self) -> bytes:
        """The reply in one piece."""

        async def collect(choice: Choice, chunk: Chunk) -> None:
            self._writer.collect(choice, choice.add(chunk))

        choices = await self._generator.run(self._plan, collect)
        return self._writer.whole(choices, self._usage(choices))

    async def send(self, events: EventStream) -> None:
        """The reply as events."""

        async def pass_on(choice: Choice, chunk: Chunk) -> None:
            await events.send(self._writer.piece(choice, choice.add(chunk)))

        choices = await self._generator.run(self._plan, pass_on)
        await events.send([*self._writer.closing(choices, self._usage(choices)), DONE])

    def opening(self) -> list[bytes]:
        """The first events of a stream."""
        return self._writer.opening(len(self._plan.requests))

    def failure(self, reply: ErrorReply) -> list[bytes]:
        """The last events of a stream that cannot go on."""
        return self._writer.failure(reply)

    @property
    def grammar_field(self) -> str:
        """The request's field that an answer's grammar is from."""
        tools = self._plan.tools
        return "tools" if tools and tools.is_forced else "response_format"

    def _usage(self, choices: list[Choice]) -> Usage:
        return Usage.of(choices, self._plan.choices_per_prompt)


class _JobResponse(Response):
    """Does a job while the client is there, and sends what comes of it.

    Args:
        explain: HTTP status and reply for an error.
    """

    def __init__(
        self, job: _Job, timeout_seconds: float, explain: Callable[[Exception], tuple[int, ErrorReply]]
    ) -> None:
        super().__init__()
        self._job = job
        self._timeout_seconds = timeout_seconds
        self._explain = explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The reply, as an ASGI application."""
        events = EventStream(send, self._job.opening) if self._job.is_stream else None
        try:
            async with deadline(self._timeout_seconds):
                if events is None:
                    body = await while_connected(receive, self._job.whole())
                else:
                    await while_connected(receive, self._stream(events))
        except ClientDisconnectedError:
            return  # nobody reads it
        except asyncio.CancelledError:
            # The server stops, and has waited long enough. The client shall know, instead of being cut off.
            stopping = EngineError("the server is being stopped. Try again in a moment")
            await self._fail(stopping, events, scope, receive, send)
        except Exception as error:
            await self._fail(error, events, scope, receive, send)
        else:
            if events is None:
                await Response(body, media_type="application/json")(scope, receive, send)
            else:
                await events.end()

    async def _stream(self, events: EventStream) -> None:
        keeping_alive = asyncio.create_task(events.keep_alive())
        try:
            await self._job.send(events)
        finally:
            keeping_alive.cancel()
            with suppress(asyncio.CancelledError):
                await keeping_alive

    async def _fail(
        self, error: Exception, events: EventStream | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        status, reply = self._explain(error)
        if events is None or not events.is_started:
            await _json(reply, status)(scope, receive, send)
        else:
            await events.send(self._job.failure(reply))
            await events.end()


def _first_of(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
