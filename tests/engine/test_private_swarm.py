"""A private swarm that grows and shrinks under a gateway, which is never restarted."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from petals_chat.engine.interface import ModelState
from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.errors import MissingBlocksError
from petals_chat.protocol.messages import GenerationRequest
from petals_chat.settings import Dtype, EngineSettings, ModelSettings, Settings, SwarmSettings
from petals_chat.swarm.host_options import HostReady
from tests.engine.generating import collect, text_of
from tests.swarm_processes import HostProcess
from tests.tiny_models import greedy_tokens, load_reference
from tests.tiny_tokenizers import save_tokenizer

TIMEOUT_SECONDS = 600
PROMPT = "Hello, many machines"
NEW_TOKENS = 12


@contextlib.contextmanager
def host(model: Path, *arguments: str, join: str | None = None) -> Iterator[tuple[HostProcess, HostReady]]:
    process = HostProcess(model, *arguments, join=join)
    try:
        yield process, process.wait_until_ready()
    finally:
        process.release()


@contextlib.asynccontextmanager
async def gateway(model: Path, ready: HostReady, data_dir: Path) -> AsyncIterator[ProcessEngine]:
    settings = Settings(
        models=(
            ModelSettings(
                key="model",
                repository=str(model),
                name="model",
                initial_peers=ready.peers,
                dht_prefix=ready.dht_prefix,
            ),
        ),
        swarm=SwarmSettings(update_period_seconds=2, request_timeout_seconds=30),
        engine=EngineSettings(dtype=Dtype.FLOAT32, threads=1, data_dir=data_dir),
    )
    async with ProcessEngine(settings) as engine:
        await engine.wait_until_settled()
        yield engine


async def reach(engine: ProcessEngine, state: ModelState, missing: tuple[int, ...] = ()) -> None:
    """Wait for the state and for what the worker then says of blocks."""
    while (engine.statuses["model"].state, engine.statuses["model"].missing_blocks) != (state, missing):
        await asyncio.sleep(0.1)


async def answer(engine: ProcessEngine) -> str:
    session = await engine.open_session("model", 64)
    try:
        return text_of(await collect(session, GenerationRequest(PROMPT, max_new_tokens=NEW_TOKENS)))
    finally:
        await session.close()


async def test_hosts_join_with_the_token_go_and_come_back(model: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer("byte_level", model)
    prompt: list[int] = tokenizer(PROMPT)["input_ids"]
    whole = tokenizer.decode(prompt + greedy_tokens(load_reference(model), prompt, NEW_TOKENS))
    expected = whole[len(PROMPT) :].rstrip("\N{REPLACEMENT CHARACTER}")

    async with asyncio.timeout(TIMEOUT_SECONDS):
        with host(model, "--blocks=0:2") as (starter, started):
            async with gateway(model, started, tmp_path) as engine:
                await reach(engine, ModelState.BROKEN, missing=(2, 3))
                with pytest.raises(MissingBlocksError, match=r"2.*3"):
                    await answer(engine)

                # It takes the blocks that nobody has, the next one those that fewer have.
                with host(model, "--num-blocks=2", join=started.join_token) as (_, second):
                    assert (second.start, second.end) == (2, 4)
                    await reach(engine, ModelState.READY)
                    assert (await answer(engine)).startswith(expected)

                    # Its token is of the second host: the swarm does not depend on the one that started it.
                    with host(model, "--blocks=0:2", join=second.join_token) as (replica, _):
                        starter.send(signal.SIGKILL)
                        starter.wait()
                        assert (await answer(engine)).startswith(expected)
                        await reach(engine, ModelState.READY)

                        replica.send(signal.SIGTERM)
                        assert replica.process.wait(60) == 0
                        await reach(engine, ModelState.BROKEN, missing=(0, 1))

                    with host(model, "--num-blocks=2", join=second.join_token) as (_, back):
                        assert (back.start, back.end) == (0, 2)
                        await reach(engine, ModelState.READY)
                        assert (await answer(engine)).startswith(expected)


async def test_a_model_type_that_is_not_supported_is_refused_before_the_swarm_is_joined(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt_neox", "num_hidden_layers": 2, "hidden_size": 8}')
    save_file({"weight": torch.zeros(1)}, model / "model.safetensors")
    nobody = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDf3X6jWcvvVjk4FmRsxxjNdjVzKbZBtkpph67men6VX4"
    settings = Settings(
        models=(ModelSettings(key="model", repository=str(model), name="model", initial_peers=(nobody,)),),
        engine=EngineSettings(data_dir=tmp_path),
    )
    async with asyncio.timeout(TIMEOUT_SECONDS), ProcessEngine(settings) as engine:
        await engine.wait_until_settled()
        error = engine.statuses["model"].error
    assert error is not None
    assert error.message.startswith("model type 'gpt_neox' is not supported; supported: llama, ")
