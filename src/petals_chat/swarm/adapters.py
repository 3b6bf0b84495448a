"""LoRA adapters on a host's blocks: many on one copy of the weights, chosen by each session.

Takes the place of ``petals.utils.peft``, whose functions these are. Adapters are PEFT repositories, or local
directories of the same content, with weights in safetensors.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open

from petals_chat.errors import ConfigurationError
from petals_chat.models.repositories import open_repository, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

AdapterConfig = dict[str, Any]
_active_adapter: contextvars.ContextVar[str] = contextvars.ContextVar("active_adapter", default="")


@contextlib.contextmanager
def using_adapter(name: str | None) -> Iterator[None]:
    """Apply the adapter ``name`` to what is computed inside; none if it is empty."""
    token = _active_adapter.set(name or "")
    try:
        yield
    finally:
        _active_adapter.reset(token)


class LoraLinear(torch.nn.Module):
    """A linear layer, quantised or not, with low-rank additions, of which the active one counts."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base
        self._additions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, name: str, down: torch.Tensor, up: torch.Tensor) -> None:
        """Add ``up @ down`` under ``name``. ``down``: [rank, in_features], ``up``: [out_features, rank]."""
        weight = next(self.base.parameters())
        dtype = (
            weight.dtype if weight.is_floating_point() else torch.bfloat16
        )  # quantised weights are integers
        self._additions[name] = down.to(weight.device, dtype), up.to(weight.device, dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the base layer makes of ``inputs``, [..., in_features], plus what the active adapter does."""
        outputs: torch.Tensor = self.base(inputs)
        if addition := self._additions.get(_active_adapter.get()):
            down, up = addition
            outputs = outputs + (inputs.to(down.dtype) @ down.T @ up.T).to(outputs.dtype)
        return outputs


def load_peft(name: str, block_idx: int, **_: Any) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """An adapter's configuration, and its tensors for one block by their names within the block.

    Raises:
        ConfigurationError: it is not to be had, or is of a kind that cannot be served.
    """
    repository = open_repository(name, None)
    config = read_json(repository.path(CONFIG_FILE))
    _require_plain_lora(name, config)
    of_block = re.compile(rf"\.(?:layers|h|blocks)\.{block_idx}\.(.+)$")
    with safe_open(repository.path(WEIGHTS_FILE), framework="pt", device="cpu") as file:
        _require_no_experts(name, file.keys())
        matches = {key: match for key in file.keys() if (match := of_block.search(key))}  # noqa: SIM118
        return config, {match.group(1): file.get_tensor(key) for key, match in matches.items()}


def create_lora_adapter(block: torch.nn.Module, quant_type: Any) -> None:
    """Petals' first step; here `add_adapter_to_block` does all."""


def add_adapter_to_block(
    block: Any, block_index: int, adapter_name: str, config: AdapterConfig, tensors: dict[str, torch.Tensor]
) -> None:
    """Put the adapter's tensors for this block beside the linear layers that they change.

    Raises:
        ConfigurationError: the block has no such layer.
    """
    (shard,) = block.module_shards
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removesuffix(".lora_A.weight")
        try:
            layer = shard.get_submodule(path)
        except AttributeError:
            layer = None
        if not isinstance(layer, torch.nn.Linear | LoraLinear):  # those of bitsandbytes are of torch's kind
            raise ConfigurationError(
                f"adapter {adapter_name}: it changes {path}, which is no linear layer of this model's blocks"
            )
        if not isinstance(layer, LoraLinear):
            parent, _, child = path.rpartition(".")
            layer = LoraLinear(layer)
            setattr(shard.get_submodule(parent), child, layer)
        layer.add(adapter_name, tensors[key], tensors[f"{path}.lora_B.weight"] * scale)


def estimate_adapter_memory_per_block(
    config: Any, dtype: torch.dtype, adapters: Sequence[str], **_: Any
) -> int:
    """Bytes that ``adapters`` take in one block."""
    values = sum(tensor.numel() for name in adapters for tensor in load_peft(name, 0)[1].values())
    return values * dtype.itemsize


def _require_plain_lora(name: str, config: AdapterConfig) -> None:
    unusual = {
        "peft_type": config.get("peft_type") != "LORA",
        "use_dora": config.get("use_dora"),
        "bias": config.get("bias", "none") != "none",
        "modules_to_save": config.get("modules_to_save"),
        "rank_pattern": config.get("rank_pattern"),
        "alpha_pattern": config.get("alpha_pattern"),
        "fan_in_fan_out": config.get("fan_in_fan_out"),
    }
    for key, is_unusual in unusual.items():
        if is_unusual:
            raise ConfigurationError(
                f"adapter {name}: {key} is {config.get(key)!r}; hosts can serve plain LoRA adapters only"
            )


def _require_no_experts(name: str, keys: Iterable[str]) -> None:
    if key := next((key for key in keys if re.search(r"\.experts\b", key)), None):
        raise ConfigurationError(
            f"adapter {name}: it changes the experts of a mixture ({key}); hosts can serve adapters of attention and "
            "of layers without experts only"
        )
