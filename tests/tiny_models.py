"""Tiny checkpoints with random weights, of every family that hosts serve, and what they answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

_COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,  # large enough for tokens to depend on each other
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family, by how its classes in transformers begin, and what its config has beyond `_COMMON`."""

    class_prefix: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    config_class: str = "Config"

    def make_config(self, **config: Any) -> transformers.PretrainedConfig:
        """The kind's configuration with these changes."""
        make = getattr(transformers, self.class_prefix + self.config_class)
        made: transformers.PretrainedConfig = make(**{**_COMMON, **self.config, **config})
        return made

    def make_model(self, **config: Any) -> Any:
        """A float32 model with random weights, the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = getattr(transformers, f"{self.class_prefix}ForCausalLM")(self.make_config(**config))
            for name, parameter in model.float().named_parameters():
                if parameter.dim() == 1:  # else ones or zeros, and no test would miss them
                    is_offset = name.endswith("bias") or self.class_prefix.startswith("Gemma")
                    parameter.data.uniform_(0.5 - is_offset, 1.5 - is_offset)
        return model.eval()

    @property
    def model_type(self) -> str:
        return str(getattr(transformers, self.class_prefix + self.config_class).model_type)


_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * index for index in range(12)],
    "long_factor": [2.0 + 0.5 * index for index in range(12)],
}
_GEMMA = {
    "tie_word_embeddings": True,
    "head_dim": 40,
    "query_pre_attn_scalar": 64,
    "sliding_window": 16,
}

KINDS = {
    "llama": Kind("Llama"),
    "llama31": Kind("Llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA31_ROPE}),
    "mistral": Kind("Mistral", {"sliding_window": 16}),
    "mixtral": Kind("Mixtral", {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Kind("Qwen2", {"tie_word_embeddings": True}),
    # its first layers see everything, the others through a window
    "qwen2_mixed": Kind("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3": Kind("Qwen3", {"head_dim": 32}),
    # heads of a size that hidden_size says nothing of
    "qwen3_wide_head": Kind("Qwen3", {"num_attention_heads": 8, "head_dim": 40}),
    "qwen3_moe": Kind(
        "Qwen3Moe",
        {
            "head_dim": 40,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    # caps small enough to change what they cap
    "gemma2": Kind("Gemma2", {**_GEMMA, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}),
    "gemma3": Kind(
        "Gemma3",
        {
            **_GEMMA,
            "sliding_window_pattern": 3,  # the third layer sees everything
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        config_class="TextConfig",
    ),
    "phi3": Kind(
        "Phi3", {"pad_token_id": 0, "eos_token_id": None, "sliding_window": 16, "partial_rotary_factor": 0.75}
    ),
    "phi3_long": Kind(
        "Phi3",
        {
            "pad_token_id": 0,
            "eos_token_id": None,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "rope_scaling": _LONGROPE,
        },
    ),
    # as many heads as no power of two has, for which the biases have a rule of their own
    "bloom": Kind("Bloom", {"hidden_size": 120, "num_attention_heads": 6, "tie_word_embeddings": True}),
    "falcon_7b": Kind("Falcon", {"multi_query": True, "tie_word_embeddings": True}),
    "falcon_rw": Kind("Falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon_11b": Kind(
        "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
    ),
    "falcon_180b": Kind("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
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
    model = KINDS[kind].make_model(num_hidden_layers=num_layers, vocab_size=vocab_size, **config)
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


def make_it_end(directory: Path, *, quote: int, brackets: Sequence[int], end: int) -> None:
    """Change a checkpoint so that it closes what it opens, and ends a text, by construction.

    Two numbers of each hidden state are set by the embeddings, so high that no block changes them much: the first one
    always, the second one after a quote. By the first the LM head prefers quotes, then brackets; by the second, the
    end. So its plain text is a quote, and its JSON, where a grammar allows no end, has the shortest texts and numbers.

    Args:
        quote: token id of the quote.
        brackets: token ids of the brackets that close, of which the first is preferred.
        end: token id that ends a text.
    """
    high = 40.0
    weights = load_file(directory / "model.safetensors")
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embeddings[:, 0], embeddings[:, 1], embeddings[quote, 1] = high, 0.0, high
    weights["model.norm.weight"][:2] = 1.0
    head[:, :2] = 0.0
    head[end] = 0.0
    head[end, 1] = 20.0
    for preference, token in enumerate((quote, *brackets)):
        head[token, 0] = 8.0 - 2.0 * preference
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
