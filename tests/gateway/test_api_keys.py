"""Keys and limits over a real server, in all APIs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from petals_chat.gateway.api_keys import PAGE_COOKIE, PagePasses
from petals_chat.gateway.clients import hash_of
from petals_chat.settings import ApiKeySettings, ApiSettings
from tests.gateway.gateways import Gateway, running_gateway, settings_with, until

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {
    "model": "org/model",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 2,
}
ADA = {"Authorization": "Bearer sk-ada"}
BOB = {"Authorization": "Bearer sk-bob"}
KEYS = (
    ApiKeySettings(name="ada", hash=hash_of("sk-ada")),
    ApiKeySettings(name="bob", hash=hash_of("sk-bob"), models=("org/private",), requests_per_minute=2),
)


@asynccontextmanager
async def gateway_with(**api: Any) -> AsyncIterator[Gateway]:
    async with running_gateway(settings_with(api=ApiSettings(**api))) as gateway:
        yield gateway


async def test_without_keys_everybody_is_let_in_whatever_they_send() -> None:
    async with gateway_with() as gateway:
        for headers in ({}, ADA):
            response = await gateway.http.post(CHAT, json=HELLO, headers=headers)
            assert response.status_code == 200
            assert not [name for name in response.headers if name.startswith("x-ratelimit")]


async def test_with_keys_each_api_needs_one() -> None:
    async with gateway_with(keys=KEYS) as gateway:
        for wrong in ({}, {"Authorization": "Bearer sk-eve"}, {"Authorization": "Basic sk-ada"}):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("POST", "/tokenize")):
                response = await gateway.http.request(method, path, json=HELLO, headers=wrong)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
            response = await gateway.http.post("/api/v1/generate", json={"inputs": "A"}, headers=wrong)
            assert (response.status_code, response.json()["code"]) == (401, "invalid_api_key")
            with pytest.raises(InvalidStatus) as caught:
                async with gateway.connect(additional_headers=wrong):
                    pass
            assert caught.value.response.status_code == 401
            assert json.loads(caught.value.response.body or b"")["code"] == "invalid_api_key"
        assert (await gateway.http.post(CHAT, json=HELLO, headers=ADA)).status_code == 200
        reply = await gateway.http.post(
            "/api/v1/generate", json={"inputs": "A", "max_new_tokens": 1}, headers=ADA
        )
        assert reply.json()["ok"]
        async with gateway.connect(additional_headers=ADA) as websocket:
            await websocket.send('{"type": "open_inference_session", "max_length": 16}')
            assert json.loads(await websocket.recv())["ok"]
        assert (await gateway.http.get("/healthz")).status_code == 200


async def test_a_client_is_known_by_its_key() -> None:
    async with gateway_with(keys=KEYS) as gateway:
        await gateway.http.post(CHAT, json=HELLO, headers=ADA)
        assert gateway.engine.owners_of_stateless == ["key:ada"]


async def test_a_key_may_be_for_some_models_only() -> None:
    async with gateway_with(keys=KEYS) as gateway:
        page = {"Origin": f"http://{gateway.address}"}
        models = (await gateway.http.get("/v1/models", headers=BOB)).json()["data"]
        assert [model["id"] for model in models] == ["org/private"]
        for response in (
            await gateway.http.post(CHAT, json=HELLO, headers=BOB),
            await gateway.http.get("/v1/models/org/model", headers=BOB),
        ):
            assert (response.status_code, response.json()["error"]["code"]) == (403, "model_not_allowed")
        async with gateway.connect(additional_headers=BOB) as websocket:
            await websocket.send('{"type": "open_inference_session", "max_length": 16}')
            assert json.loads(await websocket.recv())["code"] == "model_not_allowed"
        allowed = {**HELLO, "model": "org/private"}
        assert (await gateway.http.post(CHAT, json=allowed, headers=BOB | page)).status_code == 200


async def test_limits_are_told_in_headers_and_in_the_error() -> None:
    async with gateway_with(requests_per_minute=2, tokens_per_minute=1000) as gateway:
        left = []
        for _ in range(2):
            response = await gateway.http.post(CHAT, json=HELLO)
            assert response.status_code == 200
            left.append(int(response.headers["x-ratelimit-remaining-requests"]))
        assert left == [1, 0]
        for is_stream in (False, True):
            response = await gateway.http.post(CHAT, json={**HELLO, "stream": is_stream})
            assert response.status_code == 429
            assert 1 <= int(response.headers["retry-after"]) <= 30
            assert response.headers["x-ratelimit-limit-tokens"] == "1000"
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        reply = await gateway.generate(inputs="A", max_new_tokens=1)
        assert reply["code"] == "rate_limit_exceeded"


async def test_several_answers_wait_for_each_other_where_few_may_run_at_once() -> None:
    async with gateway_with(concurrent_generations=1) as gateway:
        response = await gateway.http.post(CHAT, json={**HELLO, "n": 3})
        assert len(response.json()["choices"]) == 3
        gateway.engine.may_generate.clear()
        first = asyncio.create_task(gateway.http.post(CHAT, json=HELLO))
        await until(lambda: gateway.engine.running == 1)
        assert (await gateway.http.post(CHAT, json=HELLO)).status_code == 429
        gateway.engine.may_generate.set()
        assert (await first).status_code == 200


async def test_the_page_needs_its_cookie_and_no_key() -> None:
    settings = ApiSettings(keys=KEYS)
    async with gateway_with(keys=KEYS) as gateway:
        passed = {
            "Origin": f"http://{gateway.address}",
            "Cookie": f"{PAGE_COOKIE}={PagePasses(settings).make()}",
        }
        assert (await gateway.http.post(CHAT, json=HELLO, headers=passed)).status_code == 200
        async with gateway.connect(additional_headers=passed):
            pass
        for wrong in (
            {"Origin": passed["Origin"]},
            {"Cookie": passed["Cookie"]},
            {**passed, "Origin": "http://evil.example"},
            {**passed, "Cookie": f"{PAGE_COOKIE}=1.{'0' * 64}"},
            {**passed, "Cookie": f"{PAGE_COOKIE}=\xe9.x"},
        ):
            encoded = {name.encode(): value.encode("latin-1") for name, value in wrong.items()}
            assert (await gateway.http.post(CHAT, json=HELLO, headers=encoded)).status_code == 401


def test_a_pass_is_for_one_configuration_and_some_weeks(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = PagePasses(ApiSettings(keys=KEYS))
    value = passes.make()
    assert passes.is_valid(value)
    assert PagePasses(ApiSettings(keys=KEYS[::-1])).is_valid(value)
    assert not PagePasses(ApiSettings(keys=KEYS[:1])).is_valid(value)
    monkeypatch.setattr("petals_chat.gateway.api_keys.PAGE_SECONDS", -1)
    assert not passes.is_valid(passes.make())
    assert not passes.is_valid("9" * 5000)
