"""Masks keep a text to its grammar, whatever a model would choose."""

from __future__ import annotations

import json

import pytest
import torch

from petals_chat.engine.grammars import GrammarCompiler
from petals_chat.errors import InvalidParameterError
from petals_chat.generation.sampling import TokenSampler, choose_tokens
from petals_chat.protocol.messages import SamplingParameters
from tests.tiny_tokenizers import TOKENIZERS

VOCAB_SIZE = 416
"""More logits than tokens, as many models have."""
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 30}},
    "required": ["unit", "days"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": " ?"},
}
GRAMMAR = f"start: %json {json.dumps(SCHEMA)}"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_any_logits_give_json_that_the_schema_allows(kind: str, do_sample: bool) -> None:
    tokenizer = TOKENIZERS[kind]()
    compiler = GrammarCompiler(tokenizer, {tokenizer.eos_token_id})
    parameters = SamplingParameters(do_sample=do_sample, temperature=2.0, top_p=0.95, seed=1, top_logprobs=0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        sampler = TokenSampler(parameters, VOCAB_SIZE, [], compiler.compile(GRAMMAR, VOCAB_SIZE))
        free = TokenSampler(parameters, VOCAB_SIZE, [])
        tokens: list[int] = []
        while not tokens or tokens[-1] != tokenizer.eos_token_id:
            token, _ = choose_tokens(torch.randn(2, VOCAB_SIZE, generator=generator) * 5, [sampler, free])
            sampler.add(token)
            tokens.append(token)
            assert len(tokens) < 200
        value = json.loads(tokenizer.decode(tokens[:-1]))
        assert value["unit"] in ("C", "F")
        assert 1 <= value["days"] <= 30
        assert sampler.last_logprobs is not None


def test_rows_without_a_grammar_are_left_alone() -> None:
    tokenizer = TOKENIZERS["bos"]()
    grammar = GrammarCompiler(tokenizer, {tokenizer.eos_token_id}).compile(GRAMMAR, VOCAB_SIZE)
    constrained = TokenSampler(SamplingParameters(), VOCAB_SIZE, [], grammar)
    free = TokenSampler(SamplingParameters(), VOCAB_SIZE, [])
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[:, 77] = 9.0
    first, second, third = choose_tokens(logits, [free, constrained, free])
    assert (first, third) == (77, 77)
    assert tokenizer.decode([second]).startswith("{")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: (", "Expected token"),
        ('start: %json {"type": "objekt"}', "Invalid type: objekt"),
        ('start: %json {"$ref": "file:///etc/passwd"}', "not present in a registry"),
    ],
)
def test_what_is_no_grammar_is_refused(grammar: str, reason: str) -> None:
    tokenizer = TOKENIZERS["byte_level"]()
    with pytest.raises(InvalidParameterError, match=reason) as caught:
        GrammarCompiler(tokenizer, {0}).compile(grammar, VOCAB_SIZE)
    assert caught.value.data["parameter"] == "grammar"
    assert len(caught.value.message) < 400
