"""What a worker does with commands that come together."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, cast

import pytest

from petals_chat.engine import worker as worker_module
from petals_chat.engine.contexts import Counts
from petals_chat.engine.prefixes import PrefixStore
from petals_chat.engine.rooms import RoomQueue
from petals_chat.engine.sessions import Model
from petals_chat.engine.tokenizer import Tokenizer
from petals_chat.engine.worker import Worker
from petals_chat.protocol.channel import FrameChannel
from petals_chat.protocol.framing import FrameDecoder, encode_frame
from petals_chat.protocol.messages import (
    Cancel,
    Command,
    EncodeText,
    Event,
    SwarmStatus,
    TextEncoded,
    decode_event,
    encode,
)
from tests.fakes import worker_started
from tests.tiny_tokenizers import save_tokenizer


class NoSwarm:
    """A swarm for a worker that only tokenises."""

    status = SwarmStatus()
    is_connected = True
    counts = Counts()

    def __init__(self) -> None:
        self.rooms = RoomQueue(max_waiting=1, timeout=60, idle_timeout=60)

    async def watch(self) -> None:
        """There is nothing to see."""

    async def stay_joined(self) -> None:
        """There is nothing to join."""


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    save_tokenizer("byte_level", tmp_path)
    swarm = cast(Any, NoSwarm())
    batcher = cast(Any, None)
    return Worker(
        Model(Tokenizer(str(tmp_path), None, {}), batcher, swarm, PrefixStore(idle_timeout=60)), swarm
    )


async def test_what_a_worker_does_all_the_time_is_begun_again_after_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_module, "STATUS_PERIOD_SECONDS", 0)
    begun, is_begun_again = 0, asyncio.Event()

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise OSError("the swarm is away")
        is_begun_again.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(worker_module._repeat(work))
    await asyncio.wait_for(is_begun_again.wait(), 5)
    task.cancel()
    await asyncio.wait((task,))
    assert "the swarm is away" in caplog.text


async def test_a_text_that_is_cancelled_at_once_is_forgotten(worker: Worker) -> None:
    ours, theirs = socket.socketpair()
    texts: asyncio.Queue[TextEncoded] = asyncio.Queue()

    def receive(body: bytes) -> None:
        event: Event = decode_event(body)
        if isinstance(event, TextEncoded):
            texts.put_nowait(event)

    commands: list[Command] = [EncodeText(1, "Hello", True), Cancel(1), EncodeText(2, "Hello", True)]
    ours.sendall(b"".join(encode_frame(encode(command)) for command in commands))
    async with asyncio.timeout(60):
        serving = asyncio.create_task(worker.run(worker_started(), theirs, FrameDecoder()))
        gateway = await FrameChannel.open(ours, receive)
        assert (await texts.get()).request_id == 2
        gateway.close()
        await serving
    assert texts.empty()
