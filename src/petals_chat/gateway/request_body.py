"""What a client of the v1 API sent, as one mapping: query string, and body in whichever form it has.

Clients of this API label their bodies carelessly (``curl -d`` says "urlencoded" of everything), so the body
itself decides where it can. Which parameters there are, and what they mean, is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import FormParser
from starlette.requests import Request

from petals_chat.errors import InvalidParameterError, MessageTooLargeError

MAX_FIELDS = 1000
"""Fields of a form. A text that is not percent-encoded may have some "&" of its own."""

MAX_DISCARDED_BYTES = 16 * 1024 * 1024
"""How much of a body that is too large is read all the same: many clients read no answer before they have sent
everything, and would only see the connection break."""

_JSON_TYPE = re.compile(r"application/([\w.+-]+\+)?json")
_FORM_FIELD = re.compile(rb"\s*[\w.\[\]%-]+=")
_MULTIPART_BEGIN = re.compile(rb"--([^\r\n]{1,70})\r\nContent-(Disposition|Type):", re.IGNORECASE)

Values = Mapping[str, Any]


async def read_values(request: Request, max_bytes: int) -> Values:
    """Everything the request says; the query string wins over the body, where both have a key.

    Raises:
        MessageTooLargeError: the body has more than ``max_bytes`` bytes.
        InvalidParameterError: the body, or the query string, cannot be understood.
        starlette.requests.ClientDisconnect: the client went away before the end of the body.
    """
    body = await read_body(request, max_bytes)
    in_query = parse_form(request.scope["query_string"], "query string")
    return {**parse_body(body, request.headers.get("content-type", "")), **in_query}


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body alone.

    Raises:
        MessageTooLargeError: it has more than ``max_bytes`` bytes.
        starlette.requests.ClientDisconnect: the client went away before its end.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes + MAX_DISCARDED_BYTES:
        raise MessageTooLargeError(max_bytes)
    body = bytearray()
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size <= max_bytes:
            body += piece
        elif size > max_bytes + MAX_DISCARDED_BYTES:
            break
    if size > max_bytes:
        raise MessageTooLargeError(max_bytes)
    return bytes(body)


def parse_body(body: bytes, content_type: str) -> Values:
    """The values in ``body``, which is what it looks like, and else what ``content_type`` says.

    Raises:
        InvalidParameterError: it cannot be understood.
    """
    content = body.lstrip()  # at the end it may be part of a text
    if not content:
        return {}
    if multipart := _MULTIPART_BEGIN.match(content):
        return _parse_multipart(content, boundary=multipart[1])
    labelled_json = _JSON_TYPE.match(content_type.lower()) is not None
    if content[:1] == b"{" or (labelled_json and not _FORM_FIELD.match(content)):
        return _parse_json(content)
    return parse_form(content, "body")


def parse_form(text: bytes, where: str) -> Values:
    """The values of an urlencoded form; what should have been percent-encoded, and is not, stands for itself.

    Raises:
        InvalidParameterError: it has too many fields, or is not UTF-8.
    """
    try:
        fields = parse_qsl(text.decode(), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except UnicodeDecodeError:
        raise _not_utf8(where) from None
    except ValueError:
        raise _too_many_fields(where) from None
    return _first_of_each(fields)


def _parse_json(content: bytes) -> Values:
    try:
        values = msgspec.json.decode(content)
    except UnicodeDecodeError:
        raise _not_utf8("body") from None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidParameterError("body", f"it is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidParameterError("body", 'as JSON it must be an object, like {"inputs": "..."}')
    return values


def _parse_multipart(body: bytes, boundary: bytes) -> Values:
    parts: list[tuple[bytes, bytes]] = []
    complete = False

    def add(name: bytes | None, value: bytes | None) -> None:
        if len(parts) == MAX_FIELDS:
            raise _too_many_fields("body")
        parts.append((name or b"", value or b""))

    def note_end() -> None:
        nonlocal complete
        complete = True

    # A part with a file name is a field all the same: "curl -F inputs=@prompt.txt".
    parser = FormParser(
        "multipart/form-data",
        on_field=lambda field: add(field.field_name, field.value),
        on_file=lambda file: add(file.field_name, _content(file.file_object)),
        on_end=note_end,
        boundary=boundary,
        config={"MAX_MEMORY_FILE_SIZE": len(body)},
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidParameterError("body", f"it is not valid multipart/form-data: {error}") from None
    if not complete:
        raise InvalidParameterError(
            "body", "it is not valid multipart/form-data: the last boundary is missing"
        )
    try:
        return _first_of_each((name.decode(), value.decode()) for name, value in parts)
    except UnicodeDecodeError:
        raise _not_utf8("body") from None


def _content(file: Any) -> bytes:
    file.seek(0)
    content: bytes = file.read()
    return content


def _first_of_each(fields: Iterable[tuple[str, str]]) -> Values:
    values: dict[str, str] = {}
    for name, value in fields:
        values.setdefault(name, value)
    return values


def _not_utf8(where: str) -> InvalidParameterError:
    return InvalidParameterError(where, "it is not UTF-8")


def _too_many_fields(where: str) -> InvalidParameterError:
    return InvalidParameterError(where, f"it has more than the {MAX_FIELDS} fields allowed")
