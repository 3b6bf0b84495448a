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
from petals.data_structures import InferenceMetadata
from petals.server.backend import TransformerBackend
from safetensors import safe_open

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import Checkpoint
from petals_chat.swarm import adapters
from petals_chat.swarm.batching import install_batching
from petals_chat.swarm.blocks import Batch, KeysValues, Piece
from petals_chat.swarm.families import head_size, key_value_heads
from petals_chat.swarm.memory_cache import AttentionCaches


def install_backend(
    checkpoint: Checkpoint, before_block: Callable[[], None], *, shares_turns: bool = True
) -> None:
    """Make Petals' server serve ``checkpoint``.

    Args:
        before_block: called before each block is loaded; what it raises stops the loading.
        shares_turns: whether tokens of different sessions are computed together.
    """

    def load_pretrained_block(
        _: str, block_index: int, *, config: Any, torch_dtype: torch.dtype, **__: Any
    ) -> torch.nn.Module:
        before_block()
        return load_block(checkpoint, block_index, config, torch_dtype)

    petals_server.load_pretrained_block = load_pretrained_block
    petals_server.TransformerBackend = SwarmBackend
    petals_server.MemoryCache = AttentionCaches
    install_batching(shares_turns=shares_turns)
    # Petals' adapters need the peft of 2023 and import bitsandbytes, with or without adapters.
    sys.modules["petals.utils.peft"] = adapters


class SwarmBackend(TransformerBackend):  # type: ignore[misc]
    """Runs the steps of one block, whose caches have other shapes than Petals', and are written in place.

    Petals 2.2 takes ``hidden_size / heads`` for the size of a head, which many families set by themselves
    (``head_dim``), keeps keys transposed, and copies a layer's whole cache for each token.
    """

    @property
    def block(self) -> Any:
        """The block itself; Petals wraps it for several devices, of which a host uses one."""
        (block,) = self.module.module_shards
        return block

    def get_inference_cache_descriptors(self, batch_size: int, max_length: int) -> Sequence[TensorDescriptor]:
        """Keys and values, each [batch, kv_heads, length, head_size]."""
        (device,) = self.module.devices
        shape = (batch_size, key_value_heads(self.config), max_length, head_size(self.config))
        return [TensorDescriptor(shape, dtype=self.dtype, device=device) for _ in KeysValues._fields]

    @torch.inference_mode()
    def inference_step(
        self, hidden_states: torch.Tensor, hypo_ids: torch.Tensor, inference_info: InferenceMetadata
    ) -> tuple[torch.Tensor]:
        """Compute a step of one session, [batch, length, hidden_size]; Petals' method of that name."""
        with (
            self.memory_cache.use_cache(*inference_info.cache_handles) as tensors,
            adapters.using_adapter(inference_info.active_adapter),
        ):
            self._reorder_cache_inplace(tensors, hypo_ids)
            cache = KeysValues(*tensors)
            start, outputs = inference_info.prefix_length, []
            # Scores of a long prompt may take more memory than there is.
            longest = self._estimate_max_chunk_length(hidden_states, inference_info)
            for chunk in torch.split(hidden_states, longest, dim=1):
                rows, length, _ = chunk.shape
                piece = Piece(start, length, room=cache.keys.shape[2], rows=rows)
                output = self.block.step(chunk.flatten(0, 1)[None], Batch([piece], chunk.device), [cache])
                outputs.append(output.view(chunk.shape))
                start += length
            return (torch.cat(outputs, dim=1),)


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
