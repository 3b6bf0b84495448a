"""Training for real, on a corpus and a model so small that it takes seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from training.__main__ import LocalChat, make
from training.chat_format import train_tokenizer
from training.corpus import Entry
from training.dialogues import DialogueWriter
from training.train import AnswerHead, Recipe, gist_loss, learn_gist, new_model, questions

ENTRIES = [
    Entry("start.run", ("how is it started here", "start it please", "what starts it"), "Run `make run`."),
    Entry("start.port", ("which port is it", "what is the port", "port number please"), "Port 5000."),
    Entry("start.stop", ("how is it stopped here", "stop it please", "what stops it"), "Press Ctrl-C."),
]
RECIPE = Recipe(
    hidden_size=64, intermediate_size=128, num_heads=1, num_key_value_heads=1, gist_steps=60,
    questions_per_gist_step=16, steps=150, last_round_steps=50, tokens_per_step=512, warmup_steps=10,
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


def test_the_model_begins_with_the_gist_that_was_learnt() -> None:
    recipe = dataclasses.replace(RECIPE, gist_steps=3)
    tokenizer = train_tokenizer(["how is it started here", "which port is it"])
    model = new_model(recipe, tokenizer).eval()
    answers = AnswerHead(recipe.hidden_size)
    examples = questions(DialogueWriter(ENTRIES, seed=1), tokenizer, recipe)
    learn_gist(model, answers, examples, recipe)
    longest = max(next(examples), key=lambda example: len(example.token_ids))
    token_ids, is_said = torch.tensor([longest.token_ids]), torch.tensor(longest.is_said)
    with torch.inference_mode():
        hidden = model.model(token_ids).last_hidden_state[0, :-1]
        of_model = cross_entropy(model.lm_head(hidden)[is_said[1:]], token_ids[0, 1:][is_said[1:]])
        at, text = longest.answers[0]
        of_model += answers.loss(hidden[at : at + 1], [text])
        of_gist = gist_loss(model, answers, [longest], recipe)
    assert of_model.item() == pytest.approx(of_gist.item(), rel=0.02)


def test_an_earlier_turn_does_not_change_the_answer(checkpoint: Path) -> None:
    chat = LocalChat(checkpoint)
    assert chat.answer([["how is it started here", "Run `make run`.", "which port is it"]]) == ["Port 5000."]
