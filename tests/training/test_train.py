"""Training for real, on a corpus and a model so small that it takes seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from training.__main__ import LocalChat, make
from training.chat_format import encode, train_tokenizer
from training.corpus import Entry
from training.dialogues import Dialogue, DialogueWriter, Turn
from training.train import HIDDEN_SIZE, Lessons, Recipe, loss_of, new_model, train
from training.wiring import CODES, IN_ANSWER, IN_QUESTION, MARK, RESERVED, embeddings, wire

ENTRIES = [
    Entry(
        "start.run",
        ("how is it started here", "start it please", "what starts it"),
        "Run `make run` in the directory of the program, and wait for it.",
    ),
    Entry(
        "start.port",
        ("which port is it", "what is the port", "port number please"),
        "Port 5000 is the one that the program listens on, always.",
    ),
    Entry(
        "start.stop",
        ("how is it stopped here", "stop it please", "what stops it"),
        "Press Ctrl-C in the terminal in which the program was started.",
    ),
]
RECIPE = Recipe(
    intermediate_size=128,
    num_blocks=4,
    steps=120,
    tokens_per_step=512,
    whole_share=0.5,
    warmup_steps=10,
)
RUN, PORT, _ = (entry.answer for entry in ENTRIES)
TWO_TURNS = Dialogue("Be kind.", (Turn("which port is it", PORT), Turn("how is it started here", RUN)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("guide")
    make(ENTRIES, RECIPE, directory)
    torch.set_num_threads(threads)
    return directory


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(
        ["how is it started here", "which port is it"], [entry.answer for entry in ENTRIES]
    )


def test_the_model_learns_its_corpus_and_is_a_standard_checkpoint(checkpoint: Path) -> None:
    chat = LocalChat(checkpoint)
    questions = [entry.questions[0] for entry in ENTRIES]
    assert chat.answer([[question] for question in questions]) == [entry.answer for entry in ENTRIES]
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert files <= {file.name for file in checkpoint.iterdir()}


def test_an_earlier_turn_does_not_change_the_answer(checkpoint: Path) -> None:
    chat = LocalChat(checkpoint)
    assert chat.answer([["how is it started here", RUN, "which port is it"]]) == [PORT]


@pytest.fixture(scope="module")
def lessons(tokenizer: PreTrainedTokenizerFast) -> Lessons:
    return Lessons(DialogueWriter(ENTRIES, seed=1), tokenizer, frozenset())


def test_what_is_trained_is_what_the_model_computes(lessons: Lessons) -> None:
    """Training computes only parts of the blocks; the model computes them all, and comes to the same."""
    model = new_model(RECIPE, lessons.tokenizer).eval()
    train(model, lessons, dataclasses.replace(RECIPE, steps=3))
    example = encode(TWO_TURNS, lessons.tokenizer)
    token_ids, is_said = torch.tensor(example.token_ids), torch.tensor(example.is_said)
    is_opening = torch.zeros_like(is_said)
    is_opening[[position + 1 for position in example.answers]] = True
    with torch.inference_mode():
        losses = cross_entropy(model(token_ids[None]).logits[0, :-1], token_ids[1:], reduction="none")
        of_model = losses[is_opening[1:]].mean() + losses[(is_said & ~is_opening)[1:]].mean()
        of_training = loss_of(model, model.model.embed_tokens.weight, [example], lessons.margins(0))
    assert of_model.item() == pytest.approx(of_training.item(), rel=0.02)


def test_refusals_have_to_be_learnt_better(lessons: Lessons) -> None:
    margins = Lessons(lessons.writer, lessons.tokenizer, frozenset([PORT])).margins(2)
    assert margins.nonzero().tolist() == [lessons.tokenizer.encode(" Port 5000 is")]
    assert margins.max() == 2


def test_tokens_know_whether_they_are_part_of_a_question_or_of_an_answer(lessons: Lessons) -> None:
    example = encode(TWO_TURNS, lessons.tokenizer)
    states = wired_first_block(lessons, example.token_ids)
    system = len(lessons.tokenizer.encode("Be kind.<|end|>"))
    assert states[:system, [IN_QUESTION, IN_ANSWER]].abs().max() < 0.01
    assert (states[system:, IN_ANSWER] > MARK / 2).tolist() == [
        is_said or position in example.answers for position, is_said in enumerate(example.is_said)
    ][system:]


def test_tokens_know_the_opening_and_the_two_tokens_before(lessons: Lessons) -> None:
    example = encode(TWO_TURNS, lessons.tokenizer)
    states = wired_first_block(lessons, example.token_ids)
    opening, before, before_that = CODES
    first, second = example.answers
    of_first, of_second = states[first + 1 : second, opening], states[second + 1 :, opening]
    assert (of_first - of_first[0]).abs().max() < 0.05
    assert (of_second - of_second[0]).abs().max() < 0.05
    assert (of_first[0] - of_second[0]).abs().max() > 0.5
    for code, distance in ((before, 1), (before_that, 2)):
        codes: dict[int, torch.Tensor] = {}
        for place in range(2, len(example.token_ids)):
            seen = codes.setdefault(example.token_ids[place - distance], states[place, code])
            assert (states[place, code] - seen).abs().max() < 0.05
        assert len({tuple(values.tolist()) for values in codes.values()}) == len(codes)


def wired_first_block(lessons: Lessons, token_ids: list[int]) -> torch.Tensor:
    """The states after the first block of a model that has learnt nothing, [length, hidden_size]."""
    model = new_model(RECIPE, lessons.tokenizer).eval()
    wire(model)
    words = torch.randn(model.config.vocab_size, HIDDEN_SIZE - RESERVED)
    with torch.inference_mode():
        model.model.embed_tokens.weight.copy_(embeddings(words, lessons.marked_tokens))
        states: torch.Tensor = model.model(
            torch.tensor([token_ids]), output_hidden_states=True
        ).hidden_states[1][0]
    return states
