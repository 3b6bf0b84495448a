"""Tiny checkpoints with random weights, of every family that hosts serve, and what they answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family, by how its classes in transformers begin, and what its config has beyond `_COMMON`."""

    class_prefix: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return str(getattr(transformers, f"{self.class_prefix}Config").model_type)


KINDS = {
    "llama": Kind("Llama"),
    "llama31": Kind(
        "Llama",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": Kind("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": Kind("Qwen3", {"head_dim": 32}),
    # heads of a size that hidden_size says nothing of
    "qwen3_wide_head": Kind("Qwen3", {"num_attention_heads": 8, "head_dim": 40}),
    "mistral": Kind("Mistral", {"sliding_window": 16}),
}

_COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,  # large enough for tokens to depend on each other
}


def write_tiny_model(
    directory: Path,
    kind: str,
    *,
    num_layers: int = 4,
    vocab_size: int = 512,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Write a float32 checkpoint, the same each time, and return ``directory``."""
    chosen = KINDS[kind]
    settings = {
        **_COMMON,
        "num_hidden_layers": num_layers,
        "vocab_size": vocab_size,
        **chosen.config,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model_class = getattr(transformers, f"{chosen.class_prefix}ForCausalLM")
        model = model_class(getattr(transformers, f"{chosen.class_prefix}Config")(**settings)).float()
        for name, parameter in model.named_parameters():
            if "norm" in name:  # else all ones, and no test would miss them
                parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def load_reference(directory: Path) -> Any:
    """The checkpoint as transformers runs it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def greedy_tokens(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The tokens that transformers' ``generate()`` continues ``prompt`` with."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
