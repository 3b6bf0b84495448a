from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("petals")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64]


def some_tensor(dtype: torch.dtype) -> torch.Tensor:
    return (100 * torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))).to(dtype)


def sent(tensor: torch.Tensor, compression: str = "NONE") -> Any:
    from hivemind.proto.runtime_pb2 import CompressionType

    from petals_chat.swarm import tensors

    return tensors.serialize(tensor, CompressionType.Value(compression))


def received(message: Any) -> torch.Tensor:
    from petals_chat.swarm import tensors

    return tensors.deserialize(message)


@pytest.mark.parametrize(
    ("dtype", "compression"), [*((dtype, "NONE") for dtype in DTYPES), (torch.float32, "FLOAT16")], ids=str
)
def test_messages_are_those_of_hivemind(dtype: torch.dtype, compression: str) -> None:
    from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
    from hivemind.proto.runtime_pb2 import CompressionType

    tensor = some_tensor(dtype)
    message = sent(tensor, compression)
    assert message == serialize_torch_tensor(tensor, CompressionType.Value(compression))
    assert received(message).dtype is dtype
    assert torch.equal(received(message), deserialize_torch_tensor(message))


def test_a_row_of_a_table() -> None:
    row = some_tensor(torch.bfloat16)[0][None, 1:2]
    assert torch.equal(received(sent(row)), row)


def test_an_empty_tensor() -> None:
    assert received(sent(torch.empty(0))).shape == (0,)


def test_bfloat16_that_came_as_float32() -> None:
    from hivemind.proto.runtime_pb2 import Tensor

    values = torch.tensor([[1.5, -2.0]])
    read = received(Tensor(buffer=values.numpy().tobytes(), size=values.shape, dtype="bfloat16"))
    assert read.dtype is torch.bfloat16
    assert read.tolist() == values.tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"buffer": b"123", "size": [1], "dtype": "float32"},
        {"buffer": bytes(8), "size": [3], "dtype": "float32"},
        {"buffer": bytes(8), "size": [2], "dtype": "nonsense"},
    ],
    ids=["nothing", "too short", "another size", "unknown type"],
)
def test_what_is_no_tensor_is_an_error(fields: dict[str, Any]) -> None:
    from hivemind.proto.runtime_pb2 import Tensor

    with pytest.raises((ValueError, TypeError, RuntimeError)):
        received(Tensor(**fields))


def test_what_asks_for_a_gradient_does_not_get_it() -> None:
    message = sent(some_tensor(torch.float32), "FLOAT16")
    message.requires_grad = True
    assert not received(message).requires_grad
