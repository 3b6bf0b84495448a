"""A real Chromium, and a gateway with a fake engine for it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.async_api import Browser, async_playwright

from petals_chat.gateway.app import create_app
from petals_chat.settings import (
    ChatSettings,
    EngineSettings,
    HistorySettings,
    LimitSettings,
    ModelSettings,
    ServerSettings,
    Settings,
)
from tests.asgi_server import running_server
from tests.browser.build import build_page
from tests.browser.chat_page import ChatPage, open_chat
from tests.browser.line import Line
from tests.fakes import FakeEngine

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_OPTIONS = [
    "--no-sandbox",  # there is none for root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

MODELS = (
    ModelSettings(
        key="swarm/beluga",
        repository="swarm/beluga",
        name="Beluga (70B)",
        family="Llama 2",
        model_card="https://example.org/beluga",
        license="https://example.org/beluga/licence",
        chat=ChatSettings(max_session_length=2048),
    ),
    ModelSettings(
        key="swarm/falcon",
        repository="swarm/falcon",
        name="Falcon (180B)",
        family="Falcon",
        public_api=False,
        chat=ChatSettings(
            max_session_length=2048, sep_token="\n", stop_token="</s>", extra_stop_sequences=()
        ),
    ),
)


@dataclass
class Gateway:
    """A running gateway, as a browser reaches it."""

    page_url: str
    engine: FakeEngine
    line: Line


@asynccontextmanager
async def running_gateway(
    *,
    data_dir: Path | None = None,
    line: Line | None = None,
    root_path: str = "",
    limits: LimitSettings | None = None,
    engine: FakeEngine | None = None,
) -> AsyncIterator[Gateway]:
    """A gateway that must end without a session or a generation left.

    Args:
        data_dir: has the history; None = the server keeps none.
        line: leads to the gateway from now on, in place of a line of its own.
    """
    settings = Settings(
        server=ServerSettings(root_path=root_path),
        limits=limits or LimitSettings(),
        history=HistorySettings(enabled=data_dir is not None),
        engine=EngineSettings() if data_dir is None else EngineSettings(data_dir=data_dir),
        models=MODELS,
    )
    engine = engine or FakeEngine(*(model.key for model in MODELS))
    app = create_app(settings, engine)
    async with running_server(app, settings) as address:
        if line is None:
            async with Line.to(address) as own_line:
                yield Gateway(f"http://{own_line.address}{root_path}/", engine, own_line)
        else:
            line.lead_to(address)
            yield Gateway(f"http://{line.address}{root_path}/", engine, line)
    assert engine.sessions == {}
    assert engine.running == 0


@pytest.fixture(scope="session")
def chromium() -> Path:
    if not CHROMIUM.exists():
        message = f"{CHROMIUM} is missing; on Debian: apt-get install chromium"
        if "CI" in os.environ:
            pytest.fail(message)
        pytest.skip(message)
    return CHROMIUM


@pytest.fixture(scope="session")
async def browser(chromium: Path) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        yield browser
        await browser.close()


@pytest.fixture(scope="session")
def built_page() -> None:
    build_page()


@pytest.fixture
async def gateway(built_page: None, tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway that keeps chats."""
    async with running_gateway(data_dir=tmp_path) as gateway:
        yield gateway


@pytest.fixture
async def forgetful_gateway(built_page: None) -> AsyncIterator[Gateway]:
    """A gateway that keeps no chats."""
    async with running_gateway() as gateway:
        yield gateway


@pytest.fixture
def engine(gateway: Gateway) -> FakeEngine:
    return gateway.engine


@pytest.fixture
def page_url(gateway: Gateway) -> str:
    """Where the page is. Tests that use nothing else of the gateway hold on any server."""
    return gateway.page_url


@pytest.fixture
async def chat(browser: Browser, page_url: str) -> AsyncIterator[ChatPage]:
    async with open_chat(browser, page_url) as chat:
        yield chat
