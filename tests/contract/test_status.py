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


def test_the_state_shows_every_models_servers(http: httpx.Client) -> None:
    wait_until(lambda: get(http, "/api/v1/state")["model_reports"][0]["server_rows"][0]["ping_seconds"])
    state = get(http, "/api/v1/state")
    assert set(state["bootstrap_states"]) == {"online"}
    assert [report["key"] for report in state["model_reports"]] == MODELS
    for report in state["model_reports"]:
        assert (report["state"], report["status"], report["missing_blocks"]) == ("healthy", "ready", [])
        assert report["rarest_block_servers"] == 1
        assert report["rarest_blocks"] == list(range(report["num_blocks"]))
        assert report["join_command"] is None  # nobody has said that everybody may know
        assert 0 <= report["age_seconds"] < 60
        (row,) = report["server_rows"]
        assert (row["state"], row["span"]) == ("online", {"start": 0, "end": report["num_blocks"]})
        assert (row["torch_dtype"], row["using_relay"], row["throughput"]) == ("float32", False, None)
        assert row["cache_tokens_left"] >= 0
    first = state["model_reports"][0]["server_rows"][0]
    assert 0 < first["ping_seconds"] < 5


def test_a_server_of_the_swarm_can_be_asked_for_an_answer(http: httpx.Client) -> None:
    for report in get(http, "/api/v1/state")["model_reports"]:  # of two swarms
        peer_id = report["server_rows"][0]["peer_id"]
        reply = get(http, f"/api/v1/is_reachable/{peer_id}")
        assert reply["success"] is True, reply
    unknown = get(http, "/api/v1/is_reachable/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")
    assert unknown == {"success": False, "message": "no member of the swarm knows an address of it"}
    assert get(http, "/api/v1/is_reachable/word", 400)["success"] is False


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
