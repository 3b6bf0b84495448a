"""Reading what a checkpoint holds: tensors from headers, which of them the gateway needs, clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import Checkpoint, client_tensors, open_checkpoint
from petals_chat.swarm.families import supported_model_types
from tests.models.checkpoints import (
    HIDDEN_SIZE,
    LLAMA_CONFIG,
    VOCABULARY,
    llama_tensors,
    write_checkpoint,
    write_sharded_checkpoint,
)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LLAMA_SIZES = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 16, "head_dim": 4}
CONFIGURATIONS = {
    "llama": transformers.LlamaConfig(**LLAMA_SIZES),
    "llama, tied": transformers.LlamaConfig(**LLAMA_SIZES, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**LLAMA_SIZES),
    "mixtral": transformers.MixtralConfig(**LLAMA_SIZES, num_local_experts=2),
    "qwen2, tied": transformers.Qwen2Config(**LLAMA_SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**LLAMA_SIZES),
    "bloom": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN_SIZE, n_layer=2, n_head=2),
    "falcon": transformers.FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "falcon, untied": transformers.FalconConfig(**SIZES, tie_word_embeddings=False),
}


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with safe_open(checkpoint.fetch([name])[name], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


@pytest.fixture(params=CONFIGURATIONS)
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(CONFIGURATIONS[request.param])


@pytest.mark.parametrize("max_shard_size", ["1GB", "1KB"])
def test_the_tensors_found_are_those_that_transformers_uses(
    model: transformers.PreTrainedModel, max_shard_size: str, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(str(tmp_path))
    names = client_tensors(checkpoint.config, checkpoint.tensors)
    embeddings = read(checkpoint, names.embeddings)
    assert torch.equal(embeddings, model.get_input_embeddings().weight)
    assert torch.equal(read(checkpoint, names.head) if names.head else embeddings, model.lm_head.weight)
    base = model.base_model
    norm = base.norm if hasattr(base, "norm") else base.ln_f
    assert torch.equal(read(checkpoint, names.final_norm_weight), norm.weight)
    assert (names.final_norm_bias is None) == (getattr(norm, "bias", None) is None)
    assert (names.embeddings_norm_weight is None) == (not hasattr(base, "word_embeddings_layernorm"))
    assert checkpoint.num_blocks == 2


def test_a_checkpoint_of_the_bare_model_has_no_prefixes(tmp_path: Path) -> None:
    """BLOOM's own is one: it was saved without the head, and calls its sizes n_embed and n_layer."""
    bloom = transformers.BloomModel(CONFIGURATIONS["bloom"])
    bloom.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"n_embed": config.pop("hidden_size")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(tmp_path))
    names = client_tensors(checkpoint.config, checkpoint.tensors)
    assert names.embeddings == "word_embeddings.weight"
    assert names.embeddings_norm_bias == "word_embeddings_layernorm.bias"
    assert names.final_norm_bias == "ln_f.bias"
    assert names.head is None
    assert checkpoint.num_blocks == 2


def test_dtypes_shapes_and_files_come_from_the_headers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_sharded_checkpoint(tmp_path)))
    assert set(checkpoint.tensors) == set(llama_tensors())
    head = checkpoint.tensors["lm_head.weight"]
    assert (head.dtype, head.shape, head.file) == (
        "F16",
        (VOCABULARY, HIDDEN_SIZE),
        "model-00003-of-00003.safetensors",
    )
    assert head.num_elements == VOCABULARY * HIDDEN_SIZE


def test_shards_without_tensors_for_the_client_are_not_needed(tmp_path: Path) -> None:
    write_sharded_checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    checkpoint = open_checkpoint(str(tmp_path))
    names = client_tensors(checkpoint.config, checkpoint.tensors)
    files = checkpoint.fetch(names.names())
    assert {path.name for path in files.values()} == {
        "model-00001-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    }
    assert checkpoint.tensors[names.embeddings].shape == (VOCABULARY, HIDDEN_SIZE)


def test_a_head_in_the_checkpoint_is_used_even_if_the_config_ties_it() -> None:
    config = {**LLAMA_CONFIG, "tie_word_embeddings": True}
    assert client_tensors(config, llama_tensors()).head == "lm_head.weight"


def use(directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))
    names = client_tensors(checkpoint.config, checkpoint.tensors)
    checkpoint.fetch(names.names())
    for name in names.names():
        assert checkpoint.tensors[name].shape


def problem(directory: Path) -> str:
    with pytest.raises(ConfigurationError) as raised:
        use(directory)
    return raised.value.message


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert problem(tmp_path / "nowhere") == f"the model directory {tmp_path}/nowhere does not exist"


def test_a_directory_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    assert "has no config.json" in problem(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\0", "{}", '{"model_type": "llama"}'])
def test_a_broken_config_is_named(text: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in problem(tmp_path)


def test_weights_in_bin_files_only_come_with_the_way_to_convert_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert f"from_pretrained('{tmp_path}').save_pretrained(" in problem(tmp_path)


def test_no_weights_at_all_are_told_apart_from_bin_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in problem(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 20, 500, -1])
def test_a_file_cut_off_anywhere_is_reported(kept: int, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "download it again" in problem(tmp_path)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\xff" * 64, b"\x02" + bytes(7) + b"[]"])
def test_a_file_that_is_no_safetensors_is_reported(content: bytes, tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").write_bytes(content)
    assert "not a safetensors file" in problem(tmp_path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (write_checkpoint(tmp_path) / "model.safetensors").write_bytes(pointer)
    assert "git lfs pull" in problem(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded_checkpoint(tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    assert "model-00003-of-00003.safetensors is missing" in problem(tmp_path)


def test_an_index_that_is_wrong_about_a_shard_is_reported(tmp_path: Path) -> None:
    index = write_sharded_checkpoint(tmp_path) / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00003", "model-00002"))
    assert "although the index says so" in problem(tmp_path)


def test_an_index_without_a_map_is_reported(tmp_path: Path) -> None:
    (write_sharded_checkpoint(tmp_path) / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in problem(tmp_path)


def test_an_unsupported_model_type_comes_with_the_supported_ones(tmp_path: Path) -> None:
    message = problem(write_checkpoint(tmp_path, {**LLAMA_CONFIG, "model_type": "gpt2"}))
    assert "'gpt2' is not supported" in message
    assert f"supported: {', '.join(supported_model_types())}" in message


@pytest.mark.parametrize("missing", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(missing: str, tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = llama_tensors()
    del tensors[missing]
    assert f"no tensor {missing}" in problem(write_checkpoint(tmp_path, tensors=tensors))
