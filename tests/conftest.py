"""What all tests have in common: the event loop is the one that the gateway and its workers have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """See pytest-asyncio. What asyncio's own loop forgives, such as writing to a closed socket, this one may not."""
    return {"uvloop": uvloop.new_event_loop}
