from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from petals_chat.errors import ConfigurationError
from petals_chat.head import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(params=["avx2 avx512_bf16 sse", "avx2 avx512_bf16x"], ids=["bfloat16 CPU", "other CPU"])
def cpu_with_bfloat16(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: fpu {request.param}\nbugs\t\t:\n")
    monkeypatch.setattr(precision, "CPU_INFO", info)
    precision.cpu_computes_bfloat16.cache_clear()
    yield request.param == "avx2 avx512_bf16 sse"
    precision.cpu_computes_bfloat16.cache_clear()


@pytest.fixture(params=[True, False], ids=["CUDA there", "no CUDA"])
def has_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return bool(request.param)


def test_auto_is_cuda_if_it_is_there(has_cuda: bool) -> None:
    assert precision.resolve_device("auto") == (CUDA if has_cuda else CPU)


def test_the_cpu_can_always_be_chosen(has_cuda: bool) -> None:
    assert precision.resolve_device("cpu") == CPU


def test_cuda_is_refused_where_there_is_none(has_cuda: bool) -> None:
    if has_cuda:
        assert precision.resolve_device("cuda") == CUDA
        return
    with pytest.raises(ConfigurationError, match="Use 'auto' or 'cpu'"):
        precision.resolve_device("cuda")


def test_on_a_cpu_auto_is_bfloat16_where_the_cpu_computes_in_it(cpu_with_bfloat16: bool) -> None:
    expected = torch.bfloat16 if cpu_with_bfloat16 else torch.float32
    assert precision.resolve_dtype("auto", CPU, torch.float16) is expected


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (None, torch.bfloat16),
    ],
)
def test_on_cuda_auto_is_the_checkpoints_own_16_bits(
    stored: torch.dtype | None, expected: torch.dtype
) -> None:
    assert precision.resolve_dtype("auto", CUDA, stored) is expected


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_chosen_precision_is_used(device: torch.device) -> None:
    assert precision.resolve_dtype("float32", device) is torch.float32
    assert precision.resolve_dtype("bfloat16", device) is torch.bfloat16


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigurationError, match="'float16' needs a GPU"):
        precision.resolve_dtype("float16", CPU)
