"""Limits on things at once."""

from __future__ import annotations

import pytest

from petals_chat.errors import AttentionCacheFullError, TooManyRequestsError
from petals_chat.gateway.admission import LimitedEngine, Slots
from petals_chat.settings import LimitSettings
from tests.fakes import FakeEngine


def test_what_is_over_the_limit_is_refused_until_a_place_is_free() -> None:
    slots = Slots(2, "things")
    slots.take()
    slots.take()
    with pytest.raises(TooManyRequestsError, match="already has 2 things"):
        slots.take()
    slots.free()
    slots.take()


async def test_a_closed_session_gives_its_place_back_once() -> None:
    engine = LimitedEngine(FakeEngine("m"), LimitSettings(max_sessions=1))
    session = await engine.open_session("m", 64)
    await session.close()
    await session.close()
    await engine.open_session("m", 64)
    with pytest.raises(TooManyRequestsError):
        await engine.open_session("m", 64)


async def test_a_session_that_fails_to_open_takes_no_place() -> None:
    fake = FakeEngine("m")
    engine = LimitedEngine(fake, LimitSettings(max_sessions=1))
    fake.open_error = AttentionCacheFullError()
    with pytest.raises(AttentionCacheFullError):
        await engine.open_session("m", 64)
    fake.open_error = None
    session = await engine.open_session("m", 64)
    assert session.max_length == 64
