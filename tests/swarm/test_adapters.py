import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from petals_chat.errors import ConfigurationError
from petals_chat.swarm.adapters import LoraLinear, add_adapter_to_block, load_peft, using_adapter

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def write_adapter(directory: Path, config: dict[str, Any]) -> str:
    prefix = "base_model.model.model.layers"
    tensors = {
        f"{prefix}.{block}.mlp.up_proj.lora_{part}.weight": torch.full((2, 2), float(block))
        for block in (1, 11)
        for part in "AB"
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return str(directory)


def test_the_tensors_of_one_block_are_read(tmp_path: Path) -> None:
    _, tensors = load_peft(write_adapter(tmp_path, PLAIN), block_idx=1)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "mlp.up_proj.lora_A.weight": [[1, 1], [1, 1]],
        "mlp.up_proj.lora_B.weight": [[1, 1], [1, 1]],
    }


@pytest.mark.parametrize(
    "unusual",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 8}},
    ],
    ids=str,
)
def test_adapters_of_other_kinds_are_refused_by_what_is_unusual(
    tmp_path: Path, unusual: dict[str, Any]
) -> None:
    name = write_adapter(tmp_path, PLAIN | unusual)
    with pytest.raises(ConfigurationError, match=next(iter(unusual))):
        load_peft(name, block_idx=0)


def test_an_adapter_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    with pytest.raises(ConfigurationError, match=r"adapter_model\.safetensors"):
        load_peft(str(tmp_path), block_idx=0)


def test_adapters_of_experts_are_refused(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight"
    save_file({key: torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    with pytest.raises(ConfigurationError, match=r"changes the experts of a mixture \(.*experts\.3"):
        load_peft(str(tmp_path), block_idx=0)


@pytest.mark.parametrize("path", ["mlp.none", "norm"])
def test_an_adapter_that_changes_no_linear_layer_is_refused(path: str) -> None:
    shard = torch.nn.Module()
    shard.mlp, shard.norm = torch.nn.Module(), torch.nn.LayerNorm(2)
    block = torch.nn.Module()
    block.module_shards = torch.nn.ModuleList([shard])
    tensors = {f"{path}.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    with pytest.raises(ConfigurationError, match=f"adapter mine: it changes {path}"):
        add_adapter_to_block(block, 0, "mine", PLAIN, tensors)


def test_only_the_active_adapter_counts() -> None:
    layer = LoraLinear(torch.nn.Linear(2, 2, bias=False))
    layer.base.load_state_dict({"weight": torch.zeros(2, 2)})
    layer.add("ones", torch.ones(1, 2), torch.ones(2, 1))
    layer.add("twos", torch.ones(1, 2), 2 * torch.ones(2, 1))
    outputs = {}
    for name in ("", "ones", "twos"):
        with using_adapter(name), torch.inference_mode():
            outputs[name] = layer(torch.tensor([1.0, 2.0])).tolist()
    assert outputs == {"": [0, 0], "ones": [3, 3], "twos": [6, 6]}
