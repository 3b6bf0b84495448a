"""How the service and its models are: for load balancers, bots, and the page. Never waits for the engine."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import quote

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.responses import PlainTextResponse, Response

from petals_chat.engine.interface import ModelState, ModelStatus, SwarmEngine
from petals_chat.errors import DeadlineExceededError, InvalidParameterError, PetalsChatError
from petals_chat.gateway.admission import Slots
from petals_chat.gateway.error_responses import ErrorReply, http_status
from petals_chat.gateway.models import ModelRegistry
from petals_chat.protocol.messages import Reachability
from petals_chat.settings import ModelSettings
from petals_chat.swarm.naming import MAX_PEER_ID_CHARS, is_peer_id
from petals_chat.swarm.state import ModelReport, SwarmState, model_report, swarm_state

RATE_WINDOW_SECONDS = 60.0
SAMPLING_PERIOD_SECONDS = 5.0
REACHABILITY_CHECKS_AT_ONCE = 8
REACHABILITY_TIMEOUT_SECONDS = 10.0
"""Workers answer sooner; this is for one that does not."""


class Health(BaseModel):
    """The process answers."""

    ok: Literal[True] = True


class Readiness(BaseModel):
    """Whether a model can answer: one that is ready, or full."""

    ok: bool
    models: dict[str, ModelState] = Field(description="The state of each model.")


class BlockStatus(BaseModel):
    """How many servers hold a transformer block."""

    block: int
    num_peers: int = Field(description="Online servers that hold it.")


class ServiceStatus(BaseModel):
    """One model's part of the swarm, as the gateway sees it."""

    ok: Literal[True] = True
    model_name: str
    state: ModelState
    missing_blocks: list[int] = Field(description="Blocks that no server holds.")
    num_peers: int = Field(description="Online servers.")
    peers: list[dict[str, Any]] = Field(description="The servers, each with the blocks [start, end).")
    block_status: list[BlockStatus]
    block_coverage: float = Field(description="The part of the blocks that is served, from 0 to 1.")
    rarest_block_servers: int = Field(description="How many servers hold the rarest block.")
    rarest_blocks: list[int] = Field(description="The blocks that so few servers hold.")
    total_blocks: int = Field(description="0 as long as the model has not been loaded.")
    open_sessions: int = Field(description="Inference sessions of all clients.")
    running_generations: int = Field(description="Sessions in which text is being generated, or waits to be.")
    resident_sessions: int = Field(description="Contexts that hold attention caches in the swarm.")
    waiting_generations: int = Field(description="Generations that wait for room in the attention caches.")
    tokens_per_second: float = Field(description="Generated for all clients, over the last minute.")
    uptime_seconds: float = Field(description="Since the gateway started.")


class ReachabilityReply(BaseModel):
    """Whether a member of the swarm answers this server."""

    success: bool
    message: str = Field(description="For people.")


class ModelList(BaseModel):
    """What the page needs to know of the models."""

    models: list[dict[str, Any]]


class TokenRate:
    """Tokens per second over the last minute, from counts that start again at 0 with each new worker.

    Workers count, and report every few seconds; so nothing has to be done for it per token here, and it does
    not matter which API a token was for.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, tokens: int) -> None:
        """Note that ``tokens`` were generated up to the time ``now`` (seconds)."""
        if self._samples and tokens < self._samples[-1][1]:
            self._samples.clear()
        if not self._samples:  # the worker began to count after the last look
            self._samples.append((now - SAMPLING_PERIOD_SECONDS, 0))
        self._samples.append((now, tokens))
        while now - self._samples[0][0] > RATE_WINDOW_SECONDS:
            self._samples.popleft()

    def per_second(self) -> float:
        """The rate; 0 as long as there is no sample."""
        if not self._samples:
            return 0.0
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended > began else 0.0


class StatusPages:
    """The endpoints. `sample_rates` must be running for ``tokens_per_second``."""

    def __init__(self, models: ModelRegistry, engine: SwarmEngine) -> None:
        self._models = models
        self._engine = engine
        self._checks = Slots(REACHABILITY_CHECKS_AT_ONCE, "checks of reachability under way")
        self._rates = {model.key: TokenRate() for model in models}
        self._started_at: float | None = None

    async def sample_rates(self) -> NoReturn:
        """Follow what the workers report."""
        loop = asyncio.get_running_loop()
        self._started_at = loop.time()
        while True:
            for key, status in self._engine.statuses.items():
                if status.report is not None:
                    self._rates[key].add(loop.time(), status.report.tokens_generated)
            await asyncio.sleep(SAMPLING_PERIOD_SECONDS)

    def router(self) -> APIRouter:
        """The routes, with their documentation."""
        router = APIRouter(tags=["Status"])
        router.add_api_route("/healthz", self.healthz, response_model=Health)
        router.add_api_route(
            "/readyz", self.readyz, response_model=Readiness, responses={503: {"model": Readiness}}
        )
        router.add_api_route(
            "/api/status",
            self.status,
            response_model=ServiceStatus,
            responses={404: {"model": ErrorReply, "description": "There is no such model."}},
        )
        router.add_api_route("/api/v1/state", self.state, response_model=SwarmState)
        failed = {"model": ReachabilityReply}
        router.add_api_route(
            "/api/v1/is_reachable/{peer_id:path}",
            self.is_reachable,
            response_model=ReachabilityReply,
            responses={
                400: {**failed, "description": "That is no peer id."},
                429: {**failed, "description": "Too many are being checked."},
                503: {**failed, "description": "No model is there to check from."},
            },
        )
        router.add_api_route("/api/models", self.list_models, response_model=ModelList)
        router.add_api_route(
            "/api/models/card",
            self.model_card,
            response_class=PlainTextResponse,
            responses={
                404: {"model": ErrorReply, "description": "There is no such model, or no card of it."}
            },
        )
        return router

    async def healthz(self) -> Response:
        """Say that the process is up."""
        return _json(Health())

    async def readyz(self) -> Response:
        """Say whether any model can answer (200) or none can (503)."""
        states = {model.key: self._engine.statuses[model.key].state for model in self._models}
        is_ready = any(state.can_answer for state in states.values())
        return _json(Readiness(ok=is_ready, models=states), 200 if is_ready else 503)

    async def status(
        self,
        model: Annotated[str | None, Query(description="Without it, the default model.")] = None,
    ) -> Response:
        """Describe a model's part of the swarm.

        Raises:
            UnknownModelError: there is no such model.
        """
        key = self._models.find(model).key
        status = self._engine.statuses[key]
        swarm = status.swarm
        served = len(swarm.block_servers) - len(swarm.missing_blocks)
        now = asyncio.get_running_loop().time()
        return _json(
            ServiceStatus(
                model_name=key,
                state=status.state,
                missing_blocks=list(swarm.missing_blocks),
                num_peers=len(swarm.online_servers),
                peers=[msgspec.to_builtins(server) for server in swarm.servers],
                block_status=[
                    BlockStatus(block=block, num_peers=count)
                    for block, count in enumerate(swarm.block_servers)
                ],
                block_coverage=served / max(1, len(swarm.block_servers)),
                total_blocks=len(swarm.block_servers),
                rarest_block_servers=swarm.rarest_block_servers,
                rarest_blocks=list(swarm.rarest_blocks),
                open_sessions=status.report.open_sessions if status.report else 0,
                running_generations=status.report.running_generations if status.report else 0,
                resident_sessions=status.report.resident_sessions if status.report else 0,
                waiting_generations=status.report.waiting_generations if status.report else 0,
                tokens_per_second=self._rates[key].per_second(),
                uptime_seconds=now - self._started_at if self._started_at is not None else 0.0,
            )
        )

    async def state(self) -> Response:
        """Describe all models with the servers of their blocks, in the shape of the public health monitor."""
        now = time.time()
        statuses = self._engine.statuses
        reports = [_report(model, statuses[model.key], now) for model in self._models]
        return _json(swarm_state([statuses[model.key].swarm for model in self._models], reports))

    async def is_reachable(self, peer_id: str) -> Response:
        """Ask a member of the swarm for a sign of life, from this server."""
        try:
            if not is_peer_id(peer_id):
                shown = peer_id[:MAX_PEER_ID_CHARS]
                raise InvalidParameterError(
                    "peer_id", f"{shown!r} is none. It is the last part of a peer's address, after /p2p/"
                )
            with self._checks.one():
                reachability = await self._check(peer_id)
        except PetalsChatError as error:
            return _json(ReachabilityReply(success=False, message=error.message), http_status(error))
        return _json(ReachabilityReply(success=reachability.is_reachable, message=reachability.message))

    async def list_models(self) -> Response:
        """List the models, the default one first, with what a chat with them needs."""
        return _json(ModelList(models=[self._describe(model) for model in self._models]))

    async def model_card(
        self,
        model: Annotated[str | None, Query(description="Without it, the default model.")] = None,
    ) -> Response:
        """Show the description of a model that is in a directory of this server.

        Raises:
            UnknownModelError: there is no such model.
        """
        file = _card_file(self._models.find(model))
        if not await asyncio.to_thread(file.is_file):
            return PlainTextResponse("This model has no card on this server.", 404)
        # As plain text it is shown as it is, whatever stands in it.
        return PlainTextResponse(await asyncio.to_thread(file.read_text, encoding="utf-8"))

    async def _check(self, peer_id: str) -> Reachability:
        try:
            async with asyncio.timeout(REACHABILITY_TIMEOUT_SECONDS):
                return await self._engine.check_reachability(peer_id)
        except TimeoutError:
            raise DeadlineExceededError(REACHABILITY_TIMEOUT_SECONDS) from None

    def _describe(self, model: ModelSettings) -> dict[str, Any]:
        status = self._engine.statuses[model.key]
        chat = model.chat.model_dump(exclude={"template"})
        limit = chat.pop("max_session_length")
        shown = model.model_dump(include={"key", "name", "family", "model_card", "license", "public_api"})
        if model.model_card is None and _card_file(model).is_file():
            shown["model_card"] = f"api/models/card?model={quote(model.key)}"  # relative to the page
        return {
            **shown,
            "default": model is self._models.default,
            "state": status.state,
            "missing_blocks": status.missing_blocks,
            "rarest_block_servers": status.swarm.rarest_block_servers,
            "rarest_blocks": status.swarm.rarest_blocks,
            "max_session_length": status.worker.max_session_length if status.worker else limit,
            "chat": chat,
        }


def _report(model: ModelSettings, status: ModelStatus, now: float) -> ModelReport:
    is_directory = model.repository.startswith(("/", ".", "~"))
    return model_report(
        status.swarm,
        status.state,
        now,
        key=model.key,
        display_name=model.name,
        hub_name=None if is_directory else model.repository,
        dht_prefix=status.worker.dht_prefix if status.worker else None,
        join_command=status.join_command,
    )


def _card_file(model: ModelSettings) -> Path:
    return Path(model.repository, "README.md")


def _json(reply: BaseModel, status_code: int = 200) -> Response:
    # By pydantic, because servers may announce an infinite throughput, which Python's own JSON refuses.
    return Response(reply.model_dump_json(), status_code, media_type="application/json")
