"""How uvicorn serves the gateway: one configuration, for the command line and for tests.

It leaves handlers and formats of the log to whoever starts the process.
"""

from __future__ import annotations

import uvicorn
from starlette.types import ASGIApp

from petals_chat.settings import Settings

WEBSOCKET_MAX_BYTES = 32 * 1024 * 1024
"""Over any ``limits.max_message_bytes``: what is larger than that limit gets an error frame, which uvicorn
would not send. What is larger than this, uvicorn ends in the middle (close code 1009)."""

SHUTDOWN_SECONDS = 2
"""How long requests may go on after Ctrl-C or SIGTERM."""

# One line per request comes with "debug"; uvicorn's own debugging is about its insides.
_UVICORN_LOG_LEVELS = {"debug": "info", "info": "warning", "warning": "warning", "error": "error"}


def uvicorn_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """The configuration with which ``uvicorn.Server`` serves the app."""
    return uvicorn.Config(
        app,
        host=settings.server.host,
        port=settings.server.port,
        loop="uvloop",
        http="httptools",
        ws="websockets-sansio",
        ws_max_size=WEBSOCKET_MAX_BYTES,
        ws_per_message_deflate=False,
        ws_ping_interval=settings.limits.ping_interval_seconds,
        # Some clients answer pings only while they wait for a reply, and yet may be idle for so long.
        ws_ping_timeout=settings.limits.connection_idle_timeout_seconds,
        lifespan="on",
        log_config=None,
        log_level=_UVICORN_LOG_LEVELS[settings.server.log_level],
        proxy_headers=True,
        forwarded_allow_ips=settings.server.forwarded_allow_ips,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
