"""The text of a stream of tokens, on tokenizers of all kinds."""

import pytest

from petals_chat.generation.detokenize import MAX_HELD_TOKENS, IncrementalDetokenizer
from tests.tiny_tokenizers import TOKENIZERS

TEXTS = [
    "Hello, how are you today?",
    " a leading space,  and two",
    "emoji 👋🏽 family 👨‍👩‍👧 flag 🇩🇪",
    "你好，世界。これは日本語です。",
    "mixed: naïve café — “quotes” … \n\n\ttabs\n",
    "###",
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["Hello", "说你好", "👋"])
def test_the_pieces_add_up_to_the_text_and_none_splits_a_character(kind: str, prompt: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    before = tokenizer(prompt)["input_ids"]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = IncrementalDetokenizer(lambda ids: str(tokenizer.decode(ids)))
    detokenizer.start_after(before)
    pieces = [detokenizer.add(token) for token in tokens]
    whole = tokenizer.decode(before + tokens)
    assert "".join(pieces) == whole[len(tokenizer.decode(before)) :]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert not detokenizer.holds_tokens


def test_special_tokens_are_part_of_the_text() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]()
    detokenizer = IncrementalDetokenizer(lambda ids: str(tokenizer.decode(ids)))
    detokenizer.start_after(tokenizer("Hello")["input_ids"])
    assert detokenizer.add(tokenizer.eos_token_id) == "</s>"


def test_a_character_cut_by_the_end_of_one_generation_comes_whole_in_the_next() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]()
    first, *others = tokenizer("👋", add_special_tokens=False)["input_ids"][1:]
    detokenizer = IncrementalDetokenizer(lambda ids: str(tokenizer.decode(ids)))
    detokenizer.start_after(tokenizer("Hello")["input_ids"])
    assert detokenizer.add(first) == ""
    assert detokenizer.holds_tokens
    assert "".join(detokenizer.add(token) for token in others) == "👋"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_that_are_no_text_are_not_held_forever(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    broken = tokenizer("👋", add_special_tokens=False)["input_ids"][-1]
    detokenizer = IncrementalDetokenizer(lambda ids: str(tokenizer.decode(ids)))
    detokenizer.start_after(tokenizer("Hello")["input_ids"])
    pieces = [detokenizer.add(broken) for _ in range(MAX_HELD_TOKENS)]
    assert pieces[-1] != ""


def test_a_session_may_begin_with_no_context() -> None:
    tokenizer = TOKENIZERS["byte_level"]()
    detokenizer = IncrementalDetokenizer(lambda ids: str(tokenizer.decode(ids)))
    detokenizer.start_after([])
    tokens = tokenizer("Hello there")["input_ids"]
    assert "".join(map(detokenizer.add, tokens)) == "Hello there"
