"""Models with all kinds of tokenizers on two real hosts, and engines that serve them."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.settings import ChatSettings, Dtype, EngineSettings, ModelSettings, Settings, SwarmSettings
from tests.reciting_model import build_reciting_model
from tests.swarm_processes import running_host
from tests.tiny_models import build_model
from tests.tiny_tokenizers import TOKENIZERS, save_tokenizer

PREFILL_CHUNK_TOKENS = 16
SESSION_TOKENS = 256


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By tokenizer kind: the same random weights with that tokenizer; "reciting": the model with scripts."""
    root = tmp_path_factory.mktemp("checkpoints")
    weights = build_model("llama", root / "weights", vocab_size=400)
    directories = {}
    for kind in TOKENIZERS:
        directories[kind] = root / kind
        shutil.copytree(weights, directories[kind])
        save_tokenizer(kind, directories[kind])
    directories["reciting"] = root / "reciting"
    build_reciting_model(directories["reciting"])
    return directories
