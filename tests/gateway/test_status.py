"""How the service says how it is."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from petals_chat.engine.interface import ModelState, ModelStatus
from petals_chat.errors import ModelLoadingError
from petals_chat.gateway import status
from petals_chat.gateway.status import TokenRate
from petals_chat.protocol.messages import Reachability, StatusReported, SwarmPeer, SwarmStatus
from petals_chat.settings import ModelSettings
from petals_chat.swarm.block_map import draw
from petals_chat.swarm.state import SwarmState
from tests.fakes import FakeEngine, ready, status_reported, worker_started
from tests.gateway.gateways import Gateway, running_gateway, settings_with, until

LOADING = ModelStatus(ModelState.LOADING)
PEER_ID = "12D3KooWHQ73vpdGi26dkTMyf3zarCVW5iN7We6XvyDfDDGk9Mbz"
OLD_PEER_ID = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


async def get(gateway: Gateway, path: str, status_code: int = 200) -> Any:
    response = await gateway.http.get(path)
    assert response.status_code == status_code
    return response.json()


async def test_healthz_answers_whatever_the_models_do(gateway: Gateway) -> None:
    gateway.engine.statuses = dict.fromkeys(gateway.engine.statuses, LOADING)
    assert await get(gateway, "/healthz") == {"ok": True}


async def test_readyz_says_yes_as_soon_as_one_model_can_answer(gateway: Gateway) -> None:
    ready = gateway.engine.statuses["org/model"]
    gateway.engine.statuses = {"org/model": LOADING, "org/private": LOADING}
    states = {"org/model": "loading", "org/private": "loading"}
    assert await get(gateway, "/readyz", 503) == {"ok": False, "models": states}
    gateway.engine.statuses["org/private"] = ready
    assert await get(gateway, "/readyz") == {"ok": True, "models": {**states, "org/private": "ready"}}


async def test_a_full_model_counts_as_ready(gateway: Gateway) -> None:
    full = msgspec.structs.replace(gateway.engine.statuses["org/model"], state=ModelState.FULL)
    gateway.engine.statuses = {"org/model": full, "org/private": LOADING}
    states = {"org/model": "full", "org/private": "loading"}
    assert await get(gateway, "/readyz") == {"ok": True, "models": states}


async def test_status_describes_the_swarm_of_a_model(gateway: Gateway) -> None:
    gateway.engine.statuses["org/model"] = ModelStatus(
        ModelState.BROKEN,
        missing_blocks=(3,),
        worker=worker_started(num_blocks=4),
        report=status_reported((0, 2), (1, 3)),
    )
    reply = await get(gateway, "/api/status?model=old/name")
    assert reply["ok"] is True
    assert (reply["model_name"], reply["state"]) == ("org/model", "broken")
    assert (reply["num_peers"], reply["total_blocks"], reply["block_coverage"]) == (2, 4, 0.75)
    assert (reply["missing_blocks"], reply["rarest_block_servers"], reply["rarest_blocks"]) == ([3], 0, [3])
    assert reply["block_status"] == [
        {"block": block, "num_peers": number} for block, number in enumerate((1, 2, 1, 0))
    ]
    assert [(peer["peer_id"], peer["start"], peer["end"]) for peer in reply["peers"]] == [
        ("peer0", 0, 2),
        ("peer1", 1, 3),
    ]
    assert reply["tokens_per_second"] == 0
    assert reply["uptime_seconds"] >= 0


async def test_status_of_a_model_that_loads_has_nothing_to_say(gateway: Gateway) -> None:
    gateway.engine.statuses["org/model"] = LOADING
    reply = await get(gateway, "/api/status")
    assert (reply["total_blocks"], reply["block_coverage"], reply["peers"]) == (0, 0, [])


async def test_an_infinite_throughput_is_no_number_in_json(gateway: Gateway) -> None:
    swarm = SwarmStatus((SwarmPeer("peer", 0, 4, "online", throughput=float("inf")),), (1, 1, 1, 1))
    gateway.engine.statuses["org/model"] = ModelStatus(
        ModelState.READY, worker=worker_started(), report=StatusReported(0, 0, 0, swarm)
    )
    assert (await get(gateway, "/api/status"))["peers"][0]["throughput"] is None
    (report, _) = (await get(gateway, "/api/v1/state"))["model_reports"]
    assert report["server_rows"][0]["throughput"] is None


async def test_status_of_an_unknown_model_is_not_found(gateway: Gateway) -> None:
    reply = await get(gateway, "/api/status?model=no/such", 404)
    assert (reply["ok"], reply["code"]) == (False, "unknown_model")


async def test_the_state_has_the_shape_of_the_public_health_monitor(gateway: Gateway) -> None:
    server = SwarmPeer(
        peer_id=PEER_ID,
        start=0,
        end=2,
        state="online",
        throughput=120.5,
        inference_rps=33.0,
        forward_rps=4000.0,
        network_rps=500.0,
        public_name="Ada's machine",
        version="2.2.0.post1",
        cache_tokens_left=8192,
        torch_dtype="bfloat16",
        quant_type="nf4",
        adapters=("org/adapter",),
        using_relay=True,
        ping_seconds=0.012,
    )
    swarm = SwarmStatus((server,), (1, 1, 0), (), {PEER_ID: True, OLD_PEER_ID: False}, time.time() - 7)
    gateway.engine.statuses["org/model"] = ModelStatus(
        ModelState.BROKEN,
        missing_blocks=(2,),
        worker=worker_started(num_blocks=3),
        report=StatusReported(0, 0, 0, swarm),
        join_command="petals-chat host org/model --public",
    )
    gateway.engine.statuses["org/private"] = LOADING
    state = await get(gateway, "/api/v1/state")
    assert state["bootstrap_states"] == ["online", "unreachable"]
    assert state["last_updated"] == swarm.seen_at
    report, private = state["model_reports"]
    assert 7 <= report.pop("age_seconds") < 20
    (row,) = report.pop("server_rows")
    assert report == {
        "name": "org/model",
        "short_name": "model",
        "key": "org/model",
        "display_name": "Model",
        "repository": "https://huggingface.co/org/model",
        "state": "broken",
        "status": "broken",
        "num_blocks": 3,
        "missing_blocks": [2],
        "rarest_block_servers": 0,
        "rarest_blocks": [2],
        "dht_prefix": "model-hf",
        "join_command": "petals-chat host org/model --public",
    }
    assert row == {
        "peer_id": PEER_ID,
        "short_peer_id": "...Gk9Mbz",
        "state": "online",
        "span": {"start": 0, "end": 2},
        "public_name": "Ada's machine",
        "version": "2.2.0.post1",
        "throughput": 120.5,
        "inference_rps": 33.0,
        "forward_rps": 4000.0,
        "network_rps": 500.0,
        "cache_tokens_left": 8192,
        "torch_dtype": "bfloat16",
        "quant_type": "nf4",
        "using_relay": True,
        "adapters": ["org/adapter"],
        "ping_seconds": 0.012,
    }
    assert (private["name"], private["state"], private["status"]) == ("org/private", "broken", "loading")
    assert (private["num_blocks"], private["server_rows"], private["age_seconds"]) == (0, [], None)


async def test_a_full_model_is_healthy(gateway: Gateway) -> None:
    gateway.engine.statuses["org/model"] = msgspec.structs.replace(ready(), state=ModelState.FULL)
    report = (await get(gateway, "/api/v1/state"))["model_reports"][0]
    assert (report["state"], report["status"], report["rarest_blocks"]) == ("healthy", "full", [0, 1, 2, 3])


async def test_the_state_before_anything_was_seen_can_be_drawn(gateway: Gateway) -> None:
    gateway.engine.statuses = dict.fromkeys(gateway.engine.statuses, LOADING)
    state = await get(gateway, "/api/v1/state")
    assert (state["bootstrap_states"], state["last_updated"]) == ([], None)
    drawn = draw(SwarmState.model_validate(state), 80, has_colors=False)
    assert drawn == "Model (org/model)\nloading\n\nPrivate (org/private)\nloading"


async def test_a_directory_of_this_server_is_not_told_to_others() -> None:
    models = (ModelSettings(key="local", repository="/home/someone/model", name="Local"),)
    async with running_gateway(settings_with(models=models)) as gateway:
        report = (await get(gateway, "/api/v1/state"))["model_reports"][0]
        assert (report["name"], report["repository"]) == ("local", None)


@pytest.mark.parametrize("peer_id", [PEER_ID, OLD_PEER_ID])
async def test_a_member_of_the_swarm_is_asked_whether_it_can_be_reached(
    gateway: Gateway, peer_id: str
) -> None:
    path = f"/api/v1/is_reachable/{peer_id}"
    assert await get(gateway, path) == {"success": True, "message": "it answered within 3 ms"}
    gateway.engine.reachability = Reachability(False, "it did not answer within 5 s")
    assert await get(gateway, path) == {"success": False, "message": "it did not answer within 5 s"}
    assert gateway.engine.peers_checked == [peer_id, peer_id]


@pytest.mark.parametrize(
    "peer_id",
    [
        "hello",
        "Qm",
        f"{PEER_ID}x",
        PEER_ID[:-1],
        f"/ip4/192.0.2.1/tcp/1/p2p/{PEER_ID}",
        "%20",
        "1" * 5000,
        "é" * 46,
    ],
)
async def test_what_is_no_peer_id_is_refused(gateway: Gateway, peer_id: str) -> None:
    reply = await get(gateway, f"/api/v1/is_reachable/{peer_id}", 400)
    assert reply["success"] is False
    assert "after /p2p/" in reply["message"]
    assert len(reply["message"]) < 200
    assert gateway.engine.peers_checked == []


async def test_only_so_many_are_checked_at_once(gateway: Gateway) -> None:
    gateway.engine.may_check.clear()
    path = f"/api/v1/is_reachable/{PEER_ID}"
    checks = [asyncio.create_task(get(gateway, path)) for _ in range(status.REACHABILITY_CHECKS_AT_ONCE)]
    await until(lambda: len(gateway.engine.peers_checked) == len(checks))
    refused = await get(gateway, path, 429)
    assert (refused["success"], "checks of reachability" in refused["message"]) == (False, True)
    gateway.engine.may_check.set()
    assert all(reply["success"] for reply in await asyncio.gather(*checks))
    assert (await get(gateway, path))["success"] is True


async def test_a_check_that_nobody_answers_ends(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "REACHABILITY_TIMEOUT_SECONDS", 0.05)
    gateway.engine.may_check.clear()
    reply = await get(gateway, f"/api/v1/is_reachable/{PEER_ID}", 503)
    assert (reply["success"], "longer than" in reply["message"]) == (False, True)


async def test_without_a_model_nobody_can_be_checked() -> None:
    class LoadingEngine(FakeEngine):
        async def check_reachability(self, peer_id: str) -> Reachability:
            raise ModelLoadingError("org/model")

    async with running_gateway(engine=LoadingEngine("org/model", "org/private")) as gateway:
        reply = await get(gateway, f"/api/v1/is_reachable/{PEER_ID}", 503)
        assert (reply["success"], "still loading" in reply["message"]) == (False, True)


async def test_the_models_are_listed_with_what_a_chat_needs(gateway: Gateway) -> None:
    first, second = (await get(gateway, "/api/models"))["models"]
    assert first == {
        "key": "org/model",
        "name": "Model",
        "family": "Other",
        "model_card": None,
        "license": None,
        "public_api": True,
        "default": True,
        "state": "ready",
        "missing_blocks": [],
        "rarest_block_servers": 1,
        "rarest_blocks": [0, 1, 2, 3],
        "max_session_length": 2048,
        "chat": {
            "sep_token": "###",
            "stop_token": "###",
            "extra_stop_sequences": ["</s>"],
            "generation": {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": 0,
                "top_p": 0.9,
                "repetition_penalty": 1.0,
            },
            "sample_questions": [],
        },
    }
    assert (second["key"], second["default"], second["public_api"]) == ("org/private", False, False)


async def test_a_model_that_loads_is_listed_with_its_configured_length(gateway: Gateway) -> None:
    gateway.engine.statuses["org/model"] = LOADING
    first = (await get(gateway, "/api/models"))["models"][0]
    assert (first["state"], first["max_session_length"]) == ("loading", 8192)


async def test_the_rate_follows_the_workers_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "SAMPLING_PERIOD_SECONDS", 0.01)
    async with running_gateway() as gateway:
        started = gateway.engine.statuses["org/model"].worker
        for tokens in itertools.count(step=100):
            report = status_reported((0, 4), tokens_generated=tokens)
            gateway.engine.statuses["org/model"] = ModelStatus(
                ModelState.READY, worker=started, report=report
            )
            if (await get(gateway, "/api/status"))["tokens_per_second"] > 0:
                break


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        ([], 0),
        ([(0.0, 0)], 0),
        ([(0.0, 10)], 2),  # since the worker started
        ([(0.0, 10), (5.0, 10)], 1),
        ([(0.0, 0), (5.0, 200)], 20),
        ([(0.0, 0), (5.0, 100), (10.0, 200)], 200 / 15),
        ([(0.0, 500), (5.0, 0), (10.0, 50)], 5),  # another worker
        ([(0.0, 0), (30.0, 3000), (60.0, 3000), (95.0, 3000)], 0),  # the window has moved on
        ([(0.0, 1), (0.0, 5)], 1),
    ],
)
def test_a_rate_comes_from_the_last_minute_of_one_worker(
    samples: list[tuple[float, int]], rate: float
) -> None:
    tokens = TokenRate()
    for now, count in samples:
        tokens.add(now, count)
    assert tokens.per_second() == rate


async def test_the_readme_of_a_local_model_is_its_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A model\n\n<script>alert(1)</script>\n", encoding="utf-8")
    models = (
        ModelSettings(key="local", repository=str(tmp_path), name="Local"),
        ModelSettings(key="org/model", repository="org/model", name="Model"),
    )
    async with running_gateway(settings_with(models=models)) as gateway:
        local, other = (await get(gateway, "/api/models"))["models"]
        assert (local["model_card"], other["model_card"]) == ("api/models/card?model=local", None)
        reply = await gateway.http.get(f"/{local['model_card']}")
        assert reply.headers["content-type"] == "text/plain; charset=utf-8"
        assert reply.text.startswith("# A model")
        assert (await gateway.http.get("/api/models/card?model=org/model")).status_code == 404
        assert (await gateway.http.get("/api/models/card?model=nobody")).status_code == 404
