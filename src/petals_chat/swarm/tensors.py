"""Hidden states on the wire, in hivemind's format.

hivemind's own functions describe each tensor with objects and look at what it might be: for one token that takes
several times as long as copying it. Here is the way that nearly all take; whatever else there is goes on to hivemind.
"""

from __future__ import annotations

import math

import torch

from petals_chat.swarm import compat

compat.install()

from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_UNCOMPRESSED = runtime_pb2.CompressionType.NONE


def serialize(tensor: torch.Tensor, compression: int) -> runtime_pb2.Tensor:
    """A tensor on the CPU as a message; ``compression`` is one of hivemind's ``CompressionType``."""
    name = _NAMES.get(tensor.dtype)
    if compression != _UNCOMPRESSED or name is None:
        return serialize_torch_tensor(tensor, compression)
    # NumPy has no bfloat16.
    raw = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    return runtime_pb2.Tensor(
        compression=compression, buffer=raw.numpy().tobytes(), size=tensor.shape, dtype=name
    )


def deserialize(message: runtime_pb2.Tensor) -> torch.Tensor:
    """The tensor in a message. Raises any exception if there is none in it."""
    dtype, buffer, shape = _DTYPES.get(message.dtype), message.buffer, tuple(message.size)
    if message.compression != _UNCOMPRESSED or dtype is None:
        return _by_hivemind(message)
    if not buffer or len(buffer) != math.prod(shape) * dtype.itemsize:
        return _by_hivemind(message)  # bfloat16 may come as float32
    return torch.frombuffer(bytearray(buffer), dtype=dtype).view(shape)


def _by_hivemind(message: runtime_pb2.Tensor) -> torch.Tensor:
    tensor: torch.Tensor = deserialize_torch_tensor(message)
    return tensor.detach()  # the message may ask for a gradient
