"""API v1: how parameters may arrive, what replies look like, and sessions between requests."""

from __future__ import annotations

import json
import socket
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.contract.serving import Server
from tests.contract.wire import TIMEOUT_SECONDS

OpenSession = Callable[..., str]

FORM = "application/x-www-form-urlencoded"
JSON = "application/json"
HELLO = {"ok": True, "outputs": "! Hello"}


def post(http: httpx.Client, body: str | bytes, content_type: str | None) -> Any:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = http.post("/api/v1/generate", content=body, headers=headers)
    assert response.status_code == 200
    return response.json()


def post_raw(server: Server, body: bytes, content_type: str = FORM) -> Any:
    """What a program sends that writes its HTTP by hand."""
    host, _, port = server.address.partition(":")
    head = (
        f"POST /api/v1/generate HTTP/1.1\r\nHost: {server.address}\r\nConnection: close\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS) as client:
        client.sendall(head.encode() + body)
        reply = b"".join(iter(lambda: client.recv(65536), b""))
    status, _, rest = reply.partition(b"\r\n")
    assert status == b"HTTP/1.1 200 OK"
    return json.loads(rest.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("content_type", [JSON, "application/json; charset=utf-8", FORM, "text/plain", None])
def test_a_json_object_is_understood_under_any_content_type(
    http: httpx.Client, content_type: str | None
) -> None:
    assert post(http, '{"inputs": "B", "max_new_tokens": 2, "top_k": null}', content_type) == HELLO


@pytest.mark.parametrize("content_type", [FORM, f"{FORM}; charset=UTF-8", JSON, "text/plain", None])
def test_a_form_is_understood_under_any_content_type(http: httpx.Client, content_type: str | None) -> None:
    assert post(http, "inputs=B&max_new_tokens=2&do_sample=0&temperature=&num_beams=1", content_type) == HELLO


def test_a_multipart_form_is_understood(http: httpx.Client) -> None:
    fields = {"inputs": (None, "B"), "max_new_tokens": (None, "2")}
    assert http.post("/api/v1/generate", files=fields).json() == HELLO


def test_a_multipart_form_under_the_type_of_another_form_is_understood(server: Server) -> None:
    body = (
        b'--line\r\nContent-Disposition: form-data; name="inputs"\r\n\r\nB\r\n'
        b'--line\r\nContent-Disposition: form-data; name="max_new_tokens"\r\n\r\n2\r\n--line--\r\n'
    )
    assert post_raw(server, body) == HELLO


def test_the_query_string_is_understood(http: httpx.Client) -> None:
    assert http.post("/api/v1/generate?inputs=B&max_new_tokens=2").json() == HELLO


def test_parameters_may_be_split_between_query_string_and_body(http: httpx.Client) -> None:
    reply = http.post("/api/v1/generate?max_new_tokens=2", data={"inputs": "B"}).json()
    assert reply == HELLO


@pytest.mark.parametrize(
    "body",
    [
        b"inputs=Who [are] you? A: B&max_new_tokens=2",
        'inputs=Wer bist {du}, 你好, "B" B&max_new_tokens=2'.encode(),
        b"max_new_tokens=2&inputs=100% of it\n\nB",
    ],
    ids=repr,
)
@pytest.mark.parametrize("content_type", [FORM, "text/plain", JSON])
def test_a_body_that_is_not_percent_encoded_is_understood(
    server: Server, body: bytes, content_type: str
) -> None:
    assert post_raw(server, body, content_type) == HELLO


def test_a_query_string_that_is_not_percent_encoded_is_understood(server: Server) -> None:
    host, _, port = server.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS) as client:
        client.sendall(
            b"POST /api/v1/generate?max_new_tokens=2&inputs=[B]{B}|B HTTP/1.1\r\n"
            b"Host: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        reply = b"".join(iter(lambda: client.recv(65536), b""))
    assert json.loads(reply.partition(b"\r\n\r\n")[2]) == HELLO


def test_pythons_own_client_is_served(server: Server) -> None:
    body = urllib.parse.urlencode({"inputs": "你好 B", "max_new_tokens": 2}).encode()
    with urllib.request.urlopen(f"{server.url}/api/v1/generate", body, TIMEOUT_SECONDS) as response:
        assert json.load(response) == HELLO


def test_characters_come_as_utf8(http: httpx.Client) -> None:
    response = http.post("/api/v1/generate", data={"inputs": "A", "max_new_tokens": "10"})
    assert response.headers["content-type"] == "application/json"
    assert "😀世界".encode() in response.content


def generate_in(http: httpx.Client, session_id: str, **parameters: Any) -> Any:
    return http.post("/api/v1/generate", json={"session_id": session_id, **parameters}).json()


def test_a_session_has_a_uuid(http: httpx.Client, open_session: OpenSession) -> None:
    session_id = open_session(max_length=1024)
    assert str(uuid.UUID(session_id)) == session_id


@pytest.mark.parametrize("go_on", [{}, {"inputs": None}, {"inputs": ""}], ids=str)
def test_a_session_goes_on_without_its_prefix(
    http: httpx.Client, go_on: dict[str, Any], open_session: OpenSession
) -> None:
    session_id = open_session(max_length=1024)
    assert generate_in(http, session_id, inputs="B", max_new_tokens=2) == HELLO
    assert generate_in(http, session_id, **go_on, max_new_tokens=2)["outputs"] == " Hello Hello"
    assert generate_in(http, session_id, inputs="A", max_new_tokens=4)["outputs"] == "😀"
    assert generate_in(http, session_id, **go_on, max_new_tokens=6)["outputs"] == "世界"


def test_max_length_counts_what_the_session_had_before(http: httpx.Client, open_session: OpenSession) -> None:
    session_id = open_session(max_length=1024)
    assert generate_in(http, session_id, inputs="B", max_length=4)["outputs"] == "! Hello Hello"
    assert generate_in(http, session_id, max_length=6)["outputs"] == " Hello Hello"


def test_a_session_has_room_for_max_length_tokens(http: httpx.Client, open_session: OpenSession) -> None:
    session_id = open_session(max_length=4)
    assert generate_in(http, session_id, inputs="B", max_new_tokens=4096)["outputs"] == "! Hello Hello"
    error = generate_in(http, session_id, max_new_tokens=1)
    assert "Maximum length exceeded" in error["traceback"]


def test_sessions_are_opened_and_closed_by_post_too(http: httpx.Client) -> None:
    reply = http.post("/api/v1/open_inference_session", data={"max_length": "64"}).json()
    session_id = reply["session_id"]
    assert generate_in(http, session_id, inputs="B", max_new_tokens=2) == HELLO
    reply = http.post("/api/v1/close_inference_session", json={"session_id": session_id}).json()
    assert reply == {"ok": True}


def test_a_closed_session_has_expired(http: httpx.Client, open_session: OpenSession) -> None:
    session_id = open_session(max_length=64)
    close = {"session_id": session_id}
    assert http.get("/api/v1/close_inference_session", params=close).json() == {"ok": True}
    error = generate_in(http, session_id, inputs="B", max_new_tokens=1)
    assert f"Session {session_id} expired" in error["traceback"]
    error = http.get("/api/v1/close_inference_session", params=close).json()
    assert f"Session {session_id} expired" in error["traceback"]


@pytest.mark.parametrize("session_id", ["30f0fe68-f022-43e0-939f-927f3049a10d", "no-such", "x" * 10_000])
def test_an_unknown_session_has_expired(http: httpx.Client, session_id: str) -> None:
    error = generate_in(http, session_id, inputs="B", max_new_tokens=1)
    assert (error["ok"], error["code"]) == (False, "session_expired")
    assert error["traceback"].startswith("SessionExpiredError: Session ")
    assert " expired" in error["traceback"]


@pytest.mark.parametrize("named", ["reciting", "old/name"])
def test_a_model_named_when_opening_must_be_named_always(
    http: httpx.Client, named: str, open_session: OpenSession
) -> None:
    session_id = open_session(max_length=64, model=named)
    for model in ({}, {"model": None}, {"model": "byte_level"}):
        error = generate_in(http, session_id, inputs="B", max_new_tokens=2, **model)
        assert (error["ok"], error["code"]) == (False, "invalid_parameter")
        assert error["traceback"].startswith("InvalidParameterError: model: ")
    for name in ("reciting", "old/name"):
        assert generate_in(http, session_id, inputs="B", max_new_tokens=2, model=name) == HELLO


def test_a_request_that_fails_leaves_its_session_as_it_was(
    http: httpx.Client, open_session: OpenSession
) -> None:
    session_id = open_session(max_length=64)
    assert generate_in(http, session_id, inputs="B", max_new_tokens=2) == HELLO
    assert generate_in(http, session_id, inputs="A" * 100, max_new_tokens=2)["ok"] is False
    assert generate_in(http, session_id, inputs="A")["ok"] is False
    assert generate_in(http, session_id, max_new_tokens=2)["outputs"] == " Hello Hello"


def test_requests_in_one_session_are_done_in_order(
    server: Server, http: httpx.Client, open_session: OpenSession
) -> None:
    """100 requests on one connection, all sent before the first reply is read."""
    session_id = open_session(max_length=200)
    body = json.dumps({"session_id": session_id, "max_new_tokens": 1}).encode()
    first = json.dumps({"session_id": session_id, "inputs": "B", "max_new_tokens": 1}).encode()
    host, _, port = server.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS) as client:
        for number in range(100):
            sent = body if number else first
            last = b"Connection: close\r\n" if number == 99 else b""
            client.sendall(
                b"POST /api/v1/generate HTTP/1.1\r\nHost: localhost\r\n"
                b"%bContent-Length: %d\r\n\r\n%b" % (last, len(sent), sent)
            )
        replies = b"".join(iter(lambda: client.recv(65536), b""))
    assert replies.count(b'{"ok":true,"outputs":"!"}') == 1
    assert replies.count(b'{"ok":true,"outputs":" Hello"}') == 99
    assert replies.index(b'"!"') < replies.index(b'" Hello"')
