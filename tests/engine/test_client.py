"""The gateway's end of the socket to a worker, when the worker ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from petals_chat.engine.client import WINDOW_CHUNKS, WorkerConnection
from petals_chat.errors import WorkerLostError
from petals_chat.protocol.framing import encode_frame
from petals_chat.protocol.messages import ChunkGenerated, GenerationRequest, encode

TIMEOUT_SECONDS = 20


class Ends:
    """A connection, and the socket that its worker would have."""

    def __init__(
        self, connection: WorkerConnection, worker: socket.socket, attending: asyncio.Task[None]
    ) -> None:
        self.connection = connection
        self.worker = worker
        self._attending = attending

    async def lose_worker(self) -> None:
        self.worker.close()
        await self._attending
        await asyncio.sleep(0.01)  # the connection's socket is closed in a later turn of the loop


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    ours, theirs = socket.socketpair()
    with theirs:
        connection = await WorkerConnection.open("model", ours, lambda _: None)
        attending = asyncio.create_task(connection.run())
        async with asyncio.timeout(TIMEOUT_SECONDS):
            yield Ends(connection, theirs, attending)
    await attending


async def test_what_a_worker_sent_before_its_end_arrives(ends: Ends) -> None:
    count = 2 * WINDOW_CHUNKS
    stream = ends.connection.generate("session", GenerationRequest("Hello"))
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    for _ in range(count):
        ends.worker.sendall(encode_frame(encode(ChunkGenerated(1, "a", 1))))
    await first
    await ends.lose_worker()
    for _ in range(count - 1):
        assert (await anext(stream)).text == "a"
    with pytest.raises(WorkerLostError, match="model"):
        await anext(stream)
