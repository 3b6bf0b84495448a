"""What a client may use, by a clock that the test turns."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from petals_chat.errors import ConfigurationError, InvalidApiKeyError, RateLimitExceededError
from petals_chat.gateway import clients as clients_module
from petals_chat.gateway.clients import COUNTED_CHUNK_TOKENS, Clients, MeteredEngine, hash_of
from petals_chat.protocol.messages import GenerationRequest
from petals_chat.settings import ApiKeySettings, ApiSettings
from tests.fakes import FakeEngine


class Clock:
    """Stands still unless it is turned."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(name: str, **settings: Any) -> ApiKeySettings:
    return ApiKeySettings(name=name, hash=hash_of(f"sk-{name}"), **settings)


def test_requests_come_back_evenly_over_a_minute() -> None:
    clock = Clock()
    client = Clients(ApiSettings(requests_per_minute=2), [], clock).of("1.2.3.4")
    for _ in range(2):
        with client.generation():
            pass
    with pytest.raises(RateLimitExceededError, match="2 requests a minute") as caught, client.generation():
        pass
    assert caught.value.data["retry_after_seconds"] == pytest.approx(30)
    clock.now += 29.9
    assert client.seconds_until_next == pytest.approx(0.1)
    clock.now += 0.2
    with client.generation():
        pass
    clock.now += 1000
    assert dict(client.headers()) == {
        b"x-ratelimit-limit-requests": b"2",
        b"x-ratelimit-remaining-requests": b"2",
        b"x-ratelimit-reset-requests": b"0.000s",
    }


def test_tokens_are_counted_afterwards_and_a_debt_is_waited_for() -> None:
    clock = Clock()
    client = Clients(ApiSettings(tokens_per_minute=60), [], clock).of("1.2.3.4")
    with client.generation():
        client.use_tokens(100)
    assert dict(client.headers())[b"x-ratelimit-remaining-tokens"] == b"0"
    assert client.seconds_until_next == pytest.approx(41)
    with pytest.raises(RateLimitExceededError, match="60 tokens a minute"), client.generation():
        pass
    clock.now += 41.1
    with client.generation():
        pass


def test_generations_at_once_are_limited() -> None:
    client = Clients(ApiSettings(concurrent_generations=1), []).of("1.2.3.4")
    with client.generation():
        with pytest.raises(RateLimitExceededError, match="1 generations at once"), client.generation():
            pass
        assert client.running == 1
    with client.generation():
        pass
    assert client.is_idle


def test_without_limits_nothing_is_refused_or_told() -> None:
    client = Clients(ApiSettings(), []).of("1.2.3.4")
    assert not client.is_limited
    assert client.headers() == []
    with client.generation(), client.generation():
        client.use_tokens(10**9)


def test_a_key_has_limits_of_its_own() -> None:
    settings = ApiSettings(
        requests_per_minute=10,
        tokens_per_minute=10,
        keys=(key("ada", requests_per_minute=99, tokens_per_minute=0, models=("a",)), key("bob")),
    )
    clients = Clients(settings, ["a", "b"])
    ada = clients.of(clients.owner_of_key("sk-ada"))
    bob = clients.of(clients.owner_of_key("sk-bob"))
    assert (ada.limits.requests_per_minute, ada.limits.tokens_per_minute) == (99, None)
    assert (bob.limits.requests_per_minute, bob.limits.tokens_per_minute) == (10, 10)
    assert (ada.may_use("a"), ada.may_use("b"), bob.may_use("b")) == (True, False, True)
    assert clients.of("key:ada") is ada


@pytest.mark.parametrize("wrong", [None, "", "sk-bob", "sk-ada ", "ada", "\udcff"])
def test_other_keys_are_refused(wrong: str | None) -> None:
    clients = Clients(ApiSettings(keys=(key("ada"),)), [])
    with pytest.raises(InvalidApiKeyError):
        clients.owner_of_key(wrong)


def test_the_configuration_of_keys_is_checked() -> None:
    with pytest.raises(ConfigurationError, match="two keys have the name 'ada'"):
        Clients(ApiSettings(keys=(key("ada"), key("ada"))), [])
    with pytest.raises(ConfigurationError, match="'ada' names 'no/such', which is not served"):
        Clients(ApiSettings(keys=(key("ada", models=("no/such",)),)), ["a"])


def test_clients_who_use_nothing_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients_module, "MAX_REMEMBERED_CLIENTS", 2)
    clients = Clients(ApiSettings(requests_per_minute=5), [])
    first = clients.of("1")
    with first.generation():
        second = clients.of("2")
        clients.of("3")
        assert clients.of("1") is first
        assert clients.of("2") is not second


def test_who_comes_when_all_others_are_busy_has_the_place_of_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients_module, "MAX_REMEMBERED_CLIENTS", 2)
    clients = Clients(ApiSettings(requests_per_minute=5), [])
    first, second = clients.of("1"), clients.of("2")
    with first.generation(), second.generation():
        third = clients.of("3")
        assert clients.of("3") is third
        assert clients.of("2") is second
        assert clients.of("1") is not first


def test_all_visitors_of_one_address_are_one_client() -> None:
    clients = Clients(ApiSettings(requests_per_minute=1), [])
    assert clients.of("192.0.2.1") is clients.of("192.0.2.1\nvisitor")
    assert clients.of("192.0.2.1") is not clients.of("192.0.2.2\nvisitor")


async def test_who_leaves_before_the_end_has_used_the_prompt_and_what_was_generated() -> None:
    engine = FakeEngine("m")
    clients = Clients(ApiSettings(tokens_per_minute=1000), ["m"], clock=lambda: 0.0)
    metered = MeteredEngine(engine, clients)
    session = await metered.open_session("m", 100, owner="192.0.2.1")
    async with aclosing(session.generate(GenerationRequest("some words more"))) as chunks:
        await anext(chunks)
    (left,) = [
        value for name, value in clients.of("192.0.2.1").headers() if name.endswith(b"remaining-tokens")
    ]
    assert int(left) == 1000 - 3 - COUNTED_CHUNK_TOKENS


async def test_long_replies_of_a_stream_are_counted_while_they_are_made_and_once() -> None:
    engine = FakeEngine("m")
    clients = Clients(ApiSettings(tokens_per_minute=10_000), ["m"], clock=lambda: 0.0)
    client = clients.of("192.0.2.1")

    def used() -> int:
        (left,) = [value for name, value in client.headers() if name.endswith(b"remaining-tokens")]
        return 10_000 - int(left)

    metered = MeteredEngine(engine, clients)
    session = await metered.open_session("m", 2000, owner="192.0.2.1")
    stream = session.generate(
        GenerationRequest("some words more", chunk_tokens=1000, stop_sequences=("###",))
    )
    waiting = asyncio.create_task(anext(stream))
    while used() < 3 + 2 * COUNTED_CHUNK_TOKENS:
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    assert used() == 3 + 2 * COUNTED_CHUNK_TOKENS

    before = used()
    session = await metered.open_session("m", 2000, owner="192.0.2.1")
    request = GenerationRequest("some words more", chunk_tokens=50, stop_sequences=(" t99",))
    chunks = [chunk async for chunk in session.generate(request)]
    assert [chunk.token_count for chunk in chunks] == [50, 50]
    assert used() - before == 3 + 100
