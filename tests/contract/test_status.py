"""What the server says of itself and its models."""

from __future__ import annotations

from typing import Any

import httpx

from tests.contract.conftest import RECITING_SESSION_TOKENS
from tests.contract.wire import wait_until
from tests.reciting_model import NUM_BLOCKS

MODELS = ["reciting", "byte_level", "byte_fallback", "bos", "private"]


def get(http: httpx.Client, path: str, status_code: int = 200) -> Any:
    response = http.get(path)
    assert response.status_code == status_code
    assert response.headers["content-type"] == "application/json"
    return response.json()


def test_healthz_says_that_the_process_is_up(http: httpx.Client) -> None:
    assert get(http, "/healthz") == {"ok": True}


def test_readyz_says_that_a_model_can_answer(http: httpx.Client) -> None:
    assert get(http, "/readyz") == {"ok": True, "models": dict.fromkeys(MODELS, "ready")}


def test_status_has_what_bots_read(http: httpx.Client) -> None:
    status = get(http, "/api/status")
    known = ["ok", "model_name", "num_peers", "peers", "block_status", "block_coverage", "total_blocks"]
    assert {*known, "tokens_per_second", "uptime_seconds"} <= set(status)


def test_status_describes_the_default_models_swarm(http: httpx.Client) -> None:
    status = get(http, "/api/status")
    assert status["ok"] is True
    assert status["model_name"] == "reciting"
    assert (status["total_blocks"], status["block_coverage"], status["num_peers"]) == (NUM_BLOCKS, 1.0, 1)
    assert status["block_status"] == [{"block": block, "num_peers": 1} for block in range(NUM_BLOCKS)]
    (peer,) = status["peers"]
    assert (peer["start"], peer["end"], peer["state"]) == (0, NUM_BLOCKS, "online")
    assert isinstance(peer["peer_id"], str)
    assert status["uptime_seconds"] > 0


def test_status_describes_each_model_by_key_and_alias(http: httpx.Client) -> None:
    assert [get(http, f"/api/status?model={model}")["model_name"] for model in MODELS] == MODELS
    assert get(http, "/api/status?model=old/name")["model_name"] == "reciting"


def test_status_of_an_unknown_model_is_not_found(http: httpx.Client) -> None:
    error = get(http, "/api/status?model=no/such", 404)
    assert (error["ok"], error["code"]) == (False, "unknown_model")


def test_status_counts_the_tokens_of_the_last_minute(http: httpx.Client) -> None:
    http.post("/api/v1/generate", json={"inputs": "B", "max_new_tokens": 50})
    wait_until(lambda: get(http, "/api/status")["tokens_per_second"] > 0)


def test_the_models_are_listed_with_their_limits(http: httpx.Client) -> None:
    models = get(http, "/api/models")["models"]
    assert [model["key"] for model in models] == MODELS
    assert [model["default"] for model in models] == [True, False, False, False, False]
    assert [model["public_api"] for model in models] == [True, True, True, True, False]
    assert models[0]["max_session_length"] == RECITING_SESSION_TOKENS


def test_the_documentation_for_programs_describes_v1(http: httpx.Client) -> None:
    assert http.get("/docs").status_code == 200
    paths = get(http, "/openapi.json")["paths"]
    assert {"/api/v1/generate", "/api/v1/open_inference_session", "/healthz", "/api/status"} <= set(paths)
