"""The figures for Prometheus."""

from prometheus_client.parser import text_string_to_metric_families

from petals_chat.engine.interface import ModelState, ModelStatus
from tests.fakes import status_reported, worker_started
from tests.gateway.gateways import Gateway


async def test_each_model_has_its_figures(gateway: Gateway) -> None:
    gateway.engine.statuses["org/model"] = ModelStatus(
        ModelState.BROKEN,
        missing_blocks=(3,),
        worker=worker_started(num_blocks=4),
        report=status_reported((0, 2), (1, 3), tokens_generated=7),
    )
    gateway.engine.statuses["org/private"] = ModelStatus(ModelState.LOADING)
    response = await gateway.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    figures = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert figures["petals_chat_model_state", "org/model", "broken"] == 1
    assert figures["petals_chat_model_state", "org/model", "ready"] == 0
    assert figures["petals_chat_model_state", "org/private", "loading"] == 1
    assert figures["petals_chat_missing_blocks", "org/model"] == 1
    assert figures["petals_chat_servers", "org/model"] == 2
    assert figures["petals_chat_tokens_generated_total", "org/model"] == 7
    assert ("petals_chat_servers", "org/private") not in figures
