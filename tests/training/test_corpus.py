from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from training.corpus import CorpusError, Entry, every_wording, expand, load_corpus

CORPUS = """
# a comment
[start.run]
? How do I start?
? how do I {start|run} it
? How do I start?
= Run `make run`.

[start.port]
after start.run
? which port
= Port 5000.
"""


def load(directory: Path, text: str) -> list[Entry]:
    (directory / "some.txt").write_text(text)
    return load_corpus(directory)


def test_entries_are_read(tmp_path: Path) -> None:
    assert load(tmp_path, CORPUS) == [
        Entry("start.run", ("How do I start?", "how do I {start|run} it"), "Run `make run`."),
        Entry("start.port", ("which port",), "Port 5000.", after=("start.run",)),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("? a question", "some.txt:1: a line before the first"),
        ("[start]", "some.txt:1: .* is not a topic"),
        ("[start.run]\n? what", "some.txt:1: .* needs questions and exactly one answer"),
        ("[start.run]\n? what\n= a\n= b", "exactly one answer"),
        ("[start.run]\nwhat", "some.txt:2: a line begins with"),
        ("[start.run]\n? a\n= b\n[start.run]\n? a\n= b", "more than once"),
        ("[start.run]\nafter start.stop\n? a\n= b", "comes after start.stop, which is not there"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(CorpusError, match=problem):
        load(tmp_path, text)


def test_alternatives_are_expanded() -> None:
    assert {expand("{a|b {c|d}|} e", Random(seed)) for seed in range(50)} == {"a e", "b c e", "b d e", "e"}
    assert sorted(every_wording("{a|b|c} d", limit=10)) == ["a d", "b d", "c d"]


def test_no_question_has_two_answers() -> None:
    """Wordings that stand alone have one answer each, or the model is taught to guess."""
    answers: dict[str, str] = {}
    for entry in load_corpus():
        for question in entry.questions if not entry.after else ():
            assert answers.setdefault(question.lower(), entry.answer) == entry.answer, question
