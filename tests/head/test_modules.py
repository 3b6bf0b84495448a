"""The gateway's share of a model computes what transformers' whole model computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Gemma2Config

from petals_chat.errors import ConfigurationError
from petals_chat.head import modules as modules_module
from petals_chat.head.modules import load_client_modules
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.swarm.families import supported_model_types
from tests.tiny_models import KINDS

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in KINDS},
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2, rough": ("qwen2", {"rms_norm_eps": 1e-3}),
    "falcon, tied": ("falcon_180b", {"tie_word_embeddings": True}),
}
"""Kinds of tiny models, and what is changed in them."""
TOKENS = [1, 7, 299, 7, 42]
CPU = torch.device("cpu")


def build(name: str, dtype: torch.dtype) -> Any:
    kind, changes = MODELS[name]
    return KINDS[kind].make_model(num_hidden_layers=2, vocab_size=300, **changes).to(dtype)


def test_every_model_type_that_hosts_serve_has_a_model_here() -> None:
    assert {KINDS[kind].model_type for kind, _ in MODELS.values()} == set(supported_model_types())


@pytest.mark.parametrize(("dtype", "max_shard_size"), [(torch.float32, "1GB"), (torch.bfloat16, "60KB")])
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_logits_equal_those_of_transformers(
    name: str, dtype: torch.dtype, max_shard_size: str, tmp_path: Path
) -> None:
    model = build(name, dtype)
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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096}, 4096),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64}}, 64),
        ({"rope_scaling": None, "original_max_position_embeddings": 4096}, None),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None),
    ],
    ids=["first Phi-3", "transformers 5", "without LongRoPE", "another rope"],
)
def test_the_length_of_short_contexts_is_found_in_old_and_new_configurations(
    tmp_path: Path, config: dict[str, Any], expected: int | None
) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    everything = {"model_type": "phi3", "num_hidden_layers": 1, **config}
    (tmp_path / "config.json").write_text(json.dumps(everything))
    assert open_checkpoint(str(tmp_path), None).short_context == expected


def test_gemma_2_caps_logits_also_where_its_configuration_is_silent(tmp_path: Path) -> None:
    build("gemma2", torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["final_logit_softcapping"]
    path.write_text(json.dumps(config))
    modules = load_client_modules(open_checkpoint(str(tmp_path), None), device=CPU, dtype=torch.float32)
    assert modules.logit_cap == Gemma2Config().final_logit_softcapping


@pytest.mark.parametrize(
    ("name", "value"),
    [("rms_norm_eps", "1e-6"), ("final_logit_softcapping", "30"), ("final_logit_softcapping", 0)],
)
def test_numbers_in_the_configuration_that_cannot_be_are_refused_by_name(
    tmp_path: Path, name: str, value: object
) -> None:
    build("gemma2", torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    checkpoint = open_checkpoint(str(tmp_path), None)
    with pytest.raises(ConfigurationError, match=f"{'epsilon' if 'eps' in name else name} must be a number"):
        load_client_modules(checkpoint, device=CPU, dtype=torch.float32)


def test_weights_in_their_own_precision_stay_mapped_from_the_file(tmp_path: Path) -> None:
    build("llama", torch.bfloat16).save_pretrained(tmp_path)
    modules = load_client_modules(open_checkpoint(str(tmp_path), None), device=CPU, dtype=torch.bfloat16)
    mapped = Path("/proc/self/maps").read_text().splitlines()
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in mapped
        if str(tmp_path / "model.safetensors") in line
    ]
    for tensor in (modules.embeddings, modules.head):
        assert any(start <= tensor.data_ptr() < end for start, end in ranges)


@pytest.mark.parametrize("name", MODELS)
def test_16_bit_weights_may_stay_as_they_are_where_this_computes_in_float32(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules_module, "HEAD_BLOCK", 64)  # 300 rows in 5 blocks
    build(name, torch.bfloat16).save_pretrained(tmp_path)
    model = build(name, torch.float32).from_pretrained(tmp_path, dtype=torch.float32)
    modules = load_client_modules(open_checkpoint(str(tmp_path), None), device=CPU, dtype=torch.float32)
    assert modules.embeddings.dtype is modules.head.dtype is torch.bfloat16
    assert modules.dtype is torch.float32
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    outputs: list[torch.Tensor] = []
    blocks[-1].register_forward_hook(
        lambda _, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
        assert modules.embed(TOKENS).dtype is torch.float32
        logits = modules.logits(outputs[0].reshape(len(TOKENS), -1))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_without_the_tensors_is_refused_with_their_names(tmp_path: Path) -> None:
    KINDS["llama"].make_config().save_pretrained(tmp_path)
    save_file({"model.embed_tokens.weight": torch.zeros(300, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="lm_head"):
        load_client_modules(open_checkpoint(str(tmp_path), None), device=CPU, dtype=torch.float32)
