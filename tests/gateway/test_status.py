"""How the service says how it is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from petals_chat.engine.interface import ModelState, ModelStatus
from petals_chat.gateway import status
from petals_chat.gateway.status import TokenRate
from petals_chat.protocol.messages import StatusReported, SwarmPeer
from petals_chat.settings import ModelSettings
from tests.fakes import status_reported, worker_started
from tests.gateway.gateways import Gateway, running_gateway, settings_with

LOADING = ModelStatus(ModelState.LOADING)


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
    peer = SwarmPeer("peer", 0, 4, "online", throughput=float("inf"))
    gateway.engine.statuses["org/model"] = ModelStatus(
        ModelState.READY, worker=worker_started(), report=StatusReported(0, 0, 0, (peer,))
    )
    assert (await get(gateway, "/api/status"))["peers"][0]["throughput"] is None


async def test_status_of_an_unknown_model_is_not_found(gateway: Gateway) -> None:
    reply = await get(gateway, "/api/status?model=no/such", 404)
    assert (reply["ok"], reply["code"]) == (False, "unknown_model")


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
        ([(0.0, 5)], 0),
        ([(0.0, 5), (5.0, 5)], 0),
        ([(0.0, 5), (5.0, 105)], 20),
        ([(0.0, 0), (5.0, 100), (10.0, 100)], 10),
        ([(0.0, 500), (5.0, 0), (10.0, 50)], 10),  # another worker
        ([(0.0, 0), (30.0, 3000), (60.0, 3000), (95.0, 3000)], 0),  # the window has moved on
        ([(0.0, 1), (0.0, 2)], 0),
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
