"""The v1 API over a real server, with plain HTTP clients."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from petals_chat.errors import AttentionCacheFullError, MissingBlocksError, WorkerLostError
from petals_chat.protocol.messages import GenerationRequest
from tests.gateway.gateways import Gateway, running_gateway, settings_with, until

FORM = "application/x-www-form-urlencoded"
THREE_TOKENS = {"ok": True, "outputs": " t0 t1 t2"}


async def raw_post(gateway: Gateway, body: bytes, *headers: str, path: str = "/api/v1/generate") -> Any:
    """Post the body as it stands, with no more headers than HTTP needs."""
    reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Connection: close", *headers]
    writer.write("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    return json.loads(content)


async def open_session(gateway: Gateway, **parameters: Any) -> str:
    response = await gateway.http.get("/api/v1/open_inference_session", params=parameters)
    session_id: str = response.json()["session_id"]
    return session_id


async def test_a_request_without_a_session_has_one_of_its_own(gateway: Gateway) -> None:
    assert await gateway.generate(inputs="A cat", max_new_tokens=3) == THREE_TOKENS
    assert gateway.engine.sessions == {}
    assert gateway.engine.opened == [("org/model", 2048)]
    assert gateway.engine.requests == [GenerationRequest("A cat", max_new_tokens=3)]


async def test_max_length_sizes_the_session_of_the_request(gateway: Gateway) -> None:
    assert await gateway.generate(inputs="A cat", max_length=5) == THREE_TOKENS
    assert gateway.engine.opened == [("org/model", 5)]


async def test_max_new_tokens_wins_over_max_length(gateway: Gateway) -> None:
    assert await gateway.generate(inputs="A cat", max_length=3, max_new_tokens=3) == THREE_TOKENS
    assert gateway.engine.opened == [("org/model", 2048)]


async def test_more_than_the_model_allows_is_clamped() -> None:
    async with running_gateway() as gateway:
        gateway.engine.statuses["org/model"] = gateway.engine.statuses["org/private"]
        reply = await gateway.generate(inputs="A cat", max_length=10**9)
        assert reply["outputs"].endswith(" t2045")


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"inputs=A%20cat&max_new_tokens=3", FORM),
        (b"inputs=A+cat&max_new_tokens=3", FORM),
        (b"inputs=A cat&max_new_tokens=3", FORM),
        (b"inputs=A cat&max_new_tokens=3", "text/plain"),
        (b"inputs=A cat&max_new_tokens=3", "application/json"),
        (b"inputs=A cat&max_new_tokens=3\n", None),
        (b'{"inputs": "A cat", "max_new_tokens": 3}', "application/json"),
        (b'{"inputs": "A cat", "max_new_tokens": "3"}', "application/json; charset=utf-8"),
        (b'{"inputs": "A cat", "max_new_tokens": 3}', FORM),
        (b'{"inputs": "A cat", "max_new_tokens": 3}', "text/plain"),
        (b' {"inputs": "A cat", "max_new_tokens": 3}\n', None),
    ],
)
async def test_a_body_is_understood_under_any_content_type(
    gateway: Gateway, body: bytes, content_type: str | None
) -> None:
    headers = [f"Content-Type: {content_type}"] if content_type else []
    assert await raw_post(gateway, body, *headers) == THREE_TOKENS
    assert gateway.engine.requests[0].inputs == "A cat"


async def test_brackets_and_utf8_need_no_percent_encoding(gateway: Gateway) -> None:
    prompt = "[INST] 猫 & {the} 100% \N{CAT FACE}? [/INST]"
    await raw_post(gateway, f"max_new_tokens=3&inputs={prompt.replace('&', '%26')}".encode())
    assert gateway.engine.requests[0].inputs == prompt


async def test_a_multipart_form_is_understood(gateway: Gateway) -> None:
    response = await gateway.http.post(
        "/api/v1/generate", files={"inputs": (None, "A 猫"), "max_new_tokens": (None, "3")}
    )
    assert response.json() == THREE_TOKENS
    assert gateway.engine.requests[0].inputs == "A 猫"


async def test_the_query_string_wins_over_the_body(gateway: Gateway) -> None:
    response = await gateway.http.post(
        "/api/v1/generate", params={"max_new_tokens": 3}, json={"inputs": "A cat", "max_new_tokens": 1}
    )
    assert response.json() == THREE_TOKENS


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({}, "invalid_parameter"),
        ({"max_new_tokens": 0}, "invalid_parameter"),
        ({"max_new_tokens": -1}, "invalid_parameter"),
        ({"max_new_tokens": "many"}, "invalid_parameter"),
        ({"max_new_tokens": 1, "temperature": -1}, "invalid_parameter"),
        ({"max_new_tokens": 1, "top_p": 1.5}, "invalid_parameter"),
        ({"max_new_tokens": 1, "model": "no/such"}, "unknown_model"),
        ({"max_new_tokens": 1, "model": "org/private"}, "model_not_public"),
        ({"max_new_tokens": 1, "session_id": "no such"}, "session_expired"),
    ],
)
async def test_an_error_has_status_200_and_one_line_without_frames(
    gateway: Gateway, parameters: dict[str, Any], code: str
) -> None:
    reply = await gateway.generate(inputs="A cat", **parameters)
    assert reply["ok"] is False
    assert reply["code"] == code
    assert "\n" not in reply["traceback"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MissingBlocksError([1]), "MissingBlocksError: No servers holding blocks [1]"),
        (AttentionCacheFullError(), "AttentionCacheFullError: the swarm's attention cache is full"),
    ],
)
async def test_errors_of_the_swarm_carry_the_words_that_clients_look_for(
    gateway: Gateway, error: MissingBlocksError | AttentionCacheFullError, text: str
) -> None:
    gateway.engine.generate_error = error
    reply = await gateway.generate(inputs="A cat", max_new_tokens=1)
    assert reply["traceback"].startswith(text)
    assert gateway.engine.sessions == {}


async def test_a_body_that_is_not_understood_is_an_error(gateway: Gateway) -> None:
    for body in (b"[1, 2]", b'{"inputs":', b'"text"'):
        reply = await raw_post(gateway, body, "Content-Type: application/json")
        assert reply["code"] == "invalid_parameter"


async def test_a_body_over_the_limit_gets_413_in_the_same_shape(gateway: Gateway) -> None:
    response = await gateway.http.post("/api/v1/generate", content=b"x" * 3_000_000)
    assert response.status_code == 413
    assert response.json()["code"] == "message_too_large"


async def test_a_client_that_sends_everything_before_it_reads_sees_the_413_too(gateway: Gateway) -> None:
    url = str(gateway.http.base_url.join("/api/v1/generate"))
    with pytest.raises(urllib.error.HTTPError, match="413") as raised:
        await asyncio.to_thread(urllib.request.urlopen, url, b"x" * 10_000_000)
    assert json.loads(raised.value.read())["code"] == "message_too_large"
    raised.value.close()


async def test_a_body_over_the_limit_gets_413_though_its_length_is_not_announced(gateway: Gateway) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * 100_000

    response = await gateway.http.post("/api/v1/generate", content=pieces())
    assert response.status_code == 413
    assert response.json()["ok"] is False
    assert (await gateway.generate(inputs="A cat", max_new_tokens=3)) == THREE_TOKENS


async def test_a_session_goes_on_from_where_it_is(gateway: Gateway) -> None:
    session_id = await open_session(gateway)
    assert str(uuid.UUID(session_id, version=4)) == session_id
    first = await gateway.generate(session_id=session_id, inputs="A cat", max_new_tokens=1)
    second = await gateway.generate(session_id=session_id, max_new_tokens=1)
    assert [first["outputs"], second["outputs"]] == [" t0", " t1"]
    assert gateway.engine.opened == [("org/model", 1024)]
    close = await gateway.http.get("/api/v1/close_inference_session", params={"session_id": session_id})
    assert close.json() == {"ok": True}
    reply = await gateway.generate(session_id=session_id, max_new_tokens=1)
    assert reply["traceback"].startswith(f"SessionExpiredError: Session {session_id} expired")


async def test_sessions_are_opened_and_closed_by_post_too(gateway: Gateway) -> None:
    opened = await gateway.http.post("/api/v1/open_inference_session", data={"max_length": "64"})
    session_id = opened.json()["session_id"]
    assert gateway.engine.opened == [("org/model", 64)]
    closed = await gateway.http.post("/api/v1/close_inference_session", json={"session_id": session_id})
    assert closed.json() == {"ok": True}


async def test_a_session_without_a_length_fits_into_a_small_model(gateway: Gateway) -> None:
    gateway.engine.statuses["org/model"] = type(gateway.engine)("m", max_session_length=512).statuses["m"]
    await open_session(gateway)
    assert gateway.engine.opened == [("org/model", 512)]


async def test_a_session_longer_than_the_model_allows_is_refused(gateway: Gateway) -> None:
    response = await gateway.http.get("/api/v1/open_inference_session", params={"max_length": 10**6})
    assert response.json()["traceback"].startswith("MaximumLengthExceededError: Maximum length exceeded")


async def test_a_model_that_was_named_when_opening_must_be_named_always(gateway: Gateway) -> None:
    session_id = await open_session(gateway, model="old/name")
    missing = await gateway.generate(session_id=session_id, max_new_tokens=1)
    other = await gateway.generate(session_id=session_id, model="org/private", max_new_tokens=1)
    assert missing["code"] == other["code"] == "invalid_parameter"
    same = await gateway.generate(session_id=session_id, model="org/model", max_new_tokens=1)
    assert same["outputs"] == " t0"


async def test_requests_in_one_session_are_done_one_after_the_other(gateway: Gateway) -> None:
    session_id = await open_session(gateway)
    replies = await asyncio.gather(
        *(gateway.generate(session_id=session_id, inputs="A", max_new_tokens=2) for _ in range(3))
    )
    assert sorted(reply["outputs"] for reply in replies) == [" t0 t1", " t2 t3", " t4 t5"]


async def test_too_many_requests_in_one_session_are_refused() -> None:
    async with running_gateway(settings_with(limits={"max_pending_requests": 1})) as gateway:
        session_id = await open_session(gateway)
        gateway.engine.may_generate.clear()
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(gateway.generate(session_id=session_id, inputs="A", max_new_tokens=1))
                for _ in range(3)
            ]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            gateway.engine.may_generate.set()
        assert sorted(task.result().get("code", "") for task in asked) == ["", "", "too_many_requests"]


async def test_closing_a_session_ends_what_runs_in_it(gateway: Gateway) -> None:
    session_id = await open_session(gateway)
    gateway.engine.may_generate.clear()
    async with asyncio.TaskGroup() as tasks:
        generation = tasks.create_task(gateway.generate(session_id=session_id, inputs="A", max_new_tokens=1))
        await until(lambda: gateway.engine.running)
        await gateway.http.get("/api/v1/close_inference_session", params={"session_id": session_id})
    assert generation.result()["code"] == "session_expired"


async def test_an_idle_session_expires() -> None:
    async with running_gateway(settings_with(limits={"session_idle_timeout_seconds": 0.1})) as gateway:
        session_id = await open_session(gateway)
        await until(lambda: not gateway.engine.sessions)
        reply = await gateway.generate(session_id=session_id, inputs="A", max_new_tokens=1)
        assert reply["code"] == "session_expired"


async def test_a_session_that_generates_does_not_expire() -> None:
    async with running_gateway(settings_with(limits={"session_idle_timeout_seconds": 0.1})) as gateway:
        session_id = await open_session(gateway)
        gateway.engine.may_generate.clear()
        async with asyncio.TaskGroup() as tasks:
            generation = tasks.create_task(
                gateway.generate(session_id=session_id, inputs="A", max_new_tokens=1)
            )
            await until(lambda: gateway.engine.running)
            await asyncio.sleep(0.4)
            gateway.engine.may_generate.set()
        assert generation.result()["outputs"] == " t0"


async def test_a_failed_generation_leaves_its_session_usable(gateway: Gateway) -> None:
    session_id = await open_session(gateway)
    gateway.engine.generate_error = MissingBlocksError([1])
    assert (await gateway.generate(session_id=session_id, inputs="A", max_new_tokens=1))["ok"] is False
    gateway.engine.generate_error = None
    assert (await gateway.generate(session_id=session_id, max_new_tokens=1))["ok"] is True


async def test_a_lost_worker_takes_its_session_along(gateway: Gateway) -> None:
    session_id = await open_session(gateway)
    gateway.engine.generate_error = WorkerLostError("org/model")
    assert (await gateway.generate(session_id=session_id, inputs="A", max_new_tokens=1))[
        "code"
    ] == "worker_lost"
    gateway.engine.generate_error = None
    assert (await gateway.generate(session_id=session_id, max_new_tokens=1))["code"] == "session_expired"


async def test_sessions_of_both_apis_share_one_limit() -> None:
    async with running_gateway(settings_with(limits={"max_sessions": 1})) as gateway:
        session_id = await open_session(gateway)
        async with gateway.connect() as client:
            await client.send('{"type": "open_inference_session", "max_length": 64}')
            assert json.loads(await client.recv())["code"] == "too_many_requests"
        assert (await gateway.generate(inputs="A", max_new_tokens=1))["code"] == "too_many_requests"
        await gateway.http.get("/api/v1/close_inference_session", params={"session_id": session_id})
        assert (await gateway.generate(inputs="A", max_new_tokens=1))["ok"] is True


async def test_a_client_that_goes_away_ends_its_generation(gateway: Gateway) -> None:
    gateway.engine.may_generate.clear()
    _, writer = await asyncio.open_connection(*gateway.address.split(":"))
    writer.write(b"POST /api/v1/generate?inputs=A&max_new_tokens=1 HTTP/1.1\r\nHost: test\r\n\r\n")
    await until(lambda: gateway.engine.running)
    writer.close()
    await writer.wait_closed()
    await until(lambda: not gateway.engine.running and not gateway.engine.sessions)


async def test_a_generation_past_its_deadline_gets_an_error() -> None:
    async with running_gateway(settings_with(limits={"request_timeout_seconds": 0.2})) as gateway:
        gateway.engine.may_generate.clear()
        assert (await gateway.generate(inputs="A", max_new_tokens=1))["code"] == "deadline_exceeded"


async def test_a_server_that_stops_tells_who_still_waits() -> None:
    async with running_gateway() as gateway:
        gateway.engine.may_generate.clear()
        reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
        writer.write(b"POST /api/v1/generate?inputs=A&max_new_tokens=1 HTTP/1.1\r\nHost: test\r\n\r\n")
        await until(lambda: gateway.engine.running)
    assert b"the server is being stopped" in await reader.read()
    writer.close()
    await writer.wait_closed()


async def test_an_unexpected_exception_is_an_internal_error_without_details(gateway: Gateway) -> None:
    gateway.engine.generate_error = ZeroDivisionError("secret")
    reply = await gateway.generate(inputs="A", max_new_tokens=1)
    assert reply["traceback"] == "InternalError: an internal error; the server's log has the details"


async def test_the_own_page_may_use_a_model_without_public_api(gateway: Gateway) -> None:
    response = await gateway.http.post(
        "/api/v1/generate",
        json={"model": "org/private", "inputs": "A", "max_new_tokens": 3},
        headers={"Origin": f"http://{gateway.address}"},
    )
    assert response.json() == THREE_TOKENS


async def test_a_session_of_a_model_without_public_api_serves_the_own_page_alone(gateway: Gateway) -> None:
    own_page = {"Origin": f"http://{gateway.address}"}
    opened = await gateway.http.post(
        "/api/v1/open_inference_session", json={"model": "org/private"}, headers=own_page
    )
    request = {"session_id": opened.json()["session_id"], "model": "org/private", "max_new_tokens": 3}
    assert (await gateway.generate(**request))["code"] == "model_not_public"
    response = await gateway.http.post("/api/v1/generate", json=request, headers=own_page)
    assert response.json() == THREE_TOKENS


async def test_prompts_in_query_strings_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with running_gateway(settings_with(server={"log_level": "debug"})) as gateway:
        await raw_post(gateway, b"", path="/api/v1/generate?max_new_tokens=1&inputs=secret")
    logged = [record.getMessage() for record in caplog.records]
    assert [message for message in logged if '"POST /api/v1/generate HTTP/1.1" 200' in message]
    assert not [message for message in logged if "secret" in message]
