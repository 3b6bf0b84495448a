"""The gateway's share of a model computes what transformers' whole model computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from petals_chat.errors import ConfigurationError
from petals_chat.head.modules import load_client_modules
from petals_chat.models.checkpoint import open_checkpoint

SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64}
LLAMA_LIKE: dict[str, Any] = {
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, **LLAMA_LIKE),
    "llama, tied": LlamaConfig(**SMALL, **LLAMA_LIKE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, **LLAMA_LIKE, rms_norm_eps=1e-3),
    "bloom": BloomConfig(**SMALL, n_layer=2, n_head=4),
    "falcon": FalconConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4),
    "falcon, untied": FalconConfig(
        **SMALL, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=False
    ),
}
TOKENS = [1, 7, 299, 7, 42]
CPU = torch.device("cpu")


def build(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
def test_embeddings_and_logits_equal_those_of_transformers(
    name: str, dtype: torch.dtype, max_shard_size: str, tmp_path: Path
) -> None:
    model = build(CONFIGS[name], dtype)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    block_inputs: list[torch.Tensor] = []
    block_outputs: list[torch.Tensor] = []
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: block_inputs.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    blocks[-1].register_forward_hook(
        lambda _, args, output: block_outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].float()
        modules = load_client_modules(open_checkpoint(str(tmp_path), None), device=CPU, dtype=dtype)
        assert torch.equal(modules.embed(TOKENS), block_inputs[0])
        logits = modules.logits(block_outputs[0].reshape(len(TOKENS), -1))
    assert modules.vocab_size == 300
    if dtype is torch.float32:
        assert torch.allclose(logits, expected, atol=1e-5)
    else:
        assert torch.equal(logits, expected)


def test_weights_in_their_own_precision_stay_mapped_from_the_file(tmp_path: Path) -> None:
    build(CONFIGS["llama"], torch.bfloat16).save_pretrained(tmp_path)
    modules = load_client_modules(open_checkpoint(str(tmp_path), None), device=CPU, dtype=torch.bfloat16)
    mapped = Path("/proc/self/maps").read_text().splitlines()
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in mapped
        if str(tmp_path / "model.safetensors") in line
    ]
    for tensor in (modules.embeddings, modules.head):
        assert any(start <= tensor.data_ptr() < end for start, end in ranges)


def test_a_checkpoint_without_the_tensors_is_refused_with_their_names(tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    save_file({"model.embed_tokens.weight": torch.zeros(300, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="lm_head"):
        load_client_modules(open_checkpoint(str(tmp_path), None), device=CPU, dtype=torch.float32)
