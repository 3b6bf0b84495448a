"""API v1 and what is wrong with requests: each gets its clear error, and the next client is served."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from tests.contract.serving import Server
from tests.contract.wire import TIMEOUT_SECONDS

pytestmark = pytest.mark.usefixtures("next_client_is_served")

HUGE = 10_000_000
"""Bytes; ten times what the server takes."""


def error_of(response: httpx.Response, status: int = 200) -> Any:
    """The reply, which must be an error of one line without anything of the server's insides."""
    assert response.status_code == status
    error = response.json()
    assert set(error) == {"ok", "code", "traceback"}
    assert error["ok"] is False
    assert "\n" not in error["traceback"]
    return error


@pytest.mark.parametrize(
    ("parameters", "code", "part"),
    [
        ({"model": "no/such"}, "unknown_model", "KeyError: model 'no/such' is not served here"),
        ({"model": "x" * 10_000}, "unknown_model", "KeyError"),
        ({"model": 5}, "invalid_parameter", "model: "),
        ({"model": "../../etc/passwd"}, "unknown_model", "KeyError"),
        ({"max_new_tokens": None}, "invalid_parameter", "max_new_tokens: it is missing"),
        ({"max_new_tokens": 0}, "invalid_parameter", "max_new_tokens: "),
        ({"max_new_tokens": -1}, "invalid_parameter", "max_new_tokens: "),
        ({"max_new_tokens": 1.5}, "invalid_parameter", "max_new_tokens: "),
        ({"max_new_tokens": "many"}, "invalid_parameter", "max_new_tokens: "),
        ({"max_new_tokens": "NaN"}, "invalid_parameter", "max_new_tokens: "),
        ({"max_new_tokens": [1]}, "invalid_parameter", "max_new_tokens: "),
        ({"max_new_tokens": {"a": 1}}, "invalid_parameter", "max_new_tokens: "),
        ({"max_new_tokens": True}, "invalid_parameter", "max_new_tokens: "),
        ({"max_new_tokens": None, "max_length": -(10**40)}, "invalid_parameter", "max_length: "),
        ({"max_new_tokens": None, "max_length": 1}, "maximum_length_exceeded", "Maximum length exceeded"),
        ({"do_sample": 2}, "invalid_parameter", "do_sample: "),
        ({"do_sample": "maybe"}, "invalid_parameter", "do_sample: "),
        ({"do_sample": []}, "invalid_parameter", "do_sample: "),
        ({"temperature": -1}, "invalid_parameter", "temperature: "),
        ({"temperature": "NaN"}, "invalid_parameter", "temperature: "),
        ({"temperature": "inf"}, "invalid_parameter", "temperature: "),
        ({"temperature": 1e300}, "invalid_parameter", "temperature: "),
        ({"temperature": [0.5]}, "invalid_parameter", "temperature: "),
        ({"top_k": -1}, "invalid_parameter", "top_k: "),
        ({"top_k": 0.5}, "invalid_parameter", "top_k: "),
        ({"top_p": 1.1}, "invalid_parameter", "top_p: "),
        ({"top_p": "nan"}, "invalid_parameter", "top_p: "),
        ({"repetition_penalty": 0}, "invalid_parameter", "repetition_penalty: "),
        ({"repetition_penalty": -1}, "invalid_parameter", "repetition_penalty: "),
        ({"seed": -1}, "invalid_parameter", "seed: "),
        ({"seed": 2**64}, "invalid_parameter", "seed: "),
        ({"inputs": None}, "invalid_parameter", "inputs: "),
        ({"inputs": ""}, "invalid_parameter", "inputs: "),
        ({"inputs": 5}, "invalid_parameter", "inputs: "),
        ({"inputs": ["A"]}, "invalid_parameter", "inputs: "),
        ({"inputs": {"text": "A"}}, "invalid_parameter", "inputs: "),
        ({"inputs": "A" * 100_000}, "maximum_length_exceeded", "Maximum length exceeded"),
        ({"session_id": 5}, "invalid_parameter", "session_id: "),
        ({"session_id": [None]}, "invalid_parameter", "session_id: "),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_parameter_that_cannot_be_used_is_named(
    http: httpx.Client, parameters: dict[str, Any], code: str, part: str
) -> None:
    request = {"inputs": "A", "max_new_tokens": 2, **parameters}
    error = error_of(http.post("/api/v1/generate", json=request))
    assert error["code"] == code
    assert part in error["traceback"]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "max_new_tokens"),
        (b"   \n", "max_new_tokens"),
        (b"hello", "max_new_tokens"),
        (b"\0\0\0", "max_new_tokens"),
        (b"\xff\xfe", "not UTF-8"),
        (b"inputs=%FF&max_new_tokens=1", "not UTF-8"),
        (b"inputs=%ED%A0%80&max_new_tokens=1", "not UTF-8"),  # a surrogate, encoded as if it were a character
        (b"{", "not valid JSON"),
        (b'{"inputs": "A", "max_new_tokens": NaN}', "not valid JSON"),
        (b'{"inputs": "A", "max_new_tokens": 1e999}', "not valid JSON"),
        (b'{"inputs": "\\ud800", "max_new_tokens": 1}', "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"&" * 100_000, "fields"),
        (b"a=1&" * 10_000, "fields"),
        (b'--x\r\nContent-Disposition: form-data; name="inputs"\r\n\r\nA', "multipart"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_body_that_cannot_be_used_is_explained(http: httpx.Client, body: bytes, part: str) -> None:
    error = error_of(http.post("/api/v1/generate", content=body))
    assert error["code"] == "invalid_parameter"
    assert part in error["traceback"]


@pytest.mark.parametrize(
    "body", [b"[]", b'["inputs"]', b"5", b"null", b'"text"', b"[" * 100_000, b"NaN"], ids=lambda b: b[:10]
)
def test_json_that_is_no_object_is_refused(http: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    error = error_of(http.post("/api/v1/generate", content=body, headers=headers))
    assert error["traceback"].startswith("InvalidParameterError: body: ")


@pytest.mark.parametrize("max_length", ["0", "-1", "long", "1e400", "NaN", "10000000000000000000000", "4097"])
def test_a_session_of_an_impossible_length_is_not_opened(http: httpx.Client, max_length: str) -> None:
    error = error_of(http.get(f"/api/v1/open_inference_session?max_length={max_length}"))
    assert error["code"] in ("invalid_parameter", "maximum_length_exceeded")


def test_a_session_is_not_closed_without_its_id(http: httpx.Client) -> None:
    error = error_of(http.get("/api/v1/close_inference_session"))
    assert error["traceback"].startswith("InvalidParameterError: session_id: it is missing")


def test_a_huge_body_gets_413_in_the_usual_shape(http: httpx.Client) -> None:
    body = b"inputs=" + b"x" * HUGE + b"&max_new_tokens=1"
    assert error_of(http.post("/api/v1/generate", content=body), 413)["code"] == "message_too_large"


def test_a_huge_body_of_unknown_length_gets_413_too(http: httpx.Client) -> None:
    pieces = (b"x" * 10_000 for _ in range(HUGE // 10_000))
    assert error_of(http.post("/api/v1/generate", content=pieces), 413)["code"] == "message_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/v1/generate", 405, "method_not_allowed"),
        ("DELETE", "/api/v1/open_inference_session", 405, "method_not_allowed"),
        ("GET", "/api/v1/no-such", 404, "not_found"),
        ("POST", "/api/v2/generate", 404, "not_found"),
    ],
)
def test_what_is_not_there_is_said_in_the_usual_shape(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    assert error_of(http.request(method, path), status)["code"] == code


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # how TLS begins
        b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\ninputs=",
        b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /api/v2/generate HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"X" * 100_000,
    ],
    ids=lambda sent: repr(sent[:40]),
)
def test_what_is_not_http_does_no_harm(server: Server, sent: bytes) -> None:
    host, _, port = server.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)


def test_a_text_is_never_repeated_in_an_error(http: httpx.Client) -> None:
    secret = {"inputs": "my secret" * 1000, "max_new_tokens": 1, "model": "bos"}
    assert "my secret" not in json.dumps(error_of(http.post("/api/v1/generate", json=secret)))
