"""Stop text is never part of an answer, wherever the pieces of text are cut."""

from __future__ import annotations

from itertools import combinations

import pytest

from petals_chat.gateway.openai.stop_text import StopTextFilter


def filtered(pieces: list[str], stops: tuple[str, ...], *, is_stop_sequence: bool) -> list[str]:
    stop_text = StopTextFilter(stops)
    shown = [stop_text.add(piece) for piece in pieces[:-1]]
    return [*shown, stop_text.end(pieces[-1], is_stop_sequence=is_stop_sequence)]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("Hello.###", ("###",), "Hello."),
        ("Hello.####"[:-1], ("###", "\n\nHuman:"), "Hello."),
        ("Hello.\n\nHuman:", ("###", "\n\nHuman:"), "Hello."),
        ("ab#a##", ("##",), "ab#a"),
        ("ababac", ("abac",), "ab"),
        ("one end", (" end", "end"), "one"),
    ],
)
def test_a_stop_sequence_is_left_out_at_every_cut(text: str, stops: tuple[str, ...], expected: str) -> None:
    for first, second in combinations(range(len(text)), 2):
        pieces = [text[:first], text[first:second], text[second:]]
        shown = filtered(pieces, stops, is_stop_sequence=True)
        assert "".join(shown) == expected


def test_what_only_looked_like_a_stop_sequence_comes_after_all() -> None:
    assert filtered(["a#", "#", "b#", "#"], ("###",), is_stop_sequence=False) == ["a", "", "##b", "##"]


def test_text_that_cannot_become_a_stop_sequence_is_not_held_back() -> None:
    assert filtered(["Hello", " world", "!"], ("###",), is_stop_sequence=False) == ["Hello", " world", "!"]


def test_without_stop_sequences_nothing_is_held_back() -> None:
    assert filtered(["#", "##", "###"], (), is_stop_sequence=False) == ["#", "##", "###"]
