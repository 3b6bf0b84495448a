"""What errors look like, and the words by which clients know them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.contract.conftest import RANDOM_HOST_CACHE_TOKENS, RANDOM_SESSION_TOKENS

Generate = Callable[..., Any]
OpenSession = Callable[..., str]


@pytest.mark.parametrize(
    ("parameters", "code", "name", "words"),
    [
        ({"model": "no/such"}, "unknown_model", "KeyError", "no/such"),
        ({"max_length": 1}, "maximum_length_exceeded", None, "Maximum length exceeded"),
        ({"inputs": "A" * 5000}, "maximum_length_exceeded", None, "Maximum length exceeded"),
        ({"max_length": -1}, "invalid_parameter", "InvalidParameterError", "max_length"),
        ({"model": "private"}, "model_not_public", "ModelNotPublicError", "licence"),
    ],
    ids=str,
)
def test_an_error_has_a_code_for_programs_and_one_line_for_people(
    generate: Generate, parameters: dict[str, Any], code: str, name: str | None, words: str
) -> None:
    error = generate(**{"inputs": "A", "max_length": 5, **parameters})
    assert set(error) == {"ok", "code", "traceback"}
    assert (error["ok"], error["code"]) == (False, code)
    sentence = re.fullmatch(r"(\w+Error): \S.*", error["traceback"])  # "." matches no line break
    assert sentence is not None
    assert name is None or sentence[1] == name
    assert words in error["traceback"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"model": "no/such"},
        {"model": "private"},
        {"inputs": None},
        {"inputs": "A" * 5000},
        {"max_new_tokens": "\n"},
        {"temperature": object.__name__},
        {"temperature": "a\nb\r\nc"},
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_shows_nothing_of_the_servers_insides(
    generate: Generate, parameters: dict[str, Any]
) -> None:
    error = generate(**{"inputs": "A", "max_new_tokens": 5, **parameters})
    assert error["ok"] is False
    assert not re.search(r'\n|\.py\b|File "|Traceback|/tmp|/home|<\w+ object at', error["traceback"])


def test_a_full_attention_cache_is_said_until_a_session_is_closed(
    http: httpx.Client, open_session: OpenSession
) -> None:
    """The host counts the tokens that sessions may have, and not all alike: so open them until it is full."""
    opened: list[str] = []
    reply: dict[str, Any] = {"ok": True}
    while reply["ok"]:
        assert len(opened) * RANDOM_SESSION_TOKENS < 10 * RANDOM_HOST_CACHE_TOKENS
        opened.append(open_session(max_length=RANDOM_SESSION_TOKENS, model="byte_level"))
        request = {"session_id": opened[-1], "model": "byte_level", "max_new_tokens": 1}
        reply = http.post("/api/v1/generate", json={**request, "inputs": "machines " * 20}).json()
    assert reply["code"] == "attention_cache_full"
    assert re.fullmatch(r"AttentionCacheFullError: .*attention cache is full.*", reply["traceback"])

    for session_id in opened[:-1]:
        http.get("/api/v1/close_inference_session", params={"session_id": session_id})
    reply = http.post("/api/v1/generate", json={**request, "inputs": "machines " * 20}).json()
    assert reply["ok"] is True
