"""The v2 API over a real server, with a plain WebSocket client."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from petals_chat.errors import MissingBlocksError, WorkerLostError
from petals_chat.gateway import websocket_v2
from petals_chat.gateway.answers import Answers
from petals_chat.gateway.error_responses import ErrorResponses
from petals_chat.gateway.models import ModelRegistry
from petals_chat.settings import LimitSettings
from petals_chat.wait_limit import WaitLimit
from tests.fakes import END, FakeEngine
from tests.gateway.gateways import MODEL, Gateway, running_gateway, settings_with, until

OPEN = {"type": "open_inference_session", "model": "org/model", "max_length": 1024}
TOKEN_BY_TOKEN = {"type": "generate", "inputs": "A cat", "max_new_tokens": 1, "stop_sequence": "###"}


async def send(client: ClientConnection, message: Any) -> None:
    await client.send(json.dumps(message))


async def receive(client: ClientConnection) -> Any:
    async with asyncio.timeout(20):
        return json.loads(await client.recv())


async def ask(client: ClientConnection, message: Any) -> Any:
    await send(client, message)
    return await receive(client)


async def close_code(client: ClientConnection) -> int:
    """The code of the close frame, which must be the next frame."""
    with pytest.raises(ConnectionClosed) as closed:
        await receive(client)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


async def assert_served(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        assert await ask(client, OPEN) == {"ok": True}
        reply = await ask(client, {"type": "generate", "inputs": "A cat", "max_new_tokens": 2})
        assert reply == {"ok": True, "outputs": " t0 t1", "stop": True, "token_count": 2}


async def test_a_session_is_opened_and_gives_one_reply_per_request(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        assert await ask(client, OPEN) == {"ok": True}
        request = {"type": "generate", "inputs": "A cat", "max_new_tokens": 3}
        assert await ask(client, request) == {
            "ok": True,
            "outputs": " t0 t1 t2",
            "stop": True,
            "token_count": 3,
        }
        request = {"type": "generate", "max_new_tokens": 2}
        assert await ask(client, request) == {"ok": True, "outputs": " t3 t4", "stop": True, "token_count": 2}
    assert gateway.engine.opened == [("org/model", 1024)]


async def test_with_a_stop_sequence_the_text_comes_piece_by_piece_up_to_it(gateway: Gateway) -> None:
    gateway.engine.tokens = [" Hi", " there", "#", "##", " more"]
    async with gateway.connect() as client:
        await ask(client, OPEN)
        await send(client, TOKEN_BY_TOKEN)
        replies = [await receive(client) for _ in range(4)]
    assert [reply["outputs"] for reply in replies] == [" Hi", " there", "#", "##"]
    assert [reply["stop"] for reply in replies] == [False, False, False, True]
    assert all(reply["ok"] is True and reply["token_count"] == 1 for reply in replies)


async def test_the_end_of_sequence_stops_and_is_in_the_outputs(gateway: Gateway) -> None:
    gateway.engine.tokens = [" Hi", END]
    async with gateway.connect() as client:
        await ask(client, OPEN)
        await send(client, {**TOKEN_BY_TOKEN, "max_new_tokens": 5})
        assert await receive(client) == {"ok": True, "outputs": " Hi</s>", "stop": True, "token_count": 2}


async def test_generate_may_come_before_the_reply_to_open(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        await send(client, OPEN)
        await send(client, {"type": "generate", "inputs": "A", "max_new_tokens": 1})
        await send(client, {"type": "generate", "inputs": "B", "max_new_tokens": 1})
        assert await receive(client) == {"ok": True}
        assert (await receive(client))["outputs"] == " t0"
        assert (await receive(client))["outputs"] == " t1"


async def test_as_many_requests_as_allowed_may_be_sent_ahead_and_no_more() -> None:
    async with running_gateway(settings_with(limits={"max_pending_requests": 3})) as gateway:
        gateway.engine.may_generate.clear()
        async with gateway.connect() as client:
            await ask(client, OPEN)
            for _ in range(50):
                await send(client, {"type": "generate", "inputs": "A", "max_new_tokens": 1})
            await client.ping()  # every frame before it has been read when its pong comes
            gateway.engine.may_generate.set()
            assert [(await receive(client))["outputs"] for _ in range(4)] == [" t0", " t1", " t2", " t3"]
            assert (await receive(client))["code"] == "too_many_requests"
            assert await close_code(client) == 1013


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("not JSON", "protocol_violation"),
        ("", "protocol_violation"),
        ("[]", "protocol_violation"),
        ("{}", "protocol_violation"),
        ("[" * 500_000, "protocol_violation"),
        (b"{}", "protocol_violation"),
        ('{"type": "dance"}', "protocol_violation"),
        ('{"type": "generate", "inputs": "A", "max_new_tokens": 1}', "protocol_violation"),
        ('{"type": "open_inference_session"}', "invalid_parameter"),
        ('{"type": "open_inference_session", "max_length": -5}', "invalid_parameter"),
        ('{"type": "open_inference_session", "max_length": 1e300}', "maximum_length_exceeded"),
        ('{"type": "open_inference_session", "max_length": 9, "model": "no/such"}', "unknown_model"),
        ("x" * 10_000_000, "message_too_large"),
    ],
)
async def test_a_bad_first_frame_gets_its_error_and_the_next_client_is_served(
    gateway: Gateway, frame: str | bytes, code: str
) -> None:
    async with gateway.connect() as client:
        await client.send(frame)
        error = await receive(client)
        assert error["ok"] is False
        assert error["code"] == code
        assert error["traceback"].count("\n") == 0
        assert await close_code(client) in (1008, 1009)
    await assert_served(gateway)


async def test_an_unknown_model_is_a_key_error_to_existing_clients(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        error = await ask(client, {**OPEN, "model": "no/such"})
    assert error["traceback"].startswith("KeyError: ")


async def test_an_error_of_the_engine_is_the_last_frame(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        await ask(client, OPEN)
        gateway.engine.generate_error = MissingBlocksError([2, 3])
        error = await ask(client, TOKEN_BY_TOKEN)
        assert error["traceback"].startswith("MissingBlocksError: No servers holding blocks [2, 3]")
        assert await close_code(client) == 1011


async def test_a_lost_worker_is_reported(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        gateway.engine.open_error = WorkerLostError("org/model")
        assert (await ask(client, OPEN))["code"] == "worker_lost"


async def test_an_unexpected_exception_is_an_internal_error_without_details(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway.connect() as client:
        await ask(client, OPEN)
        gateway.engine.generate_error = ZeroDivisionError("secret")
        error = await ask(client, TOKEN_BY_TOKEN)
        assert error["traceback"] == "InternalError: an internal error; the server's log has the details"
        assert await close_code(client) == 1011
    assert "ZeroDivisionError" in caplog.text


async def test_the_debug_setting_puts_the_python_traceback_above_the_sentence() -> None:
    settings = settings_with(server={"debug_tracebacks": True})
    async with running_gateway(settings) as gateway, gateway.connect() as client:
        lines = (await ask(client, {**OPEN, "model": "no/such"}))["traceback"].splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("KeyError: model 'no/such'")


async def test_a_client_that_goes_away_while_generating_frees_its_session(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        await ask(client, OPEN)
        await ask(client, TOKEN_BY_TOKEN)
    await until(lambda: not gateway.engine.sessions and not gateway.engine.running)


async def test_a_client_whose_connection_breaks_frees_its_session(gateway: Gateway) -> None:
    client = await gateway.connect()
    await ask(client, OPEN)
    gateway.engine.may_generate.clear()
    await send(client, TOKEN_BY_TOKEN)
    await until(lambda: gateway.engine.running)
    client.transport.abort()
    await until(lambda: not gateway.engine.sessions and not gateway.engine.running)


async def test_a_client_that_goes_away_while_its_session_opens_leaves_nothing(gateway: Gateway) -> None:
    gateway.engine.may_open.clear()
    async with gateway.connect() as client:
        await send(client, OPEN)
    gateway.engine.may_open.set()
    await assert_served(gateway)


async def test_a_slow_reader_pauses_the_generation_and_gets_everything_in_the_end() -> None:
    piece = "x" * 100_000
    pieces = 300
    engine = FakeEngine("org/model", "org/private", tokens=[piece] * pieces)
    async with running_gateway(engine=engine) as gateway:
        host, port = gateway.address.split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            async with gateway.connect(sock=connection, max_queue=1) as client:
                await ask(client, OPEN)
                await send(client, TOKEN_BY_TOKEN)
                await until_it_stands_still(engine)
                print("PULLED", engine.tokens_pulled)
                assert engine.tokens_pulled < 100  # the kernel's buffers take some
                texts = [(await receive(client))["outputs"] for _ in range(pieces)]
                assert (await receive(client))["stop"] is True
    assert texts == [piece] * pieces


async def until_it_stands_still(engine: FakeEngine) -> None:
    pulled = -1
    while pulled != engine.tokens_pulled:
        pulled = engine.tokens_pulled
        await asyncio.sleep(0.3)


async def test_a_reader_that_takes_nothing_for_too_long_is_cut_off() -> None:
    engine = FakeEngine("org/model", "org/private", tokens=["x" * 100_000] * 300)
    settings = settings_with(limits={"connection_idle_timeout_seconds": 0.5})
    async with running_gateway(settings, engine) as gateway:
        client = await gateway.connect(max_queue=1)
        await ask(client, OPEN)
        await send(client, TOKEN_BY_TOKEN)
        await until(lambda: engine.running)
        await until(lambda: not engine.sessions)
        client.transport.abort()


async def test_an_idle_connection_is_told_and_closed() -> None:
    async with running_gateway(settings_with(limits={"connection_idle_timeout_seconds": 0.1})) as gateway:
        async with gateway.connect() as client:
            await ask(client, OPEN)
            error = await receive(client)
            assert error["code"] == "session_expired"
            assert error["traceback"].startswith("SessionExpiredError: Session of this connection expired: ")
            await close_code(client)
        await until(lambda: not gateway.engine.sessions)


async def test_a_connection_that_generates_is_not_idle() -> None:
    settings = settings_with(limits={"connection_idle_timeout_seconds": 0.1})
    async with running_gateway(settings) as gateway, gateway.connect() as client:
        await send(client, OPEN)
        gateway.engine.may_generate.clear()
        await send(client, TOKEN_BY_TOKEN)
        assert await receive(client) == {"ok": True}
        await asyncio.sleep(0.4)
        gateway.engine.may_generate.set()
        assert (await receive(client))["outputs"] == " t0"


async def test_a_generation_past_its_deadline_gets_an_error() -> None:
    async with running_gateway(settings_with(limits={"request_timeout_seconds": 0.2})) as gateway:
        gateway.engine.may_generate.clear()
        async with gateway.connect() as client:
            await ask(client, OPEN)
            assert (await ask(client, TOKEN_BY_TOKEN))["code"] == "deadline_exceeded"
        await until(lambda: not gateway.engine.sessions and not gateway.engine.running)


async def test_connections_over_the_limit_are_told_and_closed() -> None:
    async with running_gateway(settings_with(limits={"max_connections": 1})) as gateway:
        async with gateway.connect() as first:
            assert await ask(first, OPEN) == {"ok": True}
            async with gateway.connect() as second:
                assert (await receive(second))["code"] == "too_many_requests"
                assert await close_code(second) == 1013
        await until(lambda: not gateway.engine.sessions)
        await assert_served(gateway)


async def test_connections_that_are_refused_leave_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    running: set[WaitLimit] = set()

    class NotedLimit(WaitLimit):
        def __enter__(self) -> None:
            running.add(self)
            super().__enter__()

        def close(self) -> None:
            running.discard(self)
            super().close()

    monkeypatch.setattr(websocket_v2, "WaitLimit", NotedLimit)
    async with (
        running_gateway(settings_with(limits={"max_connections": 1})) as gateway,
        gateway.connect() as first,
    ):
        assert await ask(first, OPEN) == {"ok": True}
        of_first = set(running)
        async with gateway.connect() as second:
            assert (await receive(second))["code"] == "too_many_requests"
        await until(lambda: running == of_first)
    assert running == set()


async def test_a_client_that_does_not_take_the_end_of_its_connection_is_not_waited_for_for_ever() -> None:
    frames = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "{"}]
    sent: list[str] = []

    async def receive_frame() -> Any:
        return frames.pop(0) if frames else await asyncio.Event().wait()

    async def send_frame(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "websocket.close":
            await asyncio.Event().wait()

    limits = LimitSettings(connection_idle_timeout_seconds=0.1)
    engine = FakeEngine(MODEL.key)
    endpoint = websocket_v2.WebSocketV2(
        ModelRegistry((MODEL,)),
        engine,
        Answers(engine, limits),
        None,
        ErrorResponses(debug=False),
        limits,
    )
    scope = {"type": "websocket", "headers": [], "client": ("192.0.2.1", 1), "scheme": "ws", "path": "/"}
    async with asyncio.timeout(20):
        await endpoint.generate(WebSocket(scope, receive_frame, send_frame))
    assert sent == ["websocket.accept", "websocket.send", "websocket.close"]


async def test_sessions_over_the_limit_are_refused_until_one_is_closed() -> None:
    async with running_gateway(settings_with(limits={"max_sessions": 1})) as gateway:
        async with gateway.connect() as first, gateway.connect() as second:
            assert await ask(first, OPEN) == {"ok": True}
            assert (await ask(second, OPEN))["code"] == "too_many_requests"
        await until(lambda: not gateway.engine.sessions)
        await assert_served(gateway)


async def test_a_context_that_is_full_ends_the_stream_with_an_error(gateway: Gateway) -> None:
    async with gateway.connect() as client:
        await ask(client, {**OPEN, "max_length": 4})
        await send(client, TOKEN_BY_TOKEN)
        assert [(await receive(client))["stop"] for _ in range(3)] == [False, False, False]
        error = await receive(client)
        assert error["traceback"].startswith("MaximumLengthExceededError: Maximum length exceeded: ")
        assert await close_code(client) == 1008


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, False),
        ({"Origin": "https://elsewhere.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "https://{address}"}, False),
        ({"Origin": "http://{address}"}, True),
        ({"Origin": "https://{address}", "X-Forwarded-Proto": "https"}, True),
        ({"Origin": "http://{address}", "X-Forwarded-Proto": "https"}, False),
    ],
)
async def test_a_model_without_public_api_is_for_this_servers_own_page(
    gateway: Gateway, headers: dict[str, str], allowed: bool
) -> None:
    sent = {name: value.format(address=gateway.address) for name, value in headers.items()}
    async with gateway.connect(additional_headers=sent) as client:
        reply = await ask(client, {**OPEN, "model": "org/private"})
    assert reply.get("code") == (None if allowed else "model_not_public")


async def test_any_origin_may_use_the_other_models(gateway: Gateway) -> None:
    async with gateway.connect(additional_headers={"Origin": "https://elsewhere.example"}) as client:
        assert await ask(client, {**OPEN, "model": "old/name"}) == {"ok": True}


async def test_a_server_that_stops_ends_running_generations() -> None:
    async with running_gateway() as gateway:
        client = await gateway.connect()
        await ask(client, OPEN)
        gateway.engine.may_generate.clear()
        await send(client, TOKEN_BY_TOKEN)
        await until(lambda: gateway.engine.running)
    with pytest.raises(ConnectionClosed):
        await receive(client)


async def test_nothing_of_what_is_said_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with running_gateway(settings_with(server={"log_level": "debug"})) as gateway:
        gateway.engine.tokens = [" secret answer", END]
        async with gateway.connect() as client:
            await ask(client, OPEN)
            await ask(client, {"type": "generate", "inputs": "secret prompt", "max_new_tokens": 4})
            await ask(client, {"type": "generate", "inputs": "secret prompt", "max_new_tokens": "secret"})
    ours = [
        record.getMessage() for record in caplog.records if not record.name.startswith("websockets.client")
    ]
    assert ours
    assert not [message for message in ours if "secret" in message]
