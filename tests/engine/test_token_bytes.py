"""The bytes of a text's tokens, one by one, are the bytes of the text."""

from __future__ import annotations

import pytest

from petals_chat.engine.token_bytes import TokenBytes
from tests.tiny_tokenizers import TOKENIZERS

TEXT = " Hello, swarm 👋 of machines: 你好 é!\n"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokens_of_a_text_make_up_the_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes.of(token) for token in ids).decode().lstrip() == TEXT.lstrip()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_special_token_is_its_name(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    assert TokenBytes(tokenizer).of(tokenizer.eos_token_id) == tokenizer.eos_token.encode()


def test_a_token_that_the_tokenizer_does_not_know_has_no_bytes() -> None:
    assert TokenBytes(TOKENIZERS["byte_level"]()).of(100_000) == b""
