"""How many blocks of a model, and how large attention caches, fit into a machine or a GPU.

Sizes come from the shapes in the checkpoint's headers; weights are not read.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import psutil
import torch

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import Checkpoint
from petals_chat.swarm.families import Family, head_size
from petals_chat.swarm.host_options import Quantization
from petals_chat.swarm.sizes import say_size

DEFAULT_CACHE_TOKENS = 16384
SMALLEST_CACHE_TOKENS = 2048
"""A smaller cache than the default is chosen only if then all blocks fit, or at least one does."""
LARGEST_CACHE_TOKENS = 262144
"""A GPU that holds all blocks uses what is left for caches, up to this."""

SYSTEM_SHARE = 0.05
"""Of the memory that is free; for what changes on the machine while the host runs."""
PROCESSES_BYTES = 512 << 20
"""For the host's processes on a CPU, without blocks and caches; never more than a quarter of what is free."""
BACKWARD_BYTES_PER_HIDDEN = (2 << 30) // 14336
"""Petals' estimate of what a step backwards takes: 2 GiB for BLOOM, with hidden size 14336."""

_QUANTIZED_BYTES = {Quantization.INT8: 1.0, Quantization.NF4: 4.25 / 8}  # as Petals measured them
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """What one block takes, the largest of the model."""

    weight_bytes: int
    cache_bytes_per_token: int
    """Keys and values of one token."""

    def with_cache(self, tokens: int) -> int:
        """Bytes of a block and its caches for so many tokens."""
        return self.weight_bytes + self.cache_bytes_per_token * tokens


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a machine can hold."""

    num_blocks: int
    cache_tokens: int
    """Room of the attention caches, all sessions together."""


def block_cost(
    checkpoint: Checkpoint, family: Family, dtype: torch.dtype, quantization: Quantization
) -> BlockCost:
    """Measure the blocks, from the headers of as few files as possible."""
    config = family.transformers_class(family.config_class, "configuration").from_dict(checkpoint.config)
    # Blocks whose tensors have the same names are of the same size: of each kind one is measured.
    kinds = {frozenset(names): names for names in _tensors_by_block(checkpoint, family).values()}
    if not kinds:
        raise ConfigurationError(
            f"the checkpoint holds no blocks: no tensor is called {family.block_prefixes[0]}.0..."
        )
    weights = max(
        sum(_tensor_bytes(checkpoint, name, dtype, quantization) for name in names.values())
        for names in kinds.values()
    )
    cache = 2 * family.key_value_heads(config) * head_size(config) * dtype.itemsize
    return BlockCost(math.ceil(weights), cache)


def usable_memory(device: torch.device, hidden_size: int) -> int:
    """Bytes for blocks and caches: what is free now, less what computing takes and a margin."""
    free = _free_gpu_memory(device) if device.type == "cuda" else free_memory()
    reserve = SYSTEM_SHARE * free + BACKWARD_BYTES_PER_HIDDEN * hidden_size
    if device.type != "cuda":
        reserve += min(PROCESSES_BYTES, free // 4)
    return max(0, int(free - reserve))


def free_memory() -> int:
    """Bytes that this process may still take, without swapping and within its container."""
    free = int(psutil.virtual_memory().available)
    for limit_file, usage_file, statistics_file in _CGROUP_FILES:
        try:
            limit, usage = int(Path(limit_file).read_text()), int(Path(usage_file).read_text())
            statistics = dict(line.split() for line in Path(statistics_file).read_text().splitlines())
        except (OSError, ValueError):  # there is no limit, or no such file
            continue
        # Cached pages of files are given back when memory is needed.
        cached = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
        free = min(free, max(0, limit - usage + cached))
    return free


def fit_blocks(
    cost: BlockCost, available: int, *, wanted: int, cache_tokens: int | None, grow_cache: bool = False
) -> Fit:
    """Choose how many of ``wanted`` blocks to serve in ``available`` bytes, and the size of their caches.

    As many blocks as fit count more than large caches: with less cache than the default, down to
    `SMALLEST_CACHE_TOKENS`, a host may hold all of the blocks, or at least one.

    Args:
        cache_tokens: None = choose.
        grow_cache: use what is left beside all blocks for caches.

    Raises:
        ConfigurationError: not even one block fits.
    """
    smallest = cache_tokens or SMALLEST_CACHE_TOKENS
    tokens = cache_tokens or DEFAULT_CACHE_TOKENS
    count = available // cost.with_cache(tokens)
    if count == 0 or count < wanted <= available // cost.with_cache(smallest):
        count = min(wanted, available // cost.with_cache(smallest))
        tokens = smallest
    if count == 0:
        raise ConfigurationError(_nothing_fits(cost, smallest, available))
    count = min(count, wanted)
    if cache_tokens is None:
        left = available // count - cost.weight_bytes
        room = left // cost.cache_bytes_per_token
        largest = LARGEST_CACHE_TOKENS if grow_cache and count == wanted else DEFAULT_CACHE_TOKENS
        tokens = max(smallest, min(room, largest))
    return Fit(count, tokens)


def _tensors_by_block(checkpoint: Checkpoint, family: Family) -> dict[int, dict[str, str]]:
    """By block number: the names of its tensors, by the part behind that number."""
    blocks: dict[int, dict[str, str]] = {}
    for name in checkpoint.tensors:
        for prefix in family.block_prefixes:
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            if name.startswith(f"{prefix}.") and number.isdecimal():
                blocks.setdefault(int(number), {})[rest] = name
                break
    return blocks


def _tensor_bytes(checkpoint: Checkpoint, name: str, dtype: torch.dtype, quantization: Quantization) -> float:
    info = checkpoint.tensors[name]
    is_matrix = len(info.shape) > 1
    size = _QUANTIZED_BYTES.get(quantization, dtype.itemsize) if is_matrix else dtype.itemsize
    return info.num_elements * size


def _free_gpu_memory(device: torch.device) -> int:
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def _nothing_fits(cost: BlockCost, tokens: int, available: int) -> str:
    return (
        f"not even one block fits: it takes {say_size(cost.weight_bytes)}, with attention caches for {tokens} tokens "
        f"{say_size(cost.with_cache(tokens))}, and there are {say_size(available)} for blocks and caches. Free "
        "memory, take a machine with more of it, or on a GPU --quantization"
    )
