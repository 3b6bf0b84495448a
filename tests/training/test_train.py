"""Training for real, on a corpus and a model so small that it takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.__main__ import LocalChat, make
from training.corpus import Entry
from training.train import Recipe

ENTRIES = [
    Entry("start.run", ("how do I start it", "start it please", "what starts it"), "Run `make run`."),
    Entry("start.port", ("which port is it", "what is the port", "port number please"), "Port 5000."),
    Entry("start.stop", ("how do I stop it", "stop it please", "what stops it"), "Press Ctrl-C."),
]
RECIPE = Recipe(
    hidden_size=64, intermediate_size=128, num_heads=1, num_key_value_heads=1, steps=150, tokens_per_step=512,
    warmup_steps=10, learning_rate=4e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("guide")
    make(ENTRIES, RECIPE, directory)
    torch.set_num_threads(threads)
    return directory


def test_the_model_learns_its_corpus_and_is_a_standard_checkpoint(checkpoint: Path) -> None:
    chat = LocalChat(checkpoint)
    questions = [entry.questions[0] for entry in ENTRIES]
    assert chat.answer([[question] for question in questions]) == [entry.answer for entry in ENTRIES]
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert files <= {file.name for file in checkpoint.iterdir()}


def test_an_earlier_turn_does_not_change_the_answer(checkpoint: Path) -> None:
    chat = LocalChat(checkpoint)
    assert chat.answer([["how do I start it", "Run `make run`.", "which port is it"]]) == ["Port 5000."]
