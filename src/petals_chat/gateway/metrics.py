"""Figures for Prometheus, taken from the workers' last reports at the moment they are asked for.

Nothing is counted here, and nothing costs anything per token. Models are the only labels: no figure tells of a client.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.responses import Response

from petals_chat.engine.interface import Engine, ModelState

_COUNTS = {
    "tokens_generated": "Tokens generated since the worker started.",
    "tokens_processed": "Tokens sent through the swarm: prompts, generated ones and replays.",
    "tokens_replayed": "Tokens sent again, because attention caches were lost, given back or outgrown.",
    "prefix_hits": "Requests that went on from the context of an earlier one.",
    "prefix_tokens": "Tokens that did not have to be processed because of that.",
    "caches_given_back": "Attention caches that made room for others, or were not used for long.",
}
_ROOMS = {
    "resident_sessions": "Contexts that hold attention caches in the swarm.",
    "waiting_generations": "Generations that wait for room in the attention caches.",
}


class Metrics(Collector):
    """The endpoint, and the collector behind it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def router(self) -> APIRouter:
        """The route, which is not part of the documented APIs."""
        router = APIRouter()
        router.add_api_route("/metrics", self.metrics, include_in_schema=False)
        return router

    async def metrics(self) -> Response:
        """All figures in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def collect(self) -> Iterator[Metric]:
        """One sample of each figure for each model."""
        states = GaugeMetricFamily(
            "petals_chat_model_state", "1 for the state that the model is in.", labels=["model", "state"]
        )
        missing = GaugeMetricFamily(
            "petals_chat_missing_blocks", "Blocks that no server of the swarm holds.", labels=["model"]
        )
        servers = GaugeMetricFamily(
            "petals_chat_servers", "Servers that hold blocks of the model.", labels=["model"]
        )
        rarest = GaugeMetricFamily(
            "petals_chat_rarest_block_servers", "Servers that hold the rarest block.", labels=["model"]
        )
        sessions = GaugeMetricFamily(
            "petals_chat_open_sessions", "Inference sessions of all clients.", labels=["model"]
        )
        running = GaugeMetricFamily(
            "petals_chat_running_generations",
            "Generations that run, or wait for their turn in a session.",
            labels=["model"],
        )
        counts = {
            name: CounterMetricFamily(f"petals_chat_{name}", text, labels=["model"])
            for name, text in _COUNTS.items()
        }
        rooms = {
            name: GaugeMetricFamily(f"petals_chat_{name}", text, labels=["model"])
            for name, text in _ROOMS.items()
        }
        for key, status in self._engine.statuses.items():
            for state in ModelState:
                states.add_metric([key, state.value], float(state is status.state))
            missing.add_metric([key], len(status.missing_blocks))
            if report := status.report:
                servers.add_metric([key], len(report.swarm.online_servers))
                rarest.add_metric([key], report.swarm.rarest_block_servers)
                sessions.add_metric([key], report.open_sessions)
                running.add_metric([key], report.running_generations)
                for name, family in (counts | rooms).items():
                    family.add_metric([key], getattr(report, name))
        yield from (states, missing, servers, rarest, sessions, running, *rooms.values(), *counts.values())
