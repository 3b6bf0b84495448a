"""What is changed in Petals' server: how blocks are loaded, cached and adapted.

`install_backend` puts our parts in place of Petals' own, by assignment to the names under which
``petals.server.server`` finds them; no code of Petals is copied. `petals_chat.swarm.host` runs the server.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import petals.server.server as petals_server
import torch
from hivemind.utils.tensor_descr import TensorDescriptor
from petals.server.backend import TransformerBackend
from safetensors import safe_open

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import Checkpoint
from petals_chat.swarm import adapters
from petals_chat.swarm.blocks import KeysValues
from petals_chat.swarm.families import head_size, key_value_heads


def install_backend(checkpoint: Checkpoint, before_block: Callable[[], None]) -> None:
    """Make Petals' server serve ``checkpoint``.

    Args:
        before_block: called before each block is loaded; what it raises stops the loading.
    """

    def load_pretrained_block(
        _: str, block_index: int, *, config: Any, torch_dtype: torch.dtype, **__: Any
    ) -> torch.nn.Module:
        before_block()
        return load_block(checkpoint, block_index, config, torch_dtype)

    petals_server.load_pretrained_block = load_pretrained_block
    petals_server.TransformerBackend = SwarmBackend
    # Petals' adapters need the peft of 2023 and import bitsandbytes, with or without adapters.
    sys.modules["petals.utils.peft"] = adapters


class SwarmBackend(TransformerBackend):  # type: ignore[misc]
    """Runs the steps of one block. Petals takes ``hidden_size / heads`` for the size of a head, which many
    families set by themselves (``head_dim``); here the attention caches have the block's true size.
    """

    def get_inference_cache_descriptors(self, batch_size: int, max_length: int) -> Sequence[TensorDescriptor]:
        """Keys [batch, kv_heads, head_size, length] and values [batch, kv_heads, length, head_size]."""
        (device,) = self.module.devices
        heads, size = key_value_heads(self.config), head_size(self.config)
        return (
            TensorDescriptor((batch_size, heads, size, max_length), dtype=self.dtype, device=device),
            TensorDescriptor((batch_size, heads, max_length, size), dtype=self.dtype, device=device),
        )

    def _select_layer_past(self, cache_tensors: Sequence[torch.Tensor], prefix_length: int) -> KeysValues:
        # Petals 2.2 tells a block nothing of the session's room, by which it chooses between the frequencies of
        # short and long contexts.
        keys, values = super()._select_layer_past(cache_tensors, prefix_length)
        return KeysValues.with_room(keys, values, room=cache_tensors[1].shape[2])


def load_block(checkpoint: Checkpoint, block_index: int, config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """Block number ``block_index`` on the CPU, downloading only the files that hold it.

    Petals' own loader has its own cache of downloads, retries for ever, and tells no block its index.
    Weights that are stored in ``dtype`` stay memory-mapped.

    Raises:
        ConfigurationError: the checkpoint lacks a tensor of the block.
    """
    with torch.device("meta"):
        block: torch.nn.Module = config.block_class(config, block_index)
    parameters = (name for name, _ in block.named_parameters())
    names = config.family.tensor_names(block_index, parameters, checkpoint.tensors)
    wanted = {name: parameter for parameter, name in names.items()}
    if missing := [name for name in wanted if name not in checkpoint.tensors]:
        raise ConfigurationError(
            f"the checkpoint lacks the tensor {missing[0]}. Hosts need the model's plain weights: "
            "a copy that was quantised in advance cannot be served"
        )
    files = checkpoint.fetch(list(wanted))
    weights = {}
    for path in set(files.values()):
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in (name for name in wanted if files[name] == path):
                weights[wanted[name]] = file.get_tensor(name).to(dtype)
    block.load_state_dict(weights, assign=True)
    return block.eval()
