"""Where to compute and in which precision: the one rule of workers and hosts.

Knows this machine's hardware; knows nothing of models but the precision of their checkpoint.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

from petals_chat.errors import ConfigurationError
from petals_chat.settings import Device, Dtype

CPU_INFO = Path("/proc/cpuinfo")


def resolve_device(requested: str) -> torch.device:
    """The device for a value of `Device`; "auto" is CUDA if it is there, else the CPU.

    Raises:
        ConfigurationError: CUDA was asked for and is not there.
    """
    device = Device(requested)
    if device is Device.CPU or (device is Device.AUTO and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "device: 'cuda' was asked for, but PyTorch finds no CUDA device here. Use 'auto' or 'cpu'"
        )
    return torch.device("cuda", 0)


def resolve_dtype(
    requested: str, device: torch.device, checkpoint_dtype: torch.dtype | None = None
) -> torch.dtype:
    """The precision for a value of `Dtype` on ``device``.

    "auto" on CUDA is the checkpoint's own 16-bit precision, or bfloat16; on a CPU it is bfloat16 if the CPU
    has instructions for it (AVX-512 BF16), else float32.

    Raises:
        ConfigurationError: float16 was asked for on a CPU, where PyTorch hardly computes in it.
    """
    dtype = Dtype(requested)
    if dtype is Dtype.FLOAT16 and device.type == "cpu":
        raise ConfigurationError("dtype: 'float16' needs a GPU. On a CPU use 'auto', 'bfloat16' or 'float32'")
    if dtype is not Dtype.AUTO:
        return _TORCH_DTYPES[dtype]
    if device.type == "cuda":
        return torch.float16 if checkpoint_dtype is torch.float16 else torch.bfloat16
    return torch.bfloat16 if cpu_computes_bfloat16() else torch.float32


@functools.cache
def cpu_computes_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; elsewhere it is slower than float32 but for single tokens."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", CPU_INFO.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        return False
    return flags is not None and "avx512_bf16" in flags.group(1).split()


_TORCH_DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
}
