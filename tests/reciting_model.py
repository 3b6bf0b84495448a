"""A real Llama checkpoint whose greedy output is known beforehand.

Its blocks pass hidden states through unchanged, its embeddings are orthogonal, and its LM head answers each
token with one fixed successor. So a prompt that ends in the first token of a script is continued with that
script, token by token, by any engine that computes Llama correctly.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny_tokenizers import byte_level_tokenizer

NUM_BLOCKS = 2

SCRIPTS = {
    "A": "😀世界 machine[END] tail~",
    "B": "! Hello",
    "C": "?<|endoftext|>",
}
"""First token -> what follows. No token may occur twice, since each has one successor; the last repeats forever."""


def build_reciting_model(directory: Path) -> PreTrainedTokenizerFast:
    """Write the checkpoint and its tokenizer."""
    tokenizer = byte_level_tokenizer()
    vocab_size = len(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=512,
            intermediate_size=64,
            num_hidden_layers=NUM_BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size, 512))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, successor in _successors(tokenizer).items():
            model.lm_head.weight[successor, token] = 1.0
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return tokenizer


def script_tokens(tokenizer: PreTrainedTokenizerFast, first: str) -> list[int]:
    """The tokens that follow ``first``, one of the keys of `SCRIPTS`."""
    (start,) = tokenizer(first)["input_ids"]
    tokens: list[int] = tokenizer(first + SCRIPTS[first])["input_ids"]
    assert tokens[0] == start, "the first token must not merge with its script"
    return tokens[1:]


def _successors(tokenizer: PreTrainedTokenizerFast) -> dict[int, int]:
    successors: dict[int, int] = {}
    for first in SCRIPTS:
        token: int = tokenizer(first)["input_ids"][0]
        for successor in script_tokens(tokenizer, first):
            assert token not in successors, f"token {token} has two successors"
            successors[token] = successor
            token = successor
        successors[token] = token
    return successors
