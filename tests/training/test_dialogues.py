"""The generator, and how its dialogues become tokens."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest
from transformers import PreTrainedTokenizerFast

from training.chat_format import END, encode, openings, text_of, train_tokenizer
from training.corpus import load_corpus
from training.dialogues import Dialogue, DialogueWriter, Turn
from training.wording import mingle, reword

DIALOGUE = Dialogue("Be kind.", (Turn("Hi?", "Hello!"), Turn("`make run`?", "Yes: `make run`.")))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([text_of(DIALOGUE)] * 3, [turn.answer for turn in DIALOGUE.turns])


def test_a_seed_gives_the_same_dialogues_always() -> None:
    entries = load_corpus()
    first = list(islice(DialogueWriter(entries, seed=1), 50))
    assert first == list(islice(DialogueWriter(entries, seed=1), 50))
    assert first != list(islice(DialogueWriter(entries, seed=2), 50))


def test_follow_ups_come_after_what_they_follow() -> None:
    entries = load_corpus()
    topic_of = {entry.answer: entry.topic for entry in entries}
    after = {entry.answer: {topic for other in entries if other.answer == entry.answer for topic in other.after}
             for entry in entries if entry.after}  # fmt: skip
    stand_alone = {entry.answer for entry in entries if not entry.after}
    for dialogue in islice(DialogueWriter(entries, seed=1), 500):
        answers = [turn.answer for turn in dialogue.turns]
        for previous, answer in zip([None, *answers], answers, strict=False):
            if answer not in stand_alone:
                assert previous is not None
                assert topic_of[previous] in after[answer] or previous in after


def test_rewording_keeps_what_is_code() -> None:
    random = Random(5)
    for _ in range(300):
        reworded = reword("What does petals-chat.toml mean for server.port?", random)
        assert re.search(r"\w", reworded)
        assert len(reworded) < 200


def test_the_chat_template_says_what_the_training_texts_say(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be kind."}]
    for turn in DIALOGUE.turns:
        messages += [
            {"role": "user", "content": turn.question},
            {"role": "assistant", "content": turn.answer},
        ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text_of(DIALOGUE)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == f"Be kind.{END}Human: Hi?{END}Assistant:"


def test_the_model_learns_to_say_answers_and_their_ends_only(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode(DIALOGUE, tokenizer)
    assert tokenizer.decode(example.token_ids) == text_of(DIALOGUE)
    said = [token for token, is_said in zip(example.token_ids, example.is_said, strict=True) if is_said]
    assert tokenizer.decode(said) == f" Hello!{END} Yes: `make run`.{END}"
    assert example.token_ids == tokenizer(text_of(DIALOGUE))["input_ids"]


def test_openings_tell_the_answers_apart() -> None:
    answers = ["Run it with make.", "Run it with care.", "Run it later, please do.", "Yes."]
    assert openings(answers) == ["Run it with make.", "Run it with care.", "Run it later,", "Yes."]
    of_corpus = sorted({entry.answer for entry in load_corpus()})
    assert len(openings(of_corpus)) == len(of_corpus)
    assert max(len(opening.split()) for opening in openings(of_corpus)) <= 7


def test_an_answer_begins_with_its_opening_as_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode(DIALOGUE, tokenizer)
    begun = [tokenizer.decode([example.token_ids[position + 1]]) for position in example.answers]
    assert begun == [" Hello!", " Yes: `make run`."]
    assert tokenizer.decode(example.begun().token_ids) == text_of(DIALOGUE).removesuffix(END)


def test_mingled_words_are_those_of_both_wordings() -> None:
    words = {"how", "do", "I", "start", "it", "what", "starts", "this"}
    mingled = {mingle("how do I start it", "what starts this", Random(seed)) for seed in range(50)}
    assert len(mingled) > 40
    assert all(set(text.split()) <= words and len(text.split()) >= 3 for text in mingled)
