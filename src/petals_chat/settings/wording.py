"""How settings, their values and what they may be are put into words, for error messages and documentation.

The words for what a setting may be are derived from the JSON schema of its type, so that they cannot differ
from what is accepted.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from petals_chat.settings.sections import Settings
from petals_chat.settings.sources import KeyPath

Schema = Mapping[str, Any]

_LONGEST_VALUE = 60


def dotted(path: Sequence[str]) -> str:
    """The path as TOML writes it: ``models."owner/name".chat``."""
    return ".".join(part if re.fullmatch(r"[\w-]+", part, re.ASCII) else json.dumps(part) for part in path)


def show(value: object) -> str:
    """The value about as TOML writes it, in one line, cut if it is long."""
    text = str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def expected(path: KeyPath) -> str:
    """What the setting at ``path`` may be: "a whole number from 0 to 65535"."""
    if path[0] == "models" and len(path) < 3:
        return (
            "true, false or a table of settings"
            if len(path) == 2
            else "a table with one entry for each model"
        )
    schema = schema_of(path)
    assert schema is not None, path
    return _phrase(schema, plural=False)


def keys_of(path: KeyPath) -> list[str]:
    """The settings of the table at ``path``; () = the sections. Not a table: none."""
    return [key for key in table_of(path).get("properties", ()) if (*path[:1], key) != ("models", "key")]


def known_settings() -> Iterator[KeyPath]:
    """Every setting outside the models' tables."""
    return ((section, key) for section in keys_of(()) if section != "models" for key in keys_of((section,)))


def schema_of(path: KeyPath) -> Schema | None:
    """The JSON schema at ``path``; None if there is no such setting."""
    schema: Schema = _schema()
    for depth, part in enumerate(path):
        if depth == 1 and path[0] == "models":
            schema = _resolved(schema["items"])  # the entries are a list in the types, a table for people
        elif part in (settings := _entries(schema).get("properties", {})):
            schema = _resolved(settings[part])
        else:
            return None
    return schema


def table_of(path: KeyPath) -> Schema:
    """The JSON schema of the table at ``path``, or of each of the tables there; empty if there is none."""
    return _entries(schema_of(path) or {})


def _entries(schema: Schema) -> Schema:
    return _resolved(schema["items"]) if schema.get("type") == "array" else schema


@functools.cache
def _schema() -> Schema:
    return Settings.model_json_schema()


def _resolved(schema: Schema) -> Schema:
    reference = schema.get("$ref")
    return _schema()["$defs"][reference.removeprefix("#/$defs/")] if reference else schema


def _phrase(schema: Schema, *, plural: bool) -> str:
    schema = _resolved(schema)
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice.get("type") != "null"]
        return " or ".join(_phrase(choice, plural=plural) for choice in choices)
    if "const" in schema:
        return show(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(show(value) for value in schema["enum"])
    match schema["type"]:
        case "boolean":
            return "true or false"
        case "integer":
            return f"a whole number{_limits(schema)}"
        case "number":
            return f"a number{_limits(schema)}"
        case "array":
            return f"a list of {_phrase(schema['items'], plural=True)}"
        case "object":
            return f"{'tables' if plural else 'a table'} of settings"
    kind = ("non-empty " if schema.get("minLength") else "") + ("path" if "format" in schema else "string")
    words = [f"{kind}s" if plural else f"a {kind}"]
    if "wording" in schema:
        words.append(schema["wording"])
    return " ".join(words)


def _limits(schema: Schema) -> str:
    least, above, most = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if most is not None:
        return (
            f" above {above:g}, up to {most:g}"
            if least is None
            else f" from {_figure(least)} to {_figure(most)}"
        )
    if above is not None:
        return f" above {above:g}"
    return "" if least is None else f" of at least {_figure(least)}"


def _figure(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)
