"""Runs an app under the product's own server configuration, in the test's event loop, on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp

from petals_chat.gateway.server import uvicorn_config
from petals_chat.settings import Settings


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the test runner."""
        yield


@asynccontextmanager
async def running_server(app: ASGIApp, settings: Settings) -> AsyncIterator[str]:
    """Serve the app as long as the block runs; gives "127.0.0.1:port"."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Server(uvicorn_config(app, settings))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if serving.done():
                await serving
            await asyncio.sleep(0.005)
        host, port = listener.getsockname()
        yield f"{host}:{port}"
    finally:
        server.should_exit = True
        await serving
        listener.close()
        # Those that the server cancelled after the graceful time; it does not wait for them.
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)
