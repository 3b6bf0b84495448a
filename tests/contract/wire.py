"""What these tests need of a client beyond libraries that anybody has: decode a frame, look at the last one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

TIMEOUT_SECONDS = 60
"""For things that take milliseconds: only a server that hangs needs so long."""

OPEN = '{"type": "open_inference_session", "max_length": 64}'
STREAM_WITHOUT_END = '{"type": "generate", "inputs": "B", "max_new_tokens": 1, "stop_sequence": "###"}'


def receive(client: ClientConnection) -> Any:
    """The next frame's JSON."""
    return json.loads(client.recv(timeout=TIMEOUT_SECONDS))


def receive_until_stop(client: ClientConnection) -> list[Any]:
    """The replies up to the one that says "stop"."""
    replies = [receive(client)]
    while not replies[-1]["stop"]:
        replies.append(receive(client))
    return replies


def receive_error(client: ClientConnection) -> Any:
    """The next frame's JSON, which must be an error, and the last frame before the server closes."""
    error = receive(client)
    assert set(error) == {"ok", "code", "traceback"}
    assert error["ok"] is False
    with pytest.raises(ConnectionClosed):
        client.recv(timeout=TIMEOUT_SECONDS)
    assert client.close_reason == error["code"]
    return error


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
