"""What an engine sees of its swarm while hosts come, go and die; with real hosts."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from petals_chat.engine.interface import ModelState, ModelStatus
from petals_chat.engine.supervisor import ProcessEngine, state_of_serving
from petals_chat.protocol.messages import GenerationRequest, StatusReported, SwarmPeer
from petals_chat.settings import Dtype, EngineSettings, ModelSettings, Settings, SwarmSettings
from petals_chat.swarm.host_options import HostReady
from tests.engine.generating import collect
from tests.fakes import swarm_status
from tests.swarm_processes import HostProcess

TIMEOUT_SECONDS = 60
CACHE_TOKENS = 128
STRANGER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


class Hosts:
    """Hosts of one swarm, by names; the first one begins it."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._processes: dict[str, HostProcess] = {}
        self.ready: dict[str, HostReady] = {}

    async def start(self, name: str, blocks: str) -> None:
        peers = next(iter(self.ready.values())).peers if self.ready else ()
        process = HostProcess(
            self._model,
            f"--blocks={blocks}",
            f"--name={name}",
            f"--cache-tokens={CACHE_TOKENS}",
            initial_peers=peers,
        )
        self._processes[name] = process
        self.ready[name] = await asyncio.to_thread(process.wait_until_ready)

    def kill(self, name: str) -> None:
        self._processes.pop(name).release()

    def release(self) -> None:
        for name in list(self._processes):
            self.kill(name)

    def peer_id(self, name: str) -> str:
        return self.ready[name].peers[0].rpartition("/p2p/")[2]


@pytest.fixture(scope="module")
def hosts(model: Path) -> Iterator[Hosts]:
    hosts = Hosts(model)
    try:
        yield hosts
    finally:
        hosts.release()


@pytest_asyncio.fixture(scope="module")
async def engine(
    model: Path, hosts: Hosts, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ProcessEngine]:
    """With half of the blocks."""
    await hosts.start("alpha", "0:2")
    settings = Settings(
        models=(
            ModelSettings(
                key="model",
                repository=str(model),
                name="model",
                initial_peers=hosts.ready["alpha"].peers,
                dht_prefix=hosts.ready["alpha"].dht_prefix,
            ),
        ),
        swarm=SwarmSettings(update_period_seconds=2, request_timeout_seconds=30, show_join_command=True),
        engine=EngineSettings(dtype=Dtype.FLOAT32, threads=1, data_dir=tmp_path_factory.mktemp("data")),
    )
    async with ProcessEngine(settings) as engine:
        await engine.wait_until_settled()
        yield engine


async def status_when(engine: ProcessEngine, condition: Callable[[ModelStatus], bool]) -> ModelStatus:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition(engine.statuses["model"]):
            await asyncio.sleep(0.05)
    return engine.statuses["model"]


def server(status: ModelStatus, hosts: Hosts, name: str) -> SwarmPeer:
    (found,) = [each for each in status.swarm.servers if each.peer_id == hosts.peer_id(name)]
    return found


async def survey(*arguments: str) -> Any:
    """What ``petals-chat swarm status --json`` prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "petals_chat", "swarm", "status", "--json", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    return json.loads(output)


async def test_the_state_follows_the_hosts(hosts: Hosts, engine: ProcessEngine) -> None:
    # One host with half of the blocks.
    status = await status_when(engine, lambda status: any(s.ping_seconds for s in status.swarm.servers))
    assert (status.state, status.missing_blocks) == (ModelState.BROKEN, (2, 3))
    assert status.swarm.block_servers == (1, 1, 0, 0)
    alpha = server(status, hosts, "alpha")
    assert (alpha.start, alpha.end, alpha.state, alpha.public_name) == (0, 2, "online", "alpha")
    assert (alpha.torch_dtype, alpha.quant_type, alpha.using_relay) == ("float32", "none", False)
    assert alpha.cache_tokens_left == CACHE_TOKENS
    assert (alpha.throughput, alpha.inference_rps) == (None, None)  # nobody has measured them
    assert alpha.ping_seconds is not None
    assert 0 < alpha.ping_seconds < 5
    assert status.swarm.initial_peers == {hosts.peer_id("alpha"): True}
    ready = hosts.ready["alpha"]
    assert status.join_command == (
        f"petals-chat host DIRECTORY --dht-prefix {ready.dht_prefix} --initial-peers {ready.peers[0]}"
    )

    # The other half.
    await hosts.start("beta", "2:4")
    status = await status_when(engine, lambda status: status.state is ModelState.READY)
    assert (status.swarm.rarest_block_servers, status.swarm.rarest_blocks) == (1, (0, 1, 2, 3))
    session = await engine.open_session("model", 64)
    assert await collect(session, GenerationRequest("Hello", max_new_tokens=4))

    # A replica of it.
    await hosts.start("gamma", "2:4")
    status = await status_when(engine, lambda status: status.swarm.block_servers == (1, 1, 2, 2))
    assert (status.swarm.rarest_block_servers, status.swarm.rarest_blocks) == (1, (0, 1))

    # Of two replicas one dies: no spare, but the chat goes on.
    hosts.kill("beta")
    status = await status_when(engine, lambda status: status.swarm.block_servers == (1, 1, 1, 1))
    assert status.state is ModelState.READY
    beta = server(status, hosts, "beta")
    assert (beta.state, beta.ping_seconds, beta.cache_tokens_left) == ("offline", None, None)
    assert await collect(session, GenerationRequest(None, max_new_tokens=4))
    await session.close()

    # The last one dies.
    hosts.kill("gamma")
    status = await status_when(engine, lambda status: status.state is ModelState.BROKEN)
    assert status.missing_blocks == (2, 3)

    reachable = await engine.check_reachability(hosts.peer_id("alpha"))
    assert reachable.is_reachable
    assert "answered within" in reachable.message
    gone = await engine.check_reachability(hosts.peer_id("gamma"))
    assert (gone.is_reachable, "nobody listens there" in gone.message) == (False, True)
    unknown = await engine.check_reachability(STRANGER)
    assert (unknown.is_reachable, "no member of the swarm knows" in unknown.message) == (False, True)


async def test_a_host_whose_room_is_taken_is_full_for_others_alone(
    hosts: Hosts, engine: ProcessEngine
) -> None:
    await hosts.start("delta", "2:4")
    await status_when(engine, lambda status: status.state is ModelState.READY)
    session = await engine.open_session("model", CACHE_TOKENS)
    assert await collect(session, GenerationRequest("Hello", max_new_tokens=4))
    status = await status_when(engine, lambda status: status.swarm.full_blocks == (0, 1, 2, 3))
    assert status.state is ModelState.READY  # the session makes room for whoever needs it

    for how in (["--peers", *hosts.ready["alpha"].peers], ["--join", str(hosts.ready["alpha"].join_token)]):
        state = await survey(*how)
        (report,) = state["model_reports"]
        assert (report["status"], report["state"], report["num_blocks"]) == ("full", "healthy", 4)
        rooms = {row["public_name"]: row["cache_tokens_left"] for row in report["server_rows"]}
        assert (rooms["alpha"], rooms["delta"]) == (0, 0)
        assert state["bootstrap_states"] == ["online"]

    await session.close()
    status = await status_when(engine, lambda status: not status.swarm.full_blocks)
    assert server(status, hosts, "delta").cache_tokens_left == CACHE_TOKENS


@pytest.mark.parametrize(
    ("spans", "full_blocks", "figures", "state"),
    [
        ([(0, 4)], (), {}, ModelState.READY),
        ([(0, 3)], (), {}, ModelState.BROKEN),
        ([(0, 3)], (1,), {"waiting_generations": 1}, ModelState.BROKEN),
        ([(0, 4)], (), {"running_generations": 3, "waiting_generations": 1}, ModelState.FULL),
        ([(0, 4)], (2,), {}, ModelState.FULL),
        ([(0, 4)], (2,), {"running_generations": 2, "resident_sessions": 2}, ModelState.FULL),
        ([(0, 4)], (2,), {"running_generations": 2, "resident_sessions": 3}, ModelState.READY),
    ],
)
def test_a_model_is_full_where_a_new_generation_would_wait(
    spans: list[tuple[int, int]], full_blocks: tuple[int, ...], figures: dict[str, int], state: ModelState
) -> None:
    counts = {"open_sessions": 0, "running_generations": 0, "tokens_generated": 0, **figures}
    report = StatusReported(**counts, swarm=swarm_status(*spans, full_blocks=full_blocks))
    assert state_of_serving(report) is state
