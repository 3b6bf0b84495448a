"""Which requests come from the server's own page."""

from __future__ import annotations

import pytest
from starlette.requests import HTTPConnection

from petals_chat.gateway.origins import is_same_origin


def connection(scheme: str, **headers: str) -> HTTPConnection:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return HTTPConnection({"type": "http", "scheme": scheme, "headers": pairs})


@pytest.mark.parametrize(
    ("scheme", "host", "origin"),
    [
        ("http", "chat.example", "http://chat.example"),
        ("https", "chat.example:8443", "https://chat.example:8443"),
        ("ws", "localhost:5000", "http://localhost:5000"),
        ("wss", "chat.example", "https://chat.example"),
        ("http", "Chat.Example", "http://chat.example"),
    ],
)
def test_the_own_origin_has_the_same_scheme_and_host(scheme: str, host: str, origin: str) -> None:
    assert is_same_origin(connection(scheme, host=host, origin=origin))


@pytest.mark.parametrize(
    "origin",
    [
        "http://chat.example",
        "https://chat.example:1",
        "https://chat.example.evil.example",
        "null",
        "",
        "chat.example",
    ],
)
def test_every_other_origin_is_foreign(origin: str) -> None:
    assert not is_same_origin(connection("https", host="chat.example", origin=origin))


def test_a_missing_origin_is_foreign() -> None:
    assert not is_same_origin(connection("https", host="chat.example"))
    assert not is_same_origin(connection("https"))


def test_two_origins_are_foreign() -> None:
    headers = [(b"host", b"a"), (b"origin", b"http://a"), (b"origin", b"http://a")]
    assert not is_same_origin(HTTPConnection({"type": "http", "scheme": "http", "headers": headers}))
