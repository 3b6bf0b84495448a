"""A gateway with a fake engine behind a real server, and the check that it leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from websockets.asyncio.client import connect

from petals_chat.gateway.app import create_app
from petals_chat.settings import HistorySettings, LimitSettings, ModelSettings, ServerSettings, Settings
from tests.asgi_server import running_server
from tests.fakes import FakeEngine

MODEL = ModelSettings(key="org/model", repository="org/model", name="Model", aliases=("old/name",))
PRIVATE_MODEL = ModelSettings(
    key="org/private", repository="org/private", name="Private", public_api=False, family="Other family"
)


def settings_with(
    limits: dict[str, Any] | None = None, server: dict[str, Any] | None = None, **sections: Any
) -> Settings:
    return Settings(
        limits=LimitSettings(**(limits or {})),
        server=ServerSettings(**(server or {})),
        **{"models": (MODEL, PRIVATE_MODEL), "history": HistorySettings(enabled=False), **sections},
    )


@dataclass
class Gateway:
    """A running gateway and its engine."""

    address: str
    engine: FakeEngine
    http: httpx.AsyncClient

    def connect(self, **options: Any) -> connect:
        """A plain WebSocket client on the v2 API."""
        return connect(
            f"ws://{self.address}/api/v2/generate", **{"compression": None, "max_queue": None, **options}
        )

    async def generate(self, **parameters: Any) -> Any:
        """The v1 API's reply to these parameters as JSON."""
        response = await self.http.post("/api/v1/generate", json=parameters)
        assert response.status_code == 200
        return response.json()


@asynccontextmanager
async def running_gateway(
    settings: Settings | None = None, engine: FakeEngine | None = None
) -> AsyncIterator[Gateway]:
    """A gateway that must end without a task, a session or a generation left."""
    settings = settings or settings_with()
    engine = engine or FakeEngine(*(model.key for model in settings.models))
    tasks_before = asyncio.all_tasks()
    app = create_app(settings, engine)
    async with (
        running_server(app, settings) as address,
        httpx.AsyncClient(base_url=f"http://{address}", timeout=20) as http,
    ):
        yield Gateway(address, engine, http)
    assert engine.sessions == {}
    assert engine.running == 0
    assert asyncio.all_tasks() - tasks_before - {asyncio.current_task()} == set()


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)
