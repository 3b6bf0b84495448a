"""Calls of functions, in the ways in which models write them, and grammars that make a model write one. No I/O.

The ways are those of `petals_chat.protocol.messages.ToolStyle`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from petals_chat.protocol.messages import ToolCall, ToolStyle

JSON_WHITESPACE = r"( |\n[ \t]{0,24})?"
"""What may stand between the parts of JSON. Weak models would go on with spaces for ever."""
CALL_WHITESPACE = " ?"
"""The same in calls of functions, which models write in one line."""

_ID_BYTES = 12


def json_grammar(schema: Any) -> str:
    """A grammar of JSON texts that the schema allows, in the Lark syntax of llguidance."""
    return f"start: {_json_rule(schema, JSON_WHITESPACE)}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Style:
    """How calls are written."""

    begin: str
    """Begins the calls."""
    end: str
    """Ends each call."""
    arguments: str
    """Name of the arguments' field."""
    is_list: bool = False
    """All calls together are one JSON list."""
    only_at_start: bool = False
    """An answer consists of calls alone, or has none."""


_STYLES: Mapping[ToolStyle, _Style] = {
    ToolStyle.HERMES: _Style("<tool_call>", "</tool_call>", "arguments"),
    ToolStyle.MISTRAL: _Style("[TOOL_CALLS]", "", "arguments", is_list=True),
    ToolStyle.LLAMA3: _Style("", "", "parameters", only_at_start=True),
}
_LLAMA3_BEGINNINGS = ("{", "<|python_tag|>")


@dataclasses.dataclass(frozen=True, slots=True)
class Tools:
    """The functions of one request."""

    style: ToolStyle
    definitions: tuple[dict[str, Any], ...]
    """In the form that chat templates take."""
    is_forced: bool = False
    """The answer has to be a call."""
    only_one: bool = False
    """Of several calls only the first one counts."""

    @property
    def answer_prefix(self) -> str:
        """What the answer begins with if it has to be a call."""
        return f"{_STYLES[self.style].begin}" if self.is_forced else ""

    @property
    def grammar(self) -> str | None:
        """What the rest of the answer is if it has to be a call."""
        if not self.is_forced:
            return None
        style = _STYLES[self.style]
        calls = []
        for definition in self.definitions:
            function = definition["function"]
            arguments = function.get("parameters") or {"type": "object"}
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": function["name"]}, style.arguments: arguments},
                    "required": ["name", style.arguments],
                    "additionalProperties": False,
                }
            )
        rule = _json_rule(_united(calls), CALL_WHITESPACE)
        if style.is_list:
            return f'start: "[" call "]"\ncall: {rule}'
        end = f' "\\n{style.end}"' if style.end else ""
        begin = '"\\n" ' if style.begin else ""
        return f"start: {begin}call{end}\ncall: {rule}"

    def reader(self) -> ToolCallReader:
        """Reads one answer."""
        return ToolCallReader(self)


class ToolCallReader:
    """Tells the text of an answer, as it comes, from the calls in it."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._style = _STYLES[tools.style]
        self._held = tools.answer_prefix
        """What may be a call, or begin one."""
        self._is_text = False
        self._has_begun = tools.is_forced

    def add(self, text: str) -> str:
        """What is certain to be text, after one more piece."""
        self._held += text
        if self._has_begun:
            return ""
        if self._style.only_at_start:
            return self._add_at_start()
        begin = self._style.begin
        place = self._held.find(begin)
        if place >= 0:
            self._has_begun = True
        else:
            place = len(self._held) - _overlap(self._held, begin)
        certain, self._held = self._held[:place], self._held[place:]
        return certain

    def end(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and all calls. What cannot be read as a call is text."""
        held, self._held = self._held, ""
        calls = self._read(held) if self._has_begun else []
        if not calls:
            return held, []
        return "", calls[:1] if self._tools.only_one else calls

    def _add_at_start(self) -> str:
        start = self._held.lstrip()
        if not self._is_text and start.startswith(_LLAMA3_BEGINNINGS):
            self._has_begun = True
            return ""
        if not self._is_text and any(beginning.startswith(start) for beginning in _LLAMA3_BEGINNINGS):
            return ""
        self._is_text = True
        certain, self._held = self._held, ""
        return certain

    def _read(self, text: str) -> list[ToolCall]:
        style, names = self._style, {each["function"]["name"] for each in self._tools.definitions}
        if style.is_list:
            values = _json_of(text.removeprefix(style.begin))
            values = values if isinstance(values, list) else [values]
        elif style.only_at_start:
            values = [_json_of(part) for part in text.strip().removeprefix("<|python_tag|>").split(";\n")]
        else:
            parts = re.split(f"{re.escape(style.begin)}|{re.escape(style.end)}", text)
            values = [_json_of(part) for part in parts if part.strip()]
        calls = []
        for value in values:
            name = value.get("name") if isinstance(value, dict) else None
            if not isinstance(name, str) or name not in names:
                return []
            arguments = value.get(style.arguments, value.get("arguments", {}))
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            # JSON can spell half a character ("\\ud800"), which no reply can have.
            calls.append(ToolCall(new_call_id(), name, arguments.encode(errors="replace").decode()))
        return calls


def new_call_id() -> str:
    """A random id of a call; Mistral's templates want nine letters and digits at its end."""
    return f"call_{secrets.token_hex(_ID_BYTES)}"


def _json_rule(schema: Any, whitespace: str) -> str:
    """A schema that has no options of its own gets ours."""
    if isinstance(schema, dict):
        schema = {"x-guidance": {"whitespace_pattern": whitespace}, **schema}
    return f"%json {json.dumps(schema)}"


def _united(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _json_of(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    """Raise for what Python takes for JSON, and others do not."""
    raise ValueError(f"{constant} is not JSON")


def _overlap(text: str, begin: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``begin``."""
    lengths = range(min(len(begin) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(begin[:length])), 0)
