from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.swarm import memory
from petals_chat.swarm.families import family_of
from petals_chat.swarm.host_options import Quantization
from petals_chat.swarm.memory import BlockCost, Fit, block_cost, fit_blocks
from petals_chat.swarm.sizes import parse_size, say_size
from tests.tiny_models import KINDS

GIB = 1 << 30
COST = BlockCost(weight_bytes=400_000_000, cache_bytes_per_token=4096)
DEFAULT = COST.with_cache(memory.DEFAULT_CACHE_TOKENS)
SMALLEST = COST.with_cache(memory.SMALLEST_CACHE_TOKENS)


@pytest.mark.usefixtures("petals")
@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_is_what_the_largest_block_takes(tiny_model: Callable[[str], Path], kind: str) -> None:
    from petals.utils.auto_config import AutoDistributedConfig

    from petals_chat.swarm.backend import load_block
    from petals_chat.swarm.families import head_size, key_value_heads, register

    checkpoint = open_checkpoint(str(tiny_model(kind)))
    family = family_of(checkpoint.model_type)
    register(family)
    config = AutoDistributedConfig.from_pretrained(str(tiny_model(kind)))
    sizes = []
    for index in range(checkpoint.num_blocks):
        block = load_block(checkpoint, index, config, torch.bfloat16)
        sizes.append(sum(parameter.nbytes for parameter in block.parameters()))
    cost = block_cost(checkpoint, family, torch.bfloat16, Quantization.NONE)
    assert cost.weight_bytes == max(sizes)
    assert cost.cache_bytes_per_token == 2 * 2 * key_value_heads(config) * head_size(config)
    quantized = block_cost(checkpoint, family, torch.bfloat16, Quantization.INT8)
    assert 0.5 * cost.weight_bytes <= quantized.weight_bytes < 0.6 * cost.weight_bytes


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (100 * DEFAULT, Fit(32, 16384)),  # all
        (32 * DEFAULT, Fit(32, 16384)),
        (32 * SMALLEST, Fit(32, 2048)),  # all, with smaller caches
        (31 * SMALLEST, Fit(27, 16384)),  # not all: caches of the usual size
        (DEFAULT, Fit(1, 16384)),
        (SMALLEST, Fit(1, 2048)),  # one at least
        (SMALLEST + 4096 * 100, Fit(1, 2148)),
    ],
)
def test_blocks_count_more_than_caches(available: int, expected: Fit) -> None:
    assert fit_blocks(COST, available, wanted=32, cache_tokens=None) == expected


def test_caches_that_were_asked_for_are_kept() -> None:
    assert fit_blocks(COST, 20 * DEFAULT, wanted=32, cache_tokens=100_000) == Fit(11, 100_000)
    assert fit_blocks(COST, 100 * DEFAULT, wanted=32, cache_tokens=64) == Fit(32, 64)


def test_a_gpu_that_holds_all_blocks_has_larger_caches() -> None:
    assert fit_blocks(COST, 64 * DEFAULT, wanted=32, cache_tokens=None, grow_cache=True) == Fit(32, 130_424)
    assert fit_blocks(COST, 20 * DEFAULT, wanted=32, cache_tokens=None, grow_cache=True) == Fit(20, 16384)


@pytest.mark.parametrize(
    ("available", "cache_tokens"), [(0, None), (SMALLEST - 1, None), (DEFAULT - 1, 16384)]
)
def test_not_even_one_block(available: int, cache_tokens: int | None) -> None:
    with pytest.raises(
        ConfigurationError, match=r"not even one block fits: it takes 400 MB, with .* tokens 4\d\d MB"
    ):
        fit_blocks(COST, available, wanted=32, cache_tokens=cache_tokens)


def test_some_of_the_free_memory_is_left() -> None:
    free = memory.free_memory()
    usable = memory.usable_memory(torch.device("cpu"), hidden_size=128)
    assert 0 < usable < free


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("max", "current", "stat")]
    monkeypatch.setattr(memory, "_CGROUP_FILES", (tuple(map(str, files)),))
    unlimited = memory.free_memory()
    files[0].write_text("max\n")
    assert memory.free_memory() > unlimited // 2
    for file, content in zip(
        files, ("3000000\n", "2500000\n", "anon 9\ninactive_file 400000\n"), strict=True
    ):
        file.write_text(content)
    assert memory.free_memory() == 900_000


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20),
        ("8GiB", 8 * GIB),
        ("8 g", 8 * GIB),
        ("500MB", 500_000_000),
        ("1.5 kb", 1500),
        ("7b", 7),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["B", "GB", "-1GB", "0", "1e9", "1XB", "nan", "inf", "9999999TiB", "1 2"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 bytes"), (1500, "2 kB"), (450_000_000, "450 MB"), (16 * GIB, "17.2 GB")]
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert say_size(size) == text
