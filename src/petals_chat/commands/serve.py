"""``petals-chat serve``: the gateway, its engine, and the hosts of private swarms, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket

import uvicorn
import uvloop

from petals_chat import __version__
from petals_chat.asgi import configure_logging, with_models
from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.errors import ConfigurationError
from petals_chat.gateway.app import create_app
from petals_chat.gateway.server import uvicorn_config
from petals_chat.settings import Settings

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that can be chosen is a setting."""


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Serve until interrupted.

    Raises:
        ConfigurationError: the address cannot be listened on, or the history's database cannot be used.
    """
    configure_logging(settings.server.log_level)
    with _listen(settings.server.host, settings.server.port) as listening:
        logger.info("Petals Chat %s", __version__)
        uvloop.run(_serve(with_models(settings), listening))
    return 0


async def _serve(settings: Settings, listening: socket.socket) -> None:
    if settings.history.enabled:
        # Here, since a gateway without history does not need the database's libraries.
        from petals_chat.history.history import check_database

        await check_database(settings.history, settings.engine.data_dir)
    engine = ProcessEngine(settings)
    server = uvicorn.Server(uvicorn_config(create_app(settings, engine, lifespan=engine), settings))
    announcement = asyncio.create_task(_announce(engine, _url(listening, settings.server.root_path)))
    try:
        await server.serve(sockets=[listening])
    finally:
        announcement.cancel()
    logger.info("Stopped.")


async def _announce(engine: ProcessEngine, url: str) -> None:
    """Say when there is something to chat with. The page is there before, and says that models load."""
    await engine.wait_until_settled()
    not_ready = [key for key, status in engine.statuses.items() if not status.state.can_answer]
    if not_ready:
        logger.warning("Not ready: %s", ", ".join(not_ready))
    logger.info("Open %s (Ctrl-C stops)", url)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {os.strerror(error.errno) if error.errno else error}. "
            "Choose another with --port, or server.host and server.port in the configuration"
        ) from error


def _url(listening: socket.socket, root_path: str) -> str:
    host, port = listening.getsockname()[:2]
    if host in ("127.0.0.1", "::1", "0.0.0.0", "::"):  # noqa: S104 - compared, not bound to
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{root_path + '/' if root_path else ''}"
