"""Another server: its swarm lacks the model's blocks, errors are shown for debugging, and one origin is welcome."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect
from websockets.typing import Origin

from petals_chat.swarm.host_options import HostReady
from tests.contract.conftest import model_entry
from tests.contract.serving import Server, running_server
from tests.contract.wire import OPEN, TIMEOUT_SECONDS, receive, receive_error, wait_until

FRIEND = "https://friend.example"
CONFIGURATION = f"""
[server]
port = 0
cors_origins = ["{FRIEND}"]
debug_tracebacks = true

[swarm]
max_retries = 1

[engine]
dtype = "float32"
threads = 1
data_dir = "data"
"""


@pytest.fixture(scope="module")
def another(
    checkpoints: dict[str, Path], random_host: HostReady, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    config = tmp_path_factory.mktemp("another-server") / "petals-chat.toml"
    entry = model_entry("absent", checkpoints["byte_level"], random_host, dht_prefix="held-by-nobody")
    config.write_text(CONFIGURATION + entry)
    with running_server(config) as server:
        yield server


@pytest.fixture(scope="module")
def another_http(another: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=another.url, timeout=TIMEOUT_SECONDS) as http:
        yield http


def assert_blocks_are_missing(error: dict[str, str]) -> None:
    """With the words that clients look for, below Python's traceback."""
    assert error["code"] == "missing_blocks"
    *frames, sentence = error["traceback"].splitlines()
    assert sentence.startswith("MissingBlocksError: No servers holding blocks [0, 1, 2, 3] are online")
    assert frames[0] == "Traceback (most recent call last):"
    assert any(frame.startswith('  File "') for frame in frames)


def test_missing_blocks_are_said_in_v1(another_http: httpx.Client) -> None:
    reply = another_http.post("/api/v1/generate", json={"inputs": "Hello", "max_new_tokens": 1})
    assert reply.status_code == 200
    assert_blocks_are_missing(reply.json())


def test_missing_blocks_are_said_in_v2(another: Server) -> None:
    with connect(another.v2_url) as client:
        client.send(OPEN)
        client.send('{"type": "generate", "inputs": "Hello", "max_new_tokens": 1}')
        assert receive(client) == {"ok": True}
        assert_blocks_are_missing(receive_error(client))


def test_an_error_of_the_gateway_shows_its_traceback_too(another_http: httpx.Client) -> None:
    error = another_http.post("/api/v1/generate", json={"model": "no/such", "max_new_tokens": 1}).json()
    assert error["traceback"].startswith("Traceback (most recent call last):\n")
    assert error["traceback"].splitlines()[-1].startswith("KeyError: ")


def test_a_server_whose_only_model_lacks_blocks_is_not_ready(another_http: httpx.Client) -> None:
    wait_until(lambda: another_http.get("/readyz").status_code == 503)
    assert another_http.get("/readyz").json() == {"ok": False, "models": {"absent": "broken"}}
    assert another_http.get("/healthz").json() == {"ok": True}


def test_status_shows_the_blocks_that_nobody_holds(another_http: httpx.Client) -> None:
    status = another_http.get("/api/status").json()
    assert (status["ok"], status["num_peers"], status["block_coverage"]) == (True, 0, 0.0)
    assert status["block_status"] == [{"block": block, "num_peers": 0} for block in range(4)]


@pytest.mark.parametrize(("origin", "allowed"), [(FRIEND, FRIEND), ("https://elsewhere.example", None)])
def test_only_the_origins_that_are_welcome_may_read_replies(
    another_http: httpx.Client, origin: str, allowed: str | None
) -> None:
    response = another_http.get("/healthz", headers={"Origin": origin})
    assert response.headers.get("access-control-allow-origin") == allowed
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    response = another_http.options("/api/v1/generate", headers=preflight)
    assert response.headers.get("access-control-allow-origin") == allowed


def test_websockets_of_any_origin_are_served_all_the_same(another: Server) -> None:
    with connect(another.v2_url, origin=Origin("https://elsewhere.example")) as client:
        client.send(json.dumps({"type": "open_inference_session", "max_length": 64}))
        assert receive(client) == {"ok": True}
