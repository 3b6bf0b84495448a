"""Answers that outlive their connection, over a real server, with a plain WebSocket client."""

from __future__ import annotations

import asyncio
import gc
from contextlib import AsyncExitStack
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from petals_chat.errors import MissingBlocksError, ModelLoadingError
from petals_chat.gateway import answers
from petals_chat.gateway.visitors import COOKIE
from petals_chat.protocol.messages import ChatPrompt, GenerationRequest
from petals_chat.settings import ApiSettings
from tests.fakes import END, FakeEngine
from tests.gateway.gateways import Gateway, running_gateway, settings_with, until
from tests.gateway.test_websocket_v2 import ask, close_code, receive, send

ANSWER = {"type": "answer", "messages": [{"role": "user", "content": "A cat"}]}
COOKIES = [{"Cookie": f"{COOKIE}={letter * 43}"} for letter in "ab"]


async def start(client: ClientConnection, **parameters: Any) -> str:
    """Begin an answer; gives its generation's id."""
    reply = await ask(client, {**ANSWER, **parameters})
    assert set(reply) == {"ok", "generation"}
    generation: str = reply["generation"]
    return generation


async def receive_rest(client: ClientConnection) -> list[Any]:
    """All frames up to the last one of an answer."""
    frames = [await receive(client)]
    while not frames[-1].get("stop"):
        frames.append(await receive(client))
    return frames


def text_of(frames: list[Any]) -> str:
    return "".join(frame["outputs"] for frame in frames)


async def test_an_answer_comes_piece_by_piece(gateway: Gateway) -> None:
    gateway.engine.tokens = [" Hi", " you", "##", "#"]
    async with gateway.connect() as client:
        generation = await start(client)
        frames = await receive_rest(client)
    assert len(generation) == 43
    assert text_of(frames) == "Hi you"
    assert sum(frame["token_count"] for frame in frames) == frames[-1]["position"] == 4
    assert frames[-1]["finish_reason"] == "stop"
    assert frames[-1]["prompt_tokens"] == 2
    assert [prompt for prompt in gateway.engine.requests if isinstance(prompt.inputs, ChatPrompt)]
    assert gateway.engine.owners_of_stateless == ["127.0.0.1"]


async def test_an_answer_goes_on_without_its_connection_and_every_token_is_seen_once(
    gateway: Gateway,
) -> None:
    gateway.engine.tokens = [f" w{number}" for number in range(100)] + [END]
    async with gateway.connect() as client:
        generation = await start(client)
        first = await receive(client)
        client.transport.abort()
    await until(lambda: gateway.engine.tokens_pulled == 101)
    attach = {"type": "attach", "generation": generation}
    async with gateway.connect() as client:
        await send(client, {**attach, "position": first["position"]})
        rest = await receive_rest(client)
        await send(client, attach)
        again = await receive_rest(client)
    expected = " ".join(f"w{number}" for number in range(100))
    assert text_of([first, *rest]) == text_of(again) == expected
    assert rest[-1]["position"] == again[-1]["position"] == 101


async def test_followers_see_the_same_wherever_they_come_in() -> None:
    tokens = [f" w{number}" for number in range(30)] + [END]
    engine = FakeEngine("org/model", "org/private", tokens=tokens)
    async with running_gateway(engine=engine) as gateway, gateway.connect() as client:
        engine.may_generate.clear()
        generation = await start(client)

        async def follow() -> str:
            async with gateway.connect() as follower:
                await send(follower, {"type": "attach", "generation": generation})
                return text_of(await receive_rest(follower))

        early = [asyncio.create_task(follow()) for _ in range(3)]
        await asyncio.sleep(0.05)
        engine.may_generate.set()
        late = [asyncio.create_task(follow()) for _ in range(3)]
        texts = {text_of(await receive_rest(client)), *await asyncio.gather(*early, *late)}
    assert texts == {"".join(tokens[:-1]).lstrip()}


async def test_anybody_who_knows_an_answer_may_stop_it(gateway: Gateway) -> None:
    async with gateway.connect() as client, gateway.connect() as other:
        generation = await start(client)
        await receive(client)
        await send(other, {"type": "stop", "generation": generation})
        frames = await receive_rest(client)
        assert frames[-1]["finish_reason"] == "stopped"
        await until(lambda: not gateway.engine.running)
        await send(other, {"type": "stop", "generation": generation})
        assert await ask(
            other, {"type": "attach", "generation": generation, "position": frames[-1]["position"]}
        ) == {
            **frames[-1],
            "outputs": "",
            "token_count": 0,
        }


async def test_the_client_that_follows_may_stop(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        generation = await start(client)
        await send(client, {"type": "stop", "generation": generation})
        frames = await receive_rest(client)
        assert frames[-1]["finish_reason"] == "stopped"
        await start(client, max_new_tokens=2)
        assert (await receive_rest(client))[-1]["finish_reason"] == "length"


async def test_an_answer_may_be_stopped_before_its_session_is_open(gateway: Gateway) -> None:
    gateway.engine.may_open.clear()
    async with gateway.connect() as client:
        generation = await start(client)
        await send(client, {"type": "stop", "generation": generation})
        assert (await receive(client))["finish_reason"] == "stopped"
    gateway.engine.may_open.set()


async def test_an_answer_waits_for_a_model_that_is_being_loaded(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "LOADING_POLL_SECONDS", 0.01)
    gateway.engine.open_error = ModelLoadingError("org/model")
    async with gateway.connect() as client, gateway.connect() as late:
        generation = await start(client, max_new_tokens=2)
        assert await receive(client) == {"ok": True, "waiting_for": "model_loading"}
        assert (await ask(late, {"type": "attach", "generation": generation}))["waiting_for"]
        gateway.engine.open_error = None
        for follower in (client, late):
            assert text_of(await receive_rest(follower)) == "t0 t1"
        gateway.engine.open_error = ModelLoadingError("org/model")
        generation = await start(client)
        await receive(client)
        await send(late, {"type": "stop", "generation": generation})
        assert (await receive(client))["finish_reason"] == "stopped"


async def test_a_full_context_ends_an_answer() -> None:
    engine = FakeEngine("org/model", "org/private", max_session_length=5)
    async with running_gateway(engine=engine) as gateway, gateway.connect() as client:
        await start(client)
        frames = await receive_rest(client)
    assert (text_of(frames), frames[-1]["finish_reason"]) == ("t0 t1 t2", "context_full")


async def test_an_answer_that_breaks_off_tells_every_follower_and_keeps_its_text(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        generation = await start(client)
        text = (await receive(client))["outputs"]
        gateway.engine.generate_error = MissingBlocksError([2])
        while (frame := await receive(client))["ok"]:
            text += frame["outputs"]
        assert frame["code"] == "missing_blocks"
        assert await close_code(client) == 1011
    async with gateway.connect() as client:
        assert (await ask(client, {"type": "attach", "generation": generation}))["outputs"] == text
        assert (await receive(client))["code"] == "missing_blocks"


async def test_an_unexpected_exception_is_an_internal_error_logged_once(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.engine.generate_error = ZeroDivisionError("secret")
    async with gateway.connect() as client:
        generation = await start(client)
        assert (await receive(client))["code"] == "internal_error"
    async with gateway.connect() as client:
        assert (await ask(client, {"type": "attach", "generation": generation}))["code"] == "internal_error"
    assert caplog.text.count("unexpected error") == 1


@pytest.mark.parametrize("kind", ["attach", "stop"])
async def test_an_unknown_generation_is_an_error(gateway: Gateway, kind: str) -> None:
    async with gateway.connect() as client:
        assert (await ask(client, {"type": kind, "generation": "x" * 43}))["code"] == "unknown_generation"
        assert await close_code(client) == 1008


async def test_a_position_that_was_never_told_is_an_error(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        generation = await start(client, max_new_tokens=2)
        await receive_rest(client)
        error = await ask(client, {"type": "attach", "generation": generation, "position": 3})
        assert error["code"] == "invalid_parameter"


@pytest.mark.parametrize("kind", ["attach", "stop"])
async def test_a_visitors_answer_is_nobody_elses(gateway: Gateway, kind: str) -> None:
    async with gateway.connect(additional_headers=COOKIES[0]) as client:
        generation = await start(client)
        frame = {"type": kind, "generation": generation}
        for headers in (COOKIES[1], {}, {**COOKIES[0], "Origin": "https://elsewhere.example"}):
            async with gateway.connect(additional_headers=headers) as other:
                assert (await ask(other, frame))["code"] == "unknown_generation"
        await send(client, {"type": "stop", "generation": generation})
        await receive_rest(client)
    (owner,) = gateway.engine.owners_of_stateless
    assert owner.startswith("127.0.0.1\n")
    assert "a" * 43 not in owner


async def test_who_pretends_to_be_many_visitors_has_the_limits_of_one_address() -> None:
    settings = settings_with(api=ApiSettings(concurrent_generations=1))
    async with (
        running_gateway(settings) as gateway,
        gateway.connect(additional_headers=COOKIES[0]) as first,
        gateway.connect(additional_headers=COOKIES[1]) as second,
    ):
        await start(first)
        await receive(first)
        await start(second)
        assert (await receive(second))["code"] == "rate_limit_exceeded"


async def test_an_answer_is_forgotten_some_time_after_its_end() -> None:
    settings = settings_with(limits={"answer_retention_seconds": 0.2})
    async with running_gateway(settings) as gateway, gateway.connect() as client:
        generation = await start(client, max_new_tokens=1)
        await receive_rest(client)
        await asyncio.sleep(0.4)
        attach = {"type": "attach", "generation": generation}
        assert (await ask(client, attach))["code"] == "unknown_generation"


@pytest.mark.parametrize("fails", [False, True])
async def test_an_answer_that_has_ended_is_kept_without_its_request(gateway: Gateway, *, fails: bool) -> None:
    gateway.engine.tokens = [END]
    gateway.engine.generate_error = MissingBlocksError([1]) if fails else None
    asked = "in this request alone"
    async with gateway.connect() as client:
        generation = await start(client, messages=[{"role": "user", "content": asked}])
        end = await receive(client)
        await until(lambda: not gateway.engine.sessions)
        gateway.engine.requests.clear()
        gateway.engine.generate_error = None
        gc.collect()
        requests = [each for each in gc.get_objects() if type(each) is GenerationRequest]
        assert [request for request in requests if asked in repr(request.inputs)] == []
    async with gateway.connect() as client:
        assert await ask(client, {"type": "attach", "generation": generation}) == end


async def test_the_traceback_of_an_answer_that_broke_off_is_told_in_debug_mode() -> None:
    async with running_gateway(settings_with(server={"debug_tracebacks": True})) as gateway:
        gateway.engine.generate_error = MissingBlocksError([1])
        async with gateway.connect() as client:
            await start(client)
            traceback = (await receive(client))["traceback"]
    assert "in _next_token" in traceback
    assert traceback.splitlines()[-1].startswith("MissingBlocksError: No servers holding blocks [1]")


async def test_too_many_ended_answers_are_forgotten_before_that(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_KEPT", 2)
    async with gateway.connect() as client:
        generations = []
        for _ in range(4):
            generations.append(await start(client, max_new_tokens=1))
            await receive_rest(client)
        await until(lambda: not gateway.engine.sessions)
        assert (await ask(client, {"type": "attach", "generation": generations[-1]}))["stop"]
        assert (await ask(client, {"type": "attach", "generation": generations[0]}))[
            "code"
        ] == "unknown_generation"


@pytest.mark.parametrize("limit", ["max_answers", "max_answers_of_client"])
async def test_answers_over_a_limit_are_refused_until_one_has_ended(limit: str) -> None:
    async with running_gateway(settings_with(limits={limit: 1})) as gateway, gateway.connect() as client:
        generation = await start(client)
        async with gateway.connect() as other:
            assert (await ask(other, ANSWER))["code"] == "too_many_requests"
        await send(client, {"type": "stop", "generation": generation})
        await receive_rest(client)
        await until(lambda: not gateway.engine.sessions)
        await start(client, max_new_tokens=1)
        await receive_rest(client)


async def test_the_limit_of_one_client_is_not_that_of_another() -> None:
    async with running_gateway(settings_with(limits={"max_answers_of_client": 1})) as gateway:
        for headers in (*COOKIES, {}):
            async with gateway.connect(additional_headers=headers) as client:
                await start(client)


async def test_an_address_cannot_have_all_answers_whoever_it_pretends_to_be() -> None:
    limits = {"max_answers": 4, "max_answers_of_client": 1}
    async with running_gateway(settings_with(limits=limits)) as gateway, AsyncExitStack() as connections:
        for headers in COOKIES:
            client = await connections.enter_async_context(gateway.connect(additional_headers=headers))
            generation = await start(client)
        async with gateway.connect() as other:
            error = await ask(other, ANSWER)
        assert error["code"] == "too_many_requests"
        assert "2 answers to your address" in error["traceback"]
        await send(client, {"type": "stop", "generation": generation})
        await receive_rest(client)
        await until(lambda: len(gateway.engine.sessions) == 1)
        async with gateway.connect() as other:
            await start(other)


async def test_an_answer_past_its_deadline_breaks_off() -> None:
    async with running_gateway(settings_with(limits={"request_timeout_seconds": 0.2})) as gateway:
        gateway.engine.may_generate.clear()
        async with gateway.connect() as client:
            await start(client)
            assert (await receive(client))["code"] == "deadline_exceeded"


async def test_a_slow_follower_holds_up_nobody_and_gets_everything() -> None:
    pieces = 200
    engine = FakeEngine("org/model", "org/private", tokens=["x" * 20_000] * pieces + [END])
    async with (
        running_gateway(engine=engine) as gateway,
        gateway.connect(max_queue=1, max_size=None) as client,
    ):
        await start(client)
        await until(lambda: engine.tokens_pulled == pieces + 1)
        assert len(text_of(await receive_rest(client))) == pieces * 20_000


async def test_without_history_nothing_can_be_recorded(gateway: Gateway) -> None:
    record = dict.fromkeys(("chat", "message", "parent"), "00000000-0000-4000-8000-000000000000")
    async with gateway.connect() as client:
        assert (await ask(client, {**ANSWER, "record": record}))["code"] == "history_disabled"


async def test_a_server_that_stops_ends_its_answers() -> None:
    async with running_gateway() as gateway:
        client = await gateway.connect()
        gateway.engine.may_generate.clear()
        await start(client)
    with pytest.raises(ConnectionClosed):
        await client.recv()


async def test_nothing_of_an_answer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with running_gateway(settings_with(server={"log_level": "debug"})) as gateway:
        gateway.engine.tokens = [" secret answer", END]
        async with gateway.connect(additional_headers=COOKIES[0]) as client:
            generation = await start(client, messages=[{"role": "user", "content": "secret prompt"}])
            await receive_rest(client)
    ours = [
        record.getMessage() for record in caplog.records if not record.name.startswith("websockets.client")
    ]
    assert not [line for line in ours if "secret" in line or generation in line or "a" * 43 in line]
