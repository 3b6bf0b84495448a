"""The real server, with models of every kind, as its own processes on this machine; and plain clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from petals_chat.swarm.host_options import HostReady
from tests.contract.serving import Server, running_server
from tests.contract.wire import TIMEOUT_SECONDS, receive
from tests.engine.conftest import checkpoints as checkpoints
from tests.swarm_processes import HostProcess
from tests.tiny_tokenizers import TOKENIZERS

PREFILL_CHUNK_TOKENS = 16
RECITING_SESSION_TOKENS = 4096
RANDOM_SESSION_TOKENS = 128
RANDOM_HOST_CACHE_TOKENS = 512
IDLE_TIMEOUT_SECONDS = 20
"""Longer than a session of these tests is left alone, unless that is the test."""
CACHE_IDLE_TIMEOUT_SECONDS = 10
"""Several servers use one host, and wait for what the others leave in its caches."""

CONFIGURATION = f"""
[server]
port = 0

[limits]
ping_interval_seconds = 1
connection_idle_timeout_seconds = {IDLE_TIMEOUT_SECONDS}
session_idle_timeout_seconds = {IDLE_TIMEOUT_SECONDS}

[swarm]
prefill_chunk_tokens = {PREFILL_CHUNK_TOKENS}
cache_idle_timeout_seconds = {CACHE_IDLE_TIMEOUT_SECONDS}
max_retries = 2

[engine]
dtype = "float32"
threads = 1
data_dir = "data"
"""


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' and loop.first %}{{ raise_exception('The user begins.') }}{% endif %}"
    "{{ message.role }}:\n{{ message.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
TEMPLATED = "bos"
"""The model that words its chats by `CHAT_TEMPLATE`; the others have none."""


def model_entry(key: str, checkpoint: Path, host: HostReady | None = None, **settings: Any) -> str:
    """A model's tables; without a host, the server starts one."""
    if host is not None:
        settings = {"initial_peers": host.peers, "dht_prefix": host.dht_prefix} | settings
    tokens = RECITING_SESSION_TOKENS if checkpoint.name == "reciting" else RANDOM_SESSION_TOKENS
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    return "\n".join(
        [
            f"[models.{key}]",
            f"repository = {json.dumps(str(checkpoint))}",
            *lines,
            f"chat.max_session_length = {tokens}\n",
        ]
    )


def chat_settings(kind: str) -> dict[str, Any]:
    """The settings by which a model with this tokenizer words its chats."""
    if kind != TEMPLATED:
        return {}
    return {"chat.template": CHAT_TEMPLATE, "chat.stop_token": "<|eot_id|>"}


@pytest.fixture(scope="package")
def random_host(checkpoints: dict[str, Path]) -> Iterator[HostReady]:
    """Holds the random blocks, which all checkpoints but the reciting one share."""
    host = HostProcess(checkpoints["byte_level"], f"--cache-tokens={RANDOM_HOST_CACHE_TOKENS}")
    try:
        yield host.wait_until_ready()
        host.family()
        host.close_stdin()
        assert host.wait() == 0
        assert host.survivors() == []
    finally:
        host.release()


@pytest.fixture(scope="package")
def server(
    checkpoints: dict[str, Path], random_host: HostReady, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The default model recites known text, from a private swarm that the server starts."""
    entries = [
        model_entry("reciting", checkpoints["reciting"], aliases=["old/name"]),
        *(model_entry(kind, checkpoints[kind], random_host, **chat_settings(kind)) for kind in TOKENIZERS),
        model_entry("private", checkpoints["byte_level"], random_host, public_api=False),
    ]
    config = tmp_path_factory.mktemp("server") / "petals-chat.toml"
    config.write_text(CONFIGURATION + "\n".join(entries))
    with running_server(config) as server:
        yield server


@pytest.fixture(scope="package")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_SECONDS) as client:
        yield client


@pytest.fixture
def websocket(server: Server) -> Iterator[ClientConnection]:
    """A connection on which nothing has been said."""
    with connect(server.v2_url, max_size=None) as client:
        yield client


@pytest.fixture
def open_session(http: httpx.Client) -> Iterator[Callable[..., str]]:
    """Opens sessions of API v1, and gives their ids. Those that are left are closed at the end."""
    session_ids: list[str] = []

    def open_session(**parameters: Any) -> str:
        reply = http.get("/api/v1/open_inference_session", params=parameters).json()
        assert set(reply) == {"ok", "session_id"}
        assert reply["ok"] is True
        session_ids.append(reply["session_id"])
        return session_ids[-1]

    yield open_session
    for session_id in session_ids:
        http.get("/api/v1/close_inference_session", params={"session_id": session_id})


@pytest.fixture
def figures(http: httpx.Client) -> Callable[..., tuple[int, int]]:
    """How many sessions of a model are open, and how many generations run in them, as its worker last said."""

    def figures(model: str = "reciting") -> tuple[int, int]:
        status = http.get("/api/status", params={"model": model}).json()
        return status["open_sessions"], status["running_generations"]

    return figures


@pytest.fixture(scope="package", autouse=True)
def left_alone(server: Server) -> Iterator[tuple[str, ClientConnection]]:
    """A v1 session and a v2 connection that nobody uses after the first test has begun."""
    reply = httpx.get(f"{server.url}/api/v1/open_inference_session?model=bos&max_length=64").json()
    with connect(server.v2_url) as client:
        client.send('{"type": "open_inference_session", "model": "bos", "max_length": 64}')
        assert receive(client) == {"ok": True}
        yield reply["session_id"], client


@pytest.fixture(params=["v1", "v2"])
def generate(request: pytest.FixtureRequest, server: Server, http: httpx.Client) -> Callable[..., Any]:
    """A request without a session in API v1, or the first of a session in v2; gives the reply."""

    def over_v1(**parameters: Any) -> Any:
        response = http.post("/api/v1/generate", json=parameters)
        assert response.status_code == 200
        return response.json()

    def over_v2(model: str | None = None, **parameters: Any) -> Any:
        with connect(server.v2_url, max_size=None) as client:
            opening = {"type": "open_inference_session", "model": model, "max_length": RANDOM_SESSION_TOKENS}
            client.send(json.dumps(opening))
            opened = receive(client)
            if not opened["ok"]:
                return opened
            client.send(json.dumps({"type": "generate", **parameters}))
            return receive(client)

    return over_v1 if request.param == "v1" else over_v2


@pytest.fixture
def next_client_is_served(server: Server, http: httpx.Client) -> Iterator[None]:
    """Whatever a test does to the server, another client of either API gets its answer afterwards."""
    yield
    reply = http.post("/api/v1/generate", json={"inputs": "A", "max_new_tokens": 4}).json()
    assert reply == {"ok": True, "outputs": "😀"}
    with connect(server.v2_url) as client:
        client.send('{"type": "open_inference_session", "max_length": 64}')
        client.send('{"type": "generate", "inputs": "A", "max_new_tokens": 4}')
        assert receive(client) == {"ok": True}
        assert receive(client) == {"ok": True, "outputs": "😀", "stop": True, "token_count": 4}
