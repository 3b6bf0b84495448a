"""Who may call from where: CORS, and models that only the server's own page may use."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect
from websockets.typing import Origin

from tests.contract.serving import Server
from tests.contract.wire import OPEN, receive, receive_error

ELSEWHERE = "https://elsewhere.example"
PRIVATE = {"model": "private", "inputs": "Hello", "max_new_tokens": 2}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_any_origin_may_ask_whether_they_may(http: httpx.Client, method: str) -> None:
    preflight = {
        "Origin": ELSEWHERE,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "content-type, x-own",
    }
    response = http.options("/api/v1/generate", headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert method in response.headers["access-control-allow-methods"]
    assert "content-type" in response.headers["access-control-allow-headers"].lower()


@pytest.mark.parametrize("origin", [ELSEWHERE, "null"])
@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/v1/generate", b"inputs=B&max_new_tokens=1", 200),
        ("POST", "/api/v1/generate", b"a request that fails", 200),
        ("POST", "/api/v1/generate", b"x" * 2_000_000, 413),
        ("GET", "/api/v1/open_inference_session", b"", 200),
        ("GET", "/api/v1/no-such", b"", 404),
        ("GET", "/api/status", b"", 200),
        ("GET", "/healthz", b"", 200),
    ],
    ids=lambda value: str(value)[:30],
)
def test_pages_of_any_origin_may_read_the_replies(
    http: httpx.Client, origin: str, method: str, path: str, body: bytes, status: int
) -> None:
    response = http.request(method, path, content=body, headers={"Origin": origin})
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", [None, ELSEWHERE, "null", "not an origin"])
def test_websockets_of_any_origin_are_served(server: Server, origin: str | None) -> None:
    with connect(server.v2_url, origin=None if origin is None else Origin(origin)) as client:
        client.send(OPEN)
        client.send('{"type": "generate", "inputs": "B", "max_new_tokens": 1}')
        assert receive(client) == {"ok": True}
        assert receive(client)["outputs"] == "!"


def foreign_origins(server: Server) -> list[str | None]:
    host, _, port = server.address.partition(":")
    return [
        None,
        ELSEWHERE,
        "null",
        f"https://{server.address}",
        f"http://{host}",
        f"http://localhost:{port}1",
    ]


def from_origin(origin: str | None) -> dict[str, str]:
    return {} if origin is None else {"Origin": origin}


def assert_not_public(error: Any) -> None:
    assert (error["ok"], error["code"]) == (False, "model_not_public")
    assert error["traceback"].startswith("ModelNotPublicError: ")


def test_a_model_without_public_api_is_refused_elsewhere_in_v1(server: Server, http: httpx.Client) -> None:
    for origin in foreign_origins(server):
        headers = from_origin(origin)
        assert_not_public(http.post("/api/v1/generate", json=PRIVATE, headers=headers).json())
        opening = "/api/v1/open_inference_session?model=private&max_length=64"
        assert_not_public(http.get(opening, headers=headers).json())


def test_a_model_without_public_api_is_refused_elsewhere_in_v2(server: Server) -> None:
    for origin in foreign_origins(server):
        with connect(server.v2_url, origin=None if origin is None else Origin(origin)) as client:
            client.send('{"type": "open_inference_session", "model": "private", "max_length": 64}')
            assert_not_public(receive_error(client))


def test_the_servers_own_page_may_use_a_model_without_public_api_in_v1(
    server: Server, http: httpx.Client
) -> None:
    reply = http.post("/api/v1/generate", json=PRIVATE, headers={"Origin": server.url}).json()
    assert reply["ok"] is True


def test_the_servers_own_page_may_use_a_model_without_public_api_in_v2(server: Server) -> None:
    with connect(server.v2_url, origin=Origin(server.url)) as client:
        client.send('{"type": "open_inference_session", "model": "private", "max_length": 64}')
        client.send(json.dumps({"type": "generate", **PRIVATE}))
        assert receive(client) == {"ok": True}
        assert receive(client)["token_count"] == 2


def test_the_pages_session_is_not_for_others(server: Server, http: httpx.Client) -> None:
    own = {"Origin": server.url}
    opening = "/api/v1/open_inference_session?model=private&max_length=64"
    session_id = http.get(opening, headers=own).json()["session_id"]
    request = {**PRIVATE, "session_id": session_id}
    assert_not_public(http.post("/api/v1/generate", json=request).json())
    assert http.post("/api/v1/generate", json=request, headers=own).json()["ok"] is True


def test_a_refusal_can_be_read_by_the_page_that_is_refused(http: httpx.Client) -> None:
    response = http.post("/api/v1/generate", json=PRIVATE, headers={"Origin": ELSEWHERE})
    assert response.headers["access-control-allow-origin"] == "*"
