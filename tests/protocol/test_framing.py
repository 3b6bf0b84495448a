"""Frames survive a stream that is cut anywhere."""

import pytest

from petals_chat.protocol.framing import MAX_FRAME_BYTES, CorruptStreamError, FrameDecoder, encode_frame


def test_frames_come_back_whatever_the_pieces() -> None:
    bodies = [b"", b"a", b"hello" * 100]
    stream = b"".join(map(encode_frame, bodies))
    for size in (1, 2, 3, 5, 7, len(stream)):
        decoder = FrameDecoder()
        received = []
        for start in range(0, len(stream), size):
            received += decoder.feed(stream[start : start + size])
        assert received == bodies


def test_an_absurd_length_is_refused_before_its_body_comes() -> None:
    with pytest.raises(CorruptStreamError, match="announces"):
        FrameDecoder().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))


def test_a_body_over_the_limit_is_never_sent() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        encode_frame(bytes(MAX_FRAME_BYTES + 1))
