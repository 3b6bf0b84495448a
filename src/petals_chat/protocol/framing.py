"""Length-prefixed frames on a byte stream: 4 bytes big-endian length, then the body. No I/O here."""

from __future__ import annotations

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Far above any legal message; a larger length means that the stream is corrupt."""

_PREFIX_BYTES = 4


class CorruptStreamError(Exception):
    """The other side announced a frame that no side of this protocol sends."""


def encode_frame(body: bytes) -> bytes:
    """One frame, prefix and body."""
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(_PREFIX_BYTES, "big") + body


class FrameDecoder:
    """Cuts a stream of bytes, arriving in any pieces, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies of the frames that ``data`` completes, in order.

        Raises:
            CorruptStreamError: a frame announces more than `MAX_FRAME_BYTES`.
        """
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _PREFIX_BYTES:
            body_start = start + _PREFIX_BYTES
            length = int.from_bytes(self._buffer[start:body_start], "big")
            if length > MAX_FRAME_BYTES:
                raise CorruptStreamError(f"a frame announces {length} bytes, the limit is {MAX_FRAME_BYTES}")
            if len(self._buffer) < body_start + length:
                break
            bodies.append(bytes(self._buffer[body_start : body_start + length]))
            start = body_start + length
        del self._buffer[:start]
        return bodies
