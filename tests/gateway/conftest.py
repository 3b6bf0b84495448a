"""A running gateway for tests that need no settings of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.gateways import Gateway, running_gateway


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as gateway:
        yield gateway
