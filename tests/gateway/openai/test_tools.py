"""Calls of functions are found in an answer however its pieces are cut, and grammars make a model write them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from petals_chat.gateway.openai.tools import Tools, json_grammar
from petals_chat.protocol.messages import ToolStyle
from tests.tiny_tokenizers import byte_level_tokenizer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
DEFINITIONS = tuple(
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "time")
)
PARIS = '{"name": "weather", "arguments": {"city": "Paris"}}'
ROME = '{"name": "time", "arguments": {"city": "Rome"}}'


def read(style: ToolStyle, text: str, *, size: int, **options: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of an answer that comes in pieces of this size."""
    reader = Tools(style, DEFINITIONS, **options).reader()
    certain = "".join(reader.add(text[start : start + size]) for start in range(0, len(text), size))
    rest, calls = reader.end()
    assert len({call.id for call in calls}) == len(calls)
    return certain + rest, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("style", "text", "plain", "names"),
    [
        (ToolStyle.HERMES, "No call < here.", "No call < here.", []),
        (ToolStyle.HERMES, f"<tool_call>\n{PARIS}\n</tool_call>", "", ["weather"]),
        (
            ToolStyle.HERMES,
            f"So: <tool_call>{PARIS}</tool_call>\n<tool_call>{ROME}",
            "So: ",
            ["weather", "time"],
        ),
        (ToolStyle.HERMES, "<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
        (ToolStyle.HERMES, '<tool_call>{"name": "no"}', '<tool_call>{"name": "no"}', []),
        (ToolStyle.HERMES, '<tool_call>{"name": ["time"]}', '<tool_call>{"name": ["time"]}', []),
        (
            ToolStyle.HERMES,
            '<tool_call>{"name": "time", "arguments": {"a": NaN}}',
            '<tool_call>{"name": "time", "arguments": {"a": NaN}}',
            [],
        ),
        (ToolStyle.MISTRAL, f"[TOOL_CALLS][{PARIS}, {ROME}]", "", ["weather", "time"]),
        (ToolStyle.MISTRAL, f"[TOOL_CALLS] {PARIS}", "", ["weather"]),
        (ToolStyle.MISTRAL, "[TOOL", "[TOOL", []),
        (ToolStyle.LLAMA3, PARIS.replace("arguments", "parameters"), "", ["weather"]),
        (ToolStyle.LLAMA3, f"\n<|python_tag|>{PARIS}", "", ["weather"]),
        (ToolStyle.LLAMA3, f"{PARIS};\n{ROME}", "", ["weather", "time"]),
        (ToolStyle.LLAMA3, '{"a": 1}', '{"a": 1}', []),
        (ToolStyle.LLAMA3, f"It is {PARIS}", f"It is {PARIS}", []),
        (ToolStyle.LLAMA3, " ", " ", []),
    ],
)
def test_calls_are_told_from_text(
    style: ToolStyle, text: str, plain: str, names: list[str], size: int
) -> None:
    certain, calls = read(style, text, size=size)
    assert certain == plain
    assert [name for name, _ in calls] == names
    assert all(arguments in ({"city": "Paris"}, {"city": "Rome"}) for _, arguments in calls)


def test_text_is_not_held_back_longer_than_it_may_be_a_call() -> None:
    reader = Tools(ToolStyle.HERMES, DEFINITIONS).reader()
    assert [reader.add(piece) for piece in ("a <", "b", "<tool", "_", "x")] == ["a ", "<b", "", "", "<tool_x"]


def test_only_the_first_call_counts_where_one_is_wanted() -> None:
    text = f"<tool_call>{PARIS}</tool_call><tool_call>{ROME}</tool_call>"
    assert read(ToolStyle.HERMES, text, size=5, only_one=True) == ("", [("weather", {"city": "Paris"})])


@pytest.mark.parametrize("arguments", ['{"city": "\\ud800"}', '"{\\"city\\": \\"\\ud800\\"}"'])
def test_half_a_character_in_an_argument_can_be_sent(arguments: str) -> None:
    text = f'<tool_call>{{"name": "time", "arguments": {arguments}}}'
    assert read(ToolStyle.HERMES, text, size=1000) == ("", [("time", {"city": "?"})])


def test_an_argument_may_be_json_as_text() -> None:
    text = '<tool_call>{"name": "time", "arguments": "{\\"city\\": 1}"}'
    assert read(ToolStyle.HERMES, text, size=9) == ("", [("time", {"city": 1})])


def accepts(grammar: str, text: str) -> bool:
    tokenizer = byte_level_tokenizer()
    matcher = LLMatcher(from_tokenizer(tokenizer, n_vocab=512), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer(text)["input_ids"]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("style", "call"),
    [
        (ToolStyle.HERMES, f"\n{ROME}\n</tool_call>"),
        (ToolStyle.MISTRAL, f"[{ROME}]"),
        (ToolStyle.LLAMA3, ROME.replace("arguments", "parameters")),
    ],
)
def test_a_call_that_is_demanded_is_written_as_the_model_knows_it(style: ToolStyle, call: str) -> None:
    tools = Tools(style, DEFINITIONS, is_forced=True)
    assert tools.grammar is not None
    assert accepts(tools.grammar, call)
    assert not accepts(tools.grammar, call.replace("Rome", 'Rome"'))
    assert not accepts(tools.grammar, call.replace("time", "other"))
    reader = tools.reader()
    assert reader.add(call) == ""
    rest, (read_call,) = reader.end()
    assert (rest, read_call.name) == ("", "time")


def test_a_call_that_was_cut_off_is_text() -> None:
    reader = Tools(ToolStyle.HERMES, DEFINITIONS, is_forced=True).reader()
    assert reader.add('\n{"name": "ti') == ""
    assert reader.end() == ('<tool_call>\n{"name": "ti', [])


def test_json_has_few_spaces_between_its_parts() -> None:
    grammar = json_grammar(SCHEMA)
    assert accepts(grammar, '{\n    "city": "a"\n}')
    assert not accepts(grammar, '{ "city":' + " " * 4 + '"a"}')
    assert not accepts(grammar, "{}")
