"""The gateway as an ASGI application: here everything is built and put together, and nothing else happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

import petals_chat
from petals_chat.engine.interface import SwarmEngine
from petals_chat.gateway.admission import LimitedEngine
from petals_chat.gateway.answers import Answers
from petals_chat.gateway.api_keys import ApiKeys
from petals_chat.gateway.chats import Chats
from petals_chat.gateway.clients import Clients, MeteredEngine
from petals_chat.gateway.error_responses import ErrorResponses
from petals_chat.gateway.http_v1 import HttpV1
from petals_chat.gateway.log_privacy import keep_texts_out_of_uvicorns_log
from petals_chat.gateway.metrics import Metrics
from petals_chat.gateway.models import ModelRegistry
from petals_chat.gateway.openai.routes import OpenAI
from petals_chat.gateway.pages import Pages
from petals_chat.gateway.sessions_v1 import SessionRegistry
from petals_chat.gateway.status import StatusPages
from petals_chat.gateway.websocket_v2 import WebSocketV2
from petals_chat.settings import Settings

if TYPE_CHECKING:
    from petals_chat.history.history import History

_DESCRIPTION = """
Generates text with language models that are served by a Petals swarm.

This page describes the HTTP API v1. The same, token by token, is offered by the WebSocket API v2 at
`/api/v2/generate`; WebSockets are beyond this page's format, so it has a document of its own.
"""


def create_app(
    settings: Settings, engine: SwarmEngine, *, lifespan: AbstractAsyncContextManager[object] | None = None
) -> FastAPI:
    """The gateway's application.

    Args:
        engine: generates; it may still be loading its models when the app starts.
        lifespan: entered when the app starts, left when it has ended; for an engine that the app shall run.

    Raises:
        ConfigurationError: there are no models.
    """
    keep_texts_out_of_uvicorns_log()
    models = ModelRegistry(settings.models)
    errors = ErrorResponses(debug=settings.server.debug_tracebacks)
    clients = Clients(settings.api, [model.key for model in models])
    limited_engine = MeteredEngine(LimitedEngine(engine, settings.limits), clients)
    sessions = SessionRegistry(limited_engine, settings.limits)
    answers = Answers(limited_engine, settings.limits)
    history = _history(settings)
    status = StatusPages(models, engine)

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if history is not None:
                await stack.enter_async_context(history)
            if lifespan is not None:
                await stack.enter_async_context(lifespan)
            stack.push_async_callback(sessions.close_all)
            stack.push_async_callback(answers.close)
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(sessions.expire_idle_sessions()),
                    tasks.create_task(status.sample_rates()),
                ]
                yield
                for task in background:
                    task.cancel()

    app = FastAPI(
        title="Petals Chat",
        version=petals_chat.__version__,
        description=_DESCRIPTION,
        redoc_url=None,
        lifespan=run,
    )
    app.include_router(HttpV1(models, limited_engine, sessions, errors, settings.limits).router())
    openai = OpenAI(models, limited_engine, errors, settings.limits, clients)
    for router in openai.routers():
        app.include_router(router)
    app.include_router(status.router())
    app.include_router(Metrics(engine).router())
    store = history.store if history else None
    app.include_router(Chats(store, answers, settings.history, settings.limits).router())
    record = history.recorder.record if history else None
    websocket_v2 = WebSocketV2(models, limited_engine, answers, record, errors, settings.limits)
    app.router.add_websocket_route("/api/v2/generate", websocket_v2.generate)
    app.router.default = Pages()
    errors.register(app)
    app.add_middleware(ApiKeys, settings=settings.api, clients=clients, refusal=openai.refusal)
    if settings.server.root_path:
        app.add_middleware(_PublishedUnder, path=settings.server.root_path)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.server.cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
    )
    return app


def _history(settings: Settings) -> History | None:
    if not settings.history.enabled:
        return None
    # Here, since it brings the database's libraries, which a gateway without history does not need.
    from petals_chat.history.history import History

    return History(settings.history, settings.engine.data_dir)


class _PublishedUnder:
    """Tells the routes under which path a proxy publishes the server, whether or not it removes that path.

    (The server's own option of this name takes for granted that the proxy removes it.)
    """

    def __init__(self, app: ASGIApp, path: str) -> None:
        self._app = app
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "root_path": self._path}, receive, send)
