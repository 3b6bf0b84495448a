"""Messages between gateway and worker keep their type and content."""

import msgspec
import pytest

from petals_chat.protocol.messages import (
    ChunkGenerated,
    CloseSession,
    FinishReason,
    Generate,
    GenerationRequest,
    SamplingParameters,
    decode_command,
    decode_event,
    encode,
)


def test_a_command_comes_back_as_it_was() -> None:
    command = Generate(
        7,
        "session",
        GenerationRequest(
            "Hi", SamplingParameters(do_sample=True, seed=3), chunk_tokens=1, stop_sequences=("###",)
        ),
        window=4,
    )
    assert decode_command(encode(command)) == command


def test_an_event_comes_back_as_it_was() -> None:
    event = ChunkGenerated(7, "你好", 2, FinishReason.STOP_SEQUENCE, 11)
    assert decode_event(encode(event)) == event


def test_an_event_is_not_taken_for_a_command() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_command(encode(ChunkGenerated(1, "", 0)))
    with pytest.raises(msgspec.ValidationError):
        decode_event(encode(CloseSession(1, "session")))
