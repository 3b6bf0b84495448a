"""The socket between gateway and worker: frames out, frames in."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Self, cast

from petals_chat.protocol.framing import FrameDecoder, encode_frame


class FrameChannel(asyncio.Protocol):
    """One end of the socket. What comes is handed out by the event loop itself, without a task that would be woken.

    Args:
        receive: takes the body of a frame. What it raises ends the channel.
        decoder: what was read from the socket before is in it.
    """

    def __init__(self, receive: Callable[[bytes], None], decoder: FrameDecoder) -> None:
        self._receive = receive
        self._decoder = decoder
        self._transport: asyncio.Transport | None = None
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(
        cls,
        connection: socket.socket,
        receive: Callable[[bytes], None],
        decoder: FrameDecoder | None = None,
    ) -> Self:
        """A channel on a connected Unix socket, which is the channel's from here on."""
        _, channel = await asyncio.get_running_loop().create_unix_connection(
            lambda: cls(receive, decoder or FrameDecoder()), sock=connection
        )
        return channel

    def send(self, body: bytes) -> None:
        """Send a frame; to nobody, if the channel has ended.

        Nothing waits here: what may be on its way is bounded by who sends it.
        """
        assert self._transport is not None
        if not self._transport.is_closing():  # uvloop's raise an error then
            self._transport.write(encode_frame(body))

    async def wait_for_end(self) -> None:
        """Wait until the other side sends no more; what it has to be told still can be.

        Raises:
            Exception: what came was no frame, or ``receive`` raised this.
        """
        await self._end

    def close(self) -> None:
        """Send what was not sent yet, and close the socket."""
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._end.done():
            return
        try:
            for body in self._decoder.feed(data):
                self._receive(body)
        except Exception as error:
            self._end.set_exception(error)
            self.close()

    def eof_received(self) -> bool:
        """See `asyncio.Protocol`; the transport stays open."""
        self._note_end()
        return True

    def connection_lost(self, _: Exception | None) -> None:
        """See `asyncio.Protocol`; however it was lost, the other side has gone."""
        self._note_end()

    def _note_end(self) -> None:
        if not self._end.done():
            self._end.set_result(None)
