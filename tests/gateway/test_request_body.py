"""How the bodies of the v1 API are understood."""

from __future__ import annotations

import contextlib

import pytest

from petals_chat.errors import InvalidParameterError
from petals_chat.gateway.request_body import MAX_FIELDS, parse_body, parse_form

MULTIPART = "multipart/form-data; boundary=XX"


def part(name: str, value: str, disposition: str = "", headers: str = "") -> str:
    return f'--XX\r\n{headers}Content-Disposition: form-data; name="{name}"{disposition}\r\n\r\n{value}\r\n'


@pytest.mark.parametrize("content_type", ["", "application/json", "text/plain", MULTIPART, "nonsense"])
def test_an_empty_body_says_nothing(content_type: str) -> None:
    assert parse_body(b"", content_type) == parse_body(b" \r\n", content_type) == {}


@pytest.mark.parametrize(
    "content_type", ["", "application/x-www-form-urlencoded", "application/json", "text/plain"]
)
@pytest.mark.parametrize(
    ("body", "values"),
    [
        ("a=1&b=2", {"a": "1", "b": "2"}),
        ("a=x+y%20z", {"a": "x y z"}),
        ("a=x y [z] {w}", {"a": "x y [z] {w}"}),
        ("a=1=2", {"a": "1=2"}),
        ("a=100% of 50%2", {"a": "100% of 50%2"}),
        ("a=猫&b=%E7%8C%AB", {"a": "猫", "b": "猫"}),
        ("a=&b", {"a": "", "b": ""}),
        ("a=1&a=2", {"a": "1"}),
        ("\r\na=1 ", {"a": "1 "}),
    ],
)
def test_a_form_is_a_form_under_any_content_type(
    body: str, values: dict[str, str], content_type: str
) -> None:
    assert parse_body(body.encode(), content_type) == values


@pytest.mark.parametrize(
    "content_type", ["", "application/x-www-form-urlencoded", "application/json", "text/plain", MULTIPART]
)
def test_a_json_object_is_one_under_any_content_type(content_type: str) -> None:
    assert parse_body(b' {"a": "x", "b": 1.5, "c": null}\n', content_type) == {"a": "x", "b": 1.5, "c": None}


@pytest.mark.parametrize("content_type", ["", "text/plain", MULTIPART, "multipart/form-data"])
def test_a_multipart_form_is_one_under_any_content_type(content_type: str) -> None:
    body = (
        part("a", "x y\r\nz")
        + part("b", "猫", '; filename="cat.txt"')
        + part("c", "1", headers="Content-Type: a/b\r\n")
    )
    assert parse_body(f"{body}--XX--\r\n".encode(), content_type) == {"a": "x y\r\nz", "b": "猫", "c": "1"}


@pytest.mark.parametrize(
    ("body", "content_type", "problem"),
    [
        (b"[1, 2]", "application/json", "as JSON it must be an object"),
        (b'"text"', "application/json", "as JSON it must be an object"),
        (b"text", "application/json", "not valid JSON"),
        (b'{"a": 1', "", "not valid JSON"),
        (b'{"a": NaN}', "", "not valid JSON"),
        (b'{"a": "\\ud800"}', "", "not valid JSON"),
        (b'{"a": "\xff"}', "", "not UTF-8"),
        (b'{"a":' * 100_000, "", "not valid JSON"),
        (b"a=\xff", "", "not UTF-8"),
        (b"a=%ff", "", "not UTF-8"),
        (b"a=%ED%A0%80", "", "not UTF-8"),
        (b"&" * (MAX_FIELDS + 1), "", "more than the 1000 fields"),
        (part("a", "1").encode(), MULTIPART, "the last boundary is missing"),
        ((part("a", "1") * (MAX_FIELDS + 1) + "--XX--\r\n").encode(), MULTIPART, "more than the 1000 fields"),
        (part("a", "1").encode() + b"\xff--XX--\r\n", MULTIPART, "not valid multipart"),
        (part("a", "\udcff").encode(errors="surrogateescape") + b"--XX--\r\n", MULTIPART, "not UTF-8"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_the_reason(
    body: bytes, content_type: str, problem: str
) -> None:
    with pytest.raises(InvalidParameterError, match=problem):
        parse_body(body, content_type)


def test_a_multipart_form_that_is_cut_off_is_never_taken_for_a_whole_one() -> None:
    whole = (part("a", "1") + part("b", "2") + "--XX--").encode()
    assert parse_body(whole, MULTIPART) == {"a": "1", "b": "2"}
    for length in range(len(whole)):
        with contextlib.suppress(InvalidParameterError):
            assert "a" not in parse_body(whole[:length], MULTIPART)


def test_a_query_string_is_read_like_a_form() -> None:
    assert parse_form(b"a=[x]&b=%C3%A9", "query string") == {"a": "[x]", "b": "é"}
