"""Hosts that are killed under a session: another takes over, and the greedy text is the undisturbed one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from petals_chat.engine.interface import EngineSession, ModelState
from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.errors import MissingBlocksError, SwarmUnreachableError
from petals_chat.protocol.messages import GenerationRequest
from petals_chat.settings import Dtype, EngineSettings, ModelSettings, Settings, SwarmSettings
from tests.swarm_processes import HostProcess
from tests.tiny_models import greedy_tokens, load_reference
from tests.tiny_tokenizers import save_tokenizer

TIMEOUT_SECONDS = 60
RANGES = ("0:1", "1:3", "3:4")
PROMPT = "Hello, many machines"
LONG_INPUT = " The quick brown fox jumps over the lazy dog." * 12


class Replicas:
    """Two hosts for each range of blocks; one more, without blocks of its own to lose, is not needed."""

    def __init__(self, model: Path, directory: Path) -> None:
        self._model = model
        self._directory = directory
        self._ports: dict[tuple[str, int], int] = {}
        self.hosts: dict[tuple[str, int], HostProcess] = {}
        self.peers: tuple[str, ...] = ()
        self.dht_prefix = ""

    def start(self, blocks: str, number: int) -> None:
        """Start a host, or start it again under its old name and address."""
        port = self._ports.setdefault((blocks, number), free_port())
        self.hosts[blocks, number] = HostProcess(
            self._model,
            f"--blocks={blocks}",
            f"--port={port}",
            f"--identity={self._directory / f'{port}.id'}",
            initial_peers=self.peers,
        )

    def wait_until_ready(self, blocks: str, number: int) -> None:
        ready = self.hosts[blocks, number].wait_until_ready()
        self.peers = (*self.peers, *ready.peers)[:2]
        self.dht_prefix = ready.dht_prefix

    def kill(self, blocks: str, number: int) -> None:
        self.hosts.pop((blocks, number)).release()

    def busier(self, blocks: str, before: dict[tuple[str, int], float]) -> int:
        """The replica of the range that has computed more since ``before``."""
        spent = {
            number: cpu_seconds(host) - before[of, number]
            for (of, number), host in self.hosts.items()
            if of == blocks
        }
        return max(spent, key=spent.__getitem__)

    def cpu_seconds(self) -> dict[tuple[str, int], float]:
        return {key: cpu_seconds(host) for key, host in self.hosts.items()}


@pytest.fixture(scope="module")
def replicas(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    replicas = Replicas(model, tmp_path_factory.mktemp("identities"))
    try:
        replicas.start(RANGES[0], 0)
        replicas.wait_until_ready(RANGES[0], 0)
        others = [(blocks, number) for blocks in RANGES for number in (0, 1)][1:]
        for blocks, number in others:
            replicas.start(blocks, number)
        for blocks, number in others:
            replicas.wait_until_ready(blocks, number)
        yield replicas
    finally:
        for host in replicas.hosts.values():
            host.release()


@pytest_asyncio.fixture(scope="module")
async def engine(
    model: Path, replicas: Replicas, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ProcessEngine]:
    settings = Settings(
        models=(
            ModelSettings(
                key="model",
                repository=str(model),
                name="model",
                initial_peers=replicas.peers,
                dht_prefix=replicas.dht_prefix,
            ),
        ),
        swarm=SwarmSettings(prefill_chunk_tokens=8, update_period_seconds=2, request_timeout_seconds=30),
        engine=EngineSettings(dtype=Dtype.FLOAT32, threads=1, data_dir=tmp_path_factory.mktemp("data")),
    )
    async with ProcessEngine(settings) as engine:
        await engine.wait_until_settled()
        assert engine.statuses["model"].state is ModelState.READY, engine.statuses["model"]
        yield engine


async def test_a_session_survives_the_loss_of_hosts(
    model: Path, replicas: Replicas, engine: ProcessEngine
) -> None:
    reference, tokenizer = load_reference(model), save_tokenizer("byte_level", model)

    # In decoding: in each range of the chain in turn, the middle one included, the host in use is killed.
    session = await engine.open_session("model", 2048)
    before = replicas.cpu_seconds()
    stream = session.generate(GenerationRequest(PROMPT, max_new_tokens=80, chunk_tokens=1))
    text, count = "", 0
    for number, blocks in enumerate(RANGES):
        while count < 20 * (number + 1):
            chunk = await anext(stream)
            text, count = text + chunk.text, count + chunk.token_count
        replicas.kill(blocks, replicas.busier(blocks, before))
    async for chunk in stream:
        text += chunk.text
    tokens: list[int] = tokenizer(PROMPT)["input_ids"]
    tokens += greedy_tokens(reference, tokens, 80)
    assert printable(text) == printable(tokenizer.decode(tokens)[len(PROMPT) :])

    # In prefill: the long input of a request that continues the session.
    for blocks in RANGES:
        for number in (0, 1):
            if (blocks, number) not in replicas.hosts:
                replicas.start(blocks, number)
                replicas.wait_until_ready(blocks, number)
    before = replicas.cpu_seconds()
    collecting = asyncio.create_task(collect(session, GenerationRequest(LONG_INPUT, max_new_tokens=20)))
    while cpu_total(replicas) - sum(before.values()) < 0.1:  # it has begun to compute
        await asyncio.sleep(0.01)
    replicas.kill(RANGES[1], replicas.busier(RANGES[1], before))
    assert not collecting.done()
    text = await collecting
    length = len(tokens)
    tokens += tokenizer(LONG_INPUT)["input_ids"]
    assert len(tokens) - length > 100
    before_text = tokenizer.decode(tokens)
    tokens += greedy_tokens(reference, tokens, 20)
    assert printable(text) == printable(tokenizer.decode(tokens)[len(before_text) :])

    # All are lost: the error says which blocks. They come back, and the session goes on as if nothing had been.
    for blocks, number in list(replicas.hosts):
        replicas.kill(blocks, number)
    with pytest.raises(MissingBlocksError, match="No servers holding blocks") as raised:
        await collect(session, GenerationRequest(None, max_new_tokens=1))
    assert raised.value.data["blocks"]
    replicas.peers = ()
    for blocks in RANGES:
        replicas.start(blocks, 0)
        replicas.wait_until_ready(blocks, 0)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            try:
                text = await collect(session, GenerationRequest(None, max_new_tokens=20))
                break
            except (MissingBlocksError, SwarmUnreachableError):
                await asyncio.sleep(0.5)
    before_text = tokenizer.decode(tokens)
    tokens += greedy_tokens(reference, tokens, 20)
    assert printable(text) == printable(tokenizer.decode(tokens)[len(before_text) :])
    await session.close()


async def collect(session: EngineSession, request: GenerationRequest) -> str:
    return "".join([chunk.text async for chunk in session.generate(request)])


def printable(text: str) -> str:
    """Without the half characters that a random model says, of which a stream gives fewer than a whole text."""
    return text.replace("\N{REPLACEMENT CHARACTER}", "")


def cpu_total(replicas: Replicas) -> float:
    return sum(replicas.cpu_seconds().values())


def cpu_seconds(host: HostProcess) -> float:
    times = [process.cpu_times() for process in host.family()]
    return float(sum(time.user + time.system for time in times))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
