"""Server-sent events over ASGI, with a sign of life while there is nothing to say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from starlette.types import Send

KEEP_ALIVE_SECONDS = 10.0
"""Proxies give up on connections that are quiet for 30 to 60 seconds."""

_COMMENT = b": still working\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
)


def event(data: bytes, name: str | None = None) -> bytes:
    """An event with these data, which have one line."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


DONE = event(b"[DONE]")


class EventStream:
    """A response that begins with the first event, so that until then an error can still have its HTTP status.

    Args:
        send: of ASGI; it waits while the client is slow.
        opening: gives the first events.
    """

    def __init__(self, send: Send, opening: Callable[[], Sequence[bytes]]) -> None:
        self._send = send
        self._opening = opening
        self._turn = asyncio.Lock()
        self._last_sent = asyncio.get_running_loop().time()
        self.is_started = False

    async def send(self, events: Iterable[bytes]) -> None:
        """Send these, see `event`."""
        if frames := b"".join(events):
            await self._write(frames)

    async def end(self) -> None:
        """End the response."""
        async with self._turn:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def keep_alive(self) -> NoReturn:
        """Send a comment whenever nothing was sent for `KEEP_ALIVE_SECONDS`."""
        now = asyncio.get_running_loop().time
        while True:
            quiet = now() - self._last_sent
            if quiet >= KEEP_ALIVE_SECONDS:
                await self._write(_COMMENT)
            else:
                await asyncio.sleep(KEEP_ALIVE_SECONDS - quiet)

    async def _write(self, frames: bytes) -> None:
        async with self._turn:
            if not self.is_started:
                self.is_started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
                frames = b"".join(self._opening()) + frames
            await self._send({"type": "http.response.body", "body": frames, "more_body": True})
            self._last_sent = asyncio.get_running_loop().time()
