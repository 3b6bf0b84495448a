"""How a generation ends, is cut into chunks, cancelled, paused and repeated, on a model whose text is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from petals_chat.engine.client import WINDOW_CHUNKS
from petals_chat.engine.interface import EngineSession
from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.errors import (
    InvalidParameterError,
    MaximumLengthExceededError,
    SessionExpiredError,
)
from petals_chat.protocol.messages import FinishReason, GenerationRequest
from tests.engine.conftest import SESSION_TOKENS
from tests.engine.generating import collect, text_of


@pytest.fixture
async def session(engine: ProcessEngine) -> AsyncIterator[EngineSession]:
    session = await engine.open_session("reciting", SESSION_TOKENS)
    yield session
    await session.close()


async def test_characters_come_whole_token_by_token(session: EngineSession) -> None:
    chunks = await collect(session, GenerationRequest("A", max_new_tokens=12, chunk_tokens=1))
    assert [chunk.text for chunk in chunks[:4]] == ["😀", "世", "界", " machine"]
    assert [chunk.token_count for chunk in chunks[:4]] == [4, 3, 3, 1]


async def test_a_stop_sequence_of_several_tokens_ends_the_text_and_is_part_of_it(
    session: EngineSession,
) -> None:
    request = GenerationRequest("A", chunk_tokens=1, stop_sequences=("###", "[END]"))
    chunks = await collect(session, request)
    assert text_of(chunks) == "😀世界 machine[END]"
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is FinishReason.STOP_SEQUENCE


async def test_text_behind_a_stop_sequence_within_a_token_is_cut(session: EngineSession) -> None:
    chunks = await collect(session, GenerationRequest("A", stop_sequences=("mach",), max_new_tokens=50))
    assert text_of(chunks) == "😀世界 mach"


async def test_the_end_of_sequence_ends_the_text_and_is_part_of_it(session: EngineSession) -> None:
    chunks = await collect(session, GenerationRequest("C", chunk_tokens=1))
    assert text_of(chunks) == "?<|endoftext|>"
    assert chunks[-1].finish_reason is FinishReason.END_OF_SEQUENCE


async def test_max_length_counts_the_prompt(session: EngineSession) -> None:
    chunks = await collect(session, GenerationRequest("B", max_length=4))
    assert text_of(chunks) == "! Hello Hello"
    assert chunks[-1].finish_reason is FinishReason.LENGTH


async def test_a_full_context_is_said(engine: ProcessEngine) -> None:
    session = await engine.open_session("reciting", 5)
    chunks = await collect(session, GenerationRequest("B", chunk_tokens=1))
    assert sum(chunk.token_count for chunk in chunks) == 4
    assert chunks[-1].finish_reason is FinishReason.CONTEXT_FULL
    with pytest.raises(MaximumLengthExceededError):
        await collect(session, GenerationRequest(None, max_new_tokens=1))
    await session.close()


async def test_a_character_cut_by_the_end_of_a_request_comes_whole_in_the_next(
    session: EngineSession,
) -> None:
    first = await collect(session, GenerationRequest("A", max_new_tokens=2))
    second = await collect(session, GenerationRequest(None, max_new_tokens=5))
    assert (text_of(first), text_of(second)) == ("", "😀世")


async def test_a_request_that_does_not_fit_leaves_the_session_as_it_was(session: EngineSession) -> None:
    await collect(session, GenerationRequest("A", max_new_tokens=4))
    with pytest.raises(MaximumLengthExceededError, match="Maximum length exceeded"):
        await collect(session, GenerationRequest("A" * SESSION_TOKENS, max_new_tokens=1))
    with pytest.raises(MaximumLengthExceededError, match="3 tokens that max_length allows"):
        await collect(session, GenerationRequest(None, max_length=3))
    chunks = await collect(session, GenerationRequest(None, max_new_tokens=3))
    assert text_of(chunks) == "世"


async def test_a_new_session_needs_text(session: EngineSession) -> None:
    for inputs in (None, ""):
        with pytest.raises(InvalidParameterError, match="begin with"):
            await collect(session, GenerationRequest(inputs, max_new_tokens=1))


async def test_a_cancelled_generation_ends_and_the_session_goes_on(session: EngineSession) -> None:
    stream = session.generate(GenerationRequest("B", chunk_tokens=1))
    taken = [(await anext(stream)).text for _ in range(3)]
    await stream.aclose()
    assert taken == ["!", " Hello", " Hello"]
    chunks = await collect(session, GenerationRequest("A", max_new_tokens=4))
    assert text_of(chunks) == "😀"


async def test_progress_is_told_where_chunks_are_long(session: EngineSession) -> None:
    request = GenerationRequest("B", max_new_tokens=12, chunk_tokens=10, progress_tokens=4)
    chunks = await collect(session, request)
    told = [(chunk.text, chunk.token_count, chunk.tokens_ahead) for chunk in chunks]
    hello = " Hello"
    assert told == [("", 0, 4), ("", 0, 4), ("!" + 9 * hello, 10, 0), (2 * hello, 2, 0)]


async def test_a_long_text_is_cancelled_while_it_is_tokenised_and_others_go_on(
    engine: ProcessEngine, session: EngineSession
) -> None:
    stream = session.generate(GenerationRequest("A " * 300_000, max_new_tokens=1))
    waiting = asyncio.create_task(anext(stream))
    other = await engine.open_session("reciting", SESSION_TOKENS)
    assert text_of(await collect(other, GenerationRequest("A", max_new_tokens=4))) == "😀"
    await other.close()
    waiting.cancel()
    await asyncio.wait((waiting,))
    await stream.aclose()
    chunks = await collect(session, GenerationRequest("A", max_new_tokens=4))
    assert text_of(chunks) == "😀"


async def test_a_generation_pauses_while_nobody_takes_its_chunks(
    engine: ProcessEngine, session: EngineSession
) -> None:
    await reported(engine)
    before = generated(engine)
    stream = session.generate(GenerationRequest("B", chunk_tokens=1))
    await anext(stream)
    await reported(engine)
    await reported(engine)
    paused_at = generated(engine) - before
    assert paused_at <= 2 * WINDOW_CHUNKS
    for _ in range(4 * WINDOW_CHUNKS):
        await anext(stream)
    await stream.aclose()


async def test_requests_in_one_session_wait_for_each_other(session: EngineSession) -> None:
    first, second = await asyncio.gather(
        collect(session, GenerationRequest("A", max_new_tokens=4)),
        collect(session, GenerationRequest(None, max_new_tokens=3)),
    )
    assert text_of(first) + text_of(second) == "😀世"


async def test_closing_ends_what_runs_and_frees_the_session(
    engine: ProcessEngine, session: EngineSession
) -> None:
    stream = session.generate(GenerationRequest("B", chunk_tokens=1))
    await anext(stream)
    await session.close()
    remaining = [chunk async for chunk in stream]
    assert remaining[-1].finish_reason is FinishReason.CANCELLED
    with pytest.raises(SessionExpiredError):
        await collect(session, GenerationRequest(None, max_new_tokens=1))
    await reported(engine)
    report = engine.statuses["reciting"].report
    assert report is not None
    assert (report.open_sessions, report.running_generations) == (0, 0)


async def test_a_session_longer_than_the_model_allows_is_refused(engine: ProcessEngine) -> None:
    with pytest.raises(MaximumLengthExceededError, match=str(SESSION_TOKENS)):
        await engine.open_session("reciting", SESSION_TOKENS + 1)


def generated(engine: ProcessEngine) -> int:
    report = engine.statuses["reciting"].report
    assert report is not None
    return report.tokens_generated


async def reported(engine: ProcessEngine) -> None:
    """Wait for the worker's next status report."""
    before = engine.statuses["reciting"].report
    async with asyncio.timeout(30):
        while engine.statuses["reciting"].report is before:
            await asyncio.sleep(0.05)
