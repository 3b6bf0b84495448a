"""Tiny checkpoints with the tensor names of real ones, as files in a directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCABULARY, HIDDEN_SIZE = 32, 8

LLAMA_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN_SIZE,
    "vocab_size": VOCABULARY,
}


def llama_tensors() -> dict[str, np.ndarray]:
    """The client's tensors, and one of a block."""
    return {
        "model.embed_tokens.weight": np.ones((VOCABULARY, HIDDEN_SIZE), np.float16),
        "model.layers.0.self_attn.q_proj.weight": np.ones((HIDDEN_SIZE, HIDDEN_SIZE), np.float16),
        "model.norm.weight": np.ones(HIDDEN_SIZE, np.float16),
        "lm_head.weight": np.ones((VOCABULARY, HIDDEN_SIZE), np.float16),
    }


def write_checkpoint(
    directory: Path, config: Mapping[str, object] = LLAMA_CONFIG, tensors: dict[str, np.ndarray] | None = None
) -> Path:
    """A checkpoint in one file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(llama_tensors() if tensors is None else tensors, directory / "model.safetensors")
    return directory


def write_sharded_checkpoint(directory: Path) -> Path:
    """A Llama in three shards: embeddings; block; norm and head."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    tensors = llama_tensors()
    weight_map = {}
    for name in tensors:
        number = 1 if "embed" in name else 2 if "layers" in name else 3
        weight_map[name] = f"model-0000{number}-of-00003.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
