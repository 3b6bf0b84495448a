"""The configuration of uvicorn."""

from __future__ import annotations

import logging

import pytest
from starlette.responses import PlainTextResponse

from petals_chat.gateway.server import WEBSOCKET_MAX_BYTES, uvicorn_config
from petals_chat.settings import LimitSettings
from tests.gateway.gateways import settings_with

APP = PlainTextResponse("")


def test_address_limits_and_proxies_come_from_the_settings() -> None:
    settings = settings_with(
        limits={"ping_interval_seconds": 7, "connection_idle_timeout_seconds": 70},
        server={"host": "::1", "port": 1234, "forwarded_allow_ips": "10.0.0.1"},
    )
    config = uvicorn_config(APP, settings)
    assert (config.host, config.port, config.forwarded_allow_ips) == ("::1", 1234, "10.0.0.1")
    assert (config.ws_ping_interval, config.ws_ping_timeout) == (7, 70)


def test_messages_over_the_limit_reach_the_app_which_answers_them() -> None:
    largest = LimitSettings.model_fields["max_message_bytes"].metadata
    assert all(getattr(bound, "le", 0) < WEBSOCKET_MAX_BYTES for bound in largest)
    assert uvicorn_config(APP, settings_with()).ws_max_size == WEBSOCKET_MAX_BYTES


@pytest.mark.parametrize(
    ("log_level", "uvicorns"),
    [("debug", "INFO"), ("info", "WARNING"), ("warning", "WARNING"), ("error", "ERROR")],
)
def test_uvicorn_logs_each_request_only_for_debugging(log_level: str, uvicorns: str) -> None:
    uvicorn_config(APP, settings_with(server={"log_level": log_level}))
    for logger in ("uvicorn.error", "uvicorn.access"):
        assert logging.getLevelName(logging.getLogger(logger).level) == uvicorns
