"""Models that are made for the benchmark: real sizes where the gateway computes, next to nothing in the swarm.

Random weights in bfloat16, one thin block, and a tokenizer whose tokens are words: a prompt of n words is a prompt
of n tokens.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

_HEAD_SIZE = 64
_INTERMEDIATE_SIZE = 64
_SEED = 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with one block, which has one attention head and a small MLP."""

    name: str
    hidden_size: int
    vocab_size: int
    context_tokens: int


LARGE = Shape("large", hidden_size=8192, vocab_size=32000, context_tokens=4096)
"""A 70B Llama 2 as the gateway's machine sees it: embeddings and LM head of 500 MB each."""

LONG = Shape("long", hidden_size=2048, vocab_size=8000, context_tokens=8192)
"""Small, with room for long contexts."""

SMALL = Shape("small", hidden_size=_HEAD_SIZE, vocab_size=2000, context_tokens=2048)
"""Its attention caches have the size by which Petals counts: of a head as large as the hidden state."""


def write_model(directory: Path, shape: Shape) -> Path:
    """Write a checkpoint and its tokenizer into ``directory``; returns it."""
    directory.mkdir(parents=True)
    save_file(_weights(shape), directory / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(shape.vocab_size).save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.hidden_size,
            "intermediate_size": _INTERMEDIATE_SIZE,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": _HEAD_SIZE,
            "max_position_embeddings": shape.context_tokens,
            "rms_norm_eps": 1e-5,
            "vocab_size": shape.vocab_size,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        },
    )
    return directory


def prompt(tokens: int) -> str:
    """A prompt of so many words."""
    return " ".join(f"w{100 + index % 900}" for index in range(tokens))


def _weights(shape: Shape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(_SEED)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weights = torch.empty(rows, columns, dtype=torch.bfloat16)
        return weights.normal_(std=columns**-0.5, generator=generator)

    ones = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    block = "model.layers.0."
    return {
        "model.embed_tokens.weight": matrix(shape.vocab_size, shape.hidden_size),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(shape.vocab_size, shape.hidden_size),
        block + "input_layernorm.weight": ones.clone(),
        block + "post_attention_layernorm.weight": ones.clone(),
        block + "self_attn.q_proj.weight": matrix(_HEAD_SIZE, shape.hidden_size),
        block + "self_attn.k_proj.weight": matrix(_HEAD_SIZE, shape.hidden_size),
        block + "self_attn.v_proj.weight": matrix(_HEAD_SIZE, shape.hidden_size),
        block + "self_attn.o_proj.weight": matrix(shape.hidden_size, _HEAD_SIZE),
        block + "mlp.gate_proj.weight": matrix(_INTERMEDIATE_SIZE, shape.hidden_size),
        block + "mlp.up_proj.weight": matrix(_INTERMEDIATE_SIZE, shape.hidden_size),
        block + "mlp.down_proj.weight": matrix(shape.hidden_size, _INTERMEDIATE_SIZE),
    }


def _tokenizer(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({f"w{index}": index for index in range(vocab_size)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
