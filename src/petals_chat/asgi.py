"""The application for ASGI servers: ``uvicorn --factory petals_chat.asgi:create_app``.

Configured by ``petals-chat.toml`` and the environment alone. The server's own options (host, port, WebSocket
pings) are then the ASGI server's; docs/deployment.md says which to set.
"""

from __future__ import annotations

import logging
import sys

from fastapi import FastAPI

from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.gateway import app as gateway
from petals_chat.models.bundled import bundled_settings
from petals_chat.settings import Settings, load_settings

logger = logging.getLogger(__name__)


def create_app() -> FastAPI:
    """The gateway with its engine, which starts and ends with the application."""
    settings = load_settings()
    configure_logging(settings.server.log_level)
    settings = with_models(settings)
    engine = ProcessEngine(settings)
    return gateway.create_app(settings, engine, lifespan=engine)


def with_models(settings: Settings) -> Settings:
    """The settings; where they name no model, with the built-in one."""
    if settings.models:
        return settings
    logger.info("No model is configured: serving the built-in Petals Guide, a small model about Petals Chat.")
    return settings.model_copy(update={"models": (bundled_settings(),)})


def configure_logging(level: str) -> None:
    """What people read on the terminal: our own lines plain, warnings of others with their origin."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("petals_chat")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
