"""The application as a whole: documentation, CORS, unknown addresses, start and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from petals_chat.errors import ConfigurationError
from petals_chat.gateway.app import create_app
from tests.asgi_server import running_server
from tests.fakes import FakeEngine
from tests.gateway.gateways import MODEL, Gateway, running_gateway, settings_with


async def test_an_unknown_address_gets_an_error_in_the_usual_shape(gateway: Gateway) -> None:
    response = await gateway.http.get("/api/v1/no-such")
    assert response.status_code == 404
    assert response.json() == {
        "ok": False,
        "code": "not_found",
        "traceback": "NotFoundError: GET is not answered at this address",
    }


async def test_a_wrong_method_gets_an_error_in_the_usual_shape(gateway: Gateway) -> None:
    response = await gateway.http.get("/api/v1/generate")
    assert response.status_code == 405
    assert response.json()["code"] == "method_not_allowed"


async def test_pages_of_any_origin_may_call_the_api_by_default(gateway: Gateway) -> None:
    origin = {"Origin": "https://elsewhere.example"}
    preflight = await gateway.http.options(
        "/api/v1/generate",
        headers={
            **origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "content-type" in preflight.headers["access-control-allow-headers"].lower()
    response = await gateway.http.post("/api/v1/generate", json={"max_new_tokens": 1}, headers=origin)
    assert response.headers["access-control-allow-origin"] == "*"


async def test_origins_can_be_restricted() -> None:
    settings = settings_with(server={"cors_origins": ["https://friend.example"]})
    async with running_gateway(settings) as gateway:
        allowed = {}
        for origin in ("https://friend.example", "https://elsewhere.example"):
            response = await gateway.http.get("/healthz", headers={"Origin": origin})
            allowed[origin] = response.headers.get("access-control-allow-origin")
    assert allowed == {"https://friend.example": "https://friend.example", "https://elsewhere.example": None}


async def test_the_documentation_describes_every_parameter_of_v1(gateway: Gateway) -> None:
    assert (await gateway.http.get("/docs")).status_code == 200
    paths = (await gateway.http.get("/openapi.json")).json()["paths"]
    body = paths["/api/v1/generate"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "application/x-www-form-urlencoded", "multipart/form-data"}
    properties: dict[str, Any] = body["application/json"]["schema"]["properties"]
    assert {"inputs", "max_new_tokens", "max_length", "session_id", "temperature", "seed"} <= set(properties)
    assert all(description["description"] for description in properties.values())
    assert body["application/json"]["example"] == {"inputs": "A cat sat on", "max_new_tokens": 16}
    for path in ("/api/v1/open_inference_session", "/api/v1/close_inference_session"):
        assert set(paths[path]) == {"get", "post"}
        assert all(parameter["description"] for parameter in paths[path]["get"]["parameters"])


async def test_the_examples_of_the_documentation_work(gateway: Gateway) -> None:
    paths = (await gateway.http.get("/openapi.json")).json()["paths"]
    for path in ("/api/v1/generate", "/api/v1/open_inference_session"):
        example = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert (await gateway.http.post(path, json=example)).json()["ok"] is True


async def test_the_engines_lifetime_encloses_the_apps() -> None:
    engine = FakeEngine(MODEL.key)
    events = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        events.append("started")
        yield
        events.append(f"ended with {len(engine.sessions)} sessions")

    settings = settings_with(models=(MODEL,))
    app = create_app(settings, engine, lifespan=lifespan())
    async with (
        running_server(app, settings) as address,
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        assert events == ["started"]
        assert (await client.get("/api/v1/open_inference_session")).json()["ok"] is True
        assert len(engine.sessions) == 1
    assert events == ["started", "ended with 0 sessions"]


async def test_an_unexpected_exception_outside_the_apis_is_an_internal_error(gateway: Gateway) -> None:
    del gateway.engine.statuses["org/model"]
    response = await gateway.http.get("/readyz")
    assert response.status_code == 500
    assert response.json()["traceback"].startswith("InternalError: ")


def test_an_app_without_models_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        create_app(settings_with(models=()), FakeEngine())


async def test_many_clients_are_served_at_once(gateway: Gateway) -> None:
    replies = await asyncio.gather(*(gateway.generate(inputs="A cat", max_new_tokens=20) for _ in range(50)))
    assert len({reply["outputs"] for reply in replies}) == 1
    assert replies[0]["outputs"].endswith(" t19")
