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


def test_sessions_for_which_the_swarm_has_no_room_at_once_are_served_all_the_same(
    http: httpx.Client, open_session: OpenSession
) -> None:
    """Their attention caches make room for each other: none is refused, and each remembers its own text."""
    count = 3 * RANDOM_HOST_CACHE_TOKENS // RANDOM_SESSION_TOKENS
    opened = [open_session(max_length=RANDOM_SESSION_TOKENS, model="byte_level") for _ in range(count)]
    request = {"model": "byte_level", "max_new_tokens": 4}

    def ask(number: int, **parameters: str) -> str:
        reply = http.post(
            "/api/v1/generate", json={**request, "session_id": opened[number], **parameters}
        ).json()
        assert reply["ok"] is True, reply
        return str(reply["outputs"])

    texts = [ask(number, inputs=f"{number} machines " + "hold blocks " * 10) for number in range(count)]
    texts = [text + ask(number) for number, text in enumerate(texts)]
    alone = http.post(
        "/api/v1/generate",
        json={**request, "max_new_tokens": 8, "inputs": "0 machines " + "hold blocks " * 10},
    ).json()
    assert texts[0] == alone["outputs"]
