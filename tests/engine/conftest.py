"""Models with all kinds of tokenizers on two real hosts, and an engine that serves them."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.settings import ChatSettings, Dtype, EngineSettings, ModelSettings, Settings, SwarmSettings
from petals_chat.swarm.host_options import HostReady
from tests.reciting_model import build_reciting_model
from tests.swarm_processes import running_host
from tests.tiny_models import write_tiny_model
from tests.tiny_tokenizers import TOKENIZERS, save_tokenizer

PREFILL_CHUNK_TOKENS = 16
SESSION_TOKENS = 400


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that never ends by itself, for tests that start and stop hosts of their own."""
    directory = write_tiny_model(tmp_path_factory.mktemp("model"), "llama", vocab_size=400, eos_token_id=None)
    save_tokenizer("byte_level", directory)
    return directory


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By tokenizer kind: the same random weights with that tokenizer. "reciting": the model with scripts."""
    root = tmp_path_factory.mktemp("checkpoints")
    weights = write_tiny_model(root / "weights", "llama", vocab_size=400)
    directories = {}
    for kind in TOKENIZERS:
        directories[kind] = root / kind
        shutil.copytree(weights, directories[kind])
        tokenizer = save_tokenizer(kind, directories[kind])
        if kind == "byte_fallback":
            _never_answer_bytes(directories[kind], tokenizer)
    directories["reciting"] = root / "reciting"
    build_reciting_model(directories["reciting"])
    return directories


@pytest.fixture(scope="session")
def hosts(checkpoints: dict[str, Path]) -> Iterator[dict[str, HostReady]]:
    """The hosts of the random and of the reciting blocks; tokenizers share the random ones."""
    with running_host(checkpoints["byte_level"]) as random, running_host(checkpoints["reciting"]) as reciting:
        yield dict.fromkeys(TOKENIZERS, random) | {"reciting": reciting}


@pytest_asyncio.fixture(scope="session")
async def engine(
    checkpoints: dict[str, Path], hosts: dict[str, HostReady], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ProcessEngine]:
    """A worker for each checkpoint, in float32, on the running hosts."""
    settings = Settings(
        models=tuple(
            ModelSettings(
                key=kind,
                repository=str(directory),
                name=kind,
                initial_peers=hosts[kind].peers,
                dht_prefix=hosts[kind].dht_prefix,
                chat=ChatSettings(max_session_length=SESSION_TOKENS),
            )
            for kind, directory in checkpoints.items()
        ),
        swarm=SwarmSettings(prefill_chunk_tokens=PREFILL_CHUNK_TOKENS),
        engine=EngineSettings(dtype=Dtype.FLOAT32, threads=1, data_dir=tmp_path_factory.mktemp("data")),
    )
    async with ProcessEngine(settings) as engine:
        await engine.wait_until_settled()
        yield engine


def _never_answer_bytes(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Take the tokens of single bytes out of the LM head.

    A run of them decodes to characters only if all of it is valid; random ones are not, and then the text of the
    first bytes changes with the last, so that no stream of pieces can equal it.
    """
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"][[tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)]] = 0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
