import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest
import uvloop

from petals_chat.protocol.channel import FrameChannel
from petals_chat.protocol.framing import CorruptStreamError, FrameDecoder, encode_frame

PATIENCE_SECONDS = 20.0


class End:
    """One end of a socket, and the frames that came to it."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.channel: FrameChannel

    async def next_frame(self) -> bytes:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.frames.get()

    async def wait_for_end(self) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.channel.wait_for_end()


@pytest.fixture
async def ends() -> AsyncIterator[tuple[End, End]]:
    both = End(), End()
    for end, connection in zip(both, socket.socketpair(), strict=True):
        end.channel = await FrameChannel.open(connection, end.frames.put_nowait)
    yield both
    for end in both:
        end.channel.close()


async def test_frames_go_both_ways_in_order(ends: tuple[End, End]) -> None:
    ours, theirs = ends
    large = bytes(range(256)) * 4096
    for body in (b"first", b"", large):
        ours.channel.send(body)
    theirs.channel.send(b"answer")
    assert [await theirs.next_frame() for _ in range(3)] == [b"first", b"", large]
    assert await ours.next_frame() == b"answer"


async def test_what_was_read_before_belongs_to_the_first_frame() -> None:
    decoder, end = FrameDecoder(), End()
    frame = encode_frame(b"begun elsewhere")
    assert decoder.feed(frame[:7]) == []
    ours, theirs = socket.socketpair()
    end.channel = await FrameChannel.open(ours, end.frames.put_nowait, decoder)
    with theirs:
        theirs.sendall(frame[7:])
        assert await end.next_frame() == b"begun elsewhere"
    await end.wait_for_end()
    end.channel.close()


async def test_the_other_side_s_end_is_noticed(ends: tuple[End, End]) -> None:
    ours, theirs = ends
    theirs.channel.send(b"last words")
    theirs.channel.close()
    await ours.wait_for_end()
    assert await ours.next_frame() == b"last words"


async def test_who_sends_no_more_can_still_be_told_something() -> None:
    end = End()
    ours, theirs = socket.socketpair()
    end.channel = await FrameChannel.open(ours, end.frames.put_nowait)
    with theirs:
        theirs.shutdown(socket.SHUT_WR)
        await end.wait_for_end()
        end.channel.send(b"goodbye")
        end.channel.close()
        theirs.settimeout(PATIENCE_SECONDS)
        assert await asyncio.to_thread(theirs.recv, 64) == encode_frame(b"goodbye")


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_nothing_is_sent_to_who_has_gone(run: Callable[[Coroutine[None, None, None]], None]) -> None:
    async def send_to_nobody() -> None:
        end = End()
        ours, theirs = socket.socketpair()
        end.channel = await FrameChannel.open(ours, end.frames.put_nowait)
        theirs.close()
        await end.wait_for_end()
        end.channel.close()
        await asyncio.sleep(0.01)  # the socket is closed in a later turn of the loop
        end.channel.send(b"too late")

    run(send_to_nobody())


async def test_what_is_no_frame_ends_the_channel() -> None:
    end = End()
    ours, theirs = socket.socketpair()
    end.channel = await FrameChannel.open(ours, end.frames.put_nowait)
    with theirs:
        theirs.sendall(b"\xff" * 8)
        with pytest.raises(CorruptStreamError):
            await end.wait_for_end()


async def test_a_frame_that_cannot_be_taken_ends_the_channel() -> None:
    def refuse(body: bytes) -> None:
        raise ValueError(body.decode())

    ours, theirs = socket.socketpair()
    channel = await FrameChannel.open(ours, refuse)
    with theirs:
        theirs.sendall(encode_frame(b"unknown") + encode_frame(b"another"))
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(ValueError, match="unknown"):
                await channel.wait_for_end()
