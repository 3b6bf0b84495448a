from __future__ import annotations

from collections.abc import Sequence

import pytest

from training.corpus import Entry
from training.evaluate import Question, as_third_questions, judge, load_off_topic, load_questions, overlap

QUESTION = Question("start.run", ("how do I start it",), (("make run", "serve"), ("5000",)), ("windows",))


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("Run `make  run`, then open port 5000.", True),
        ("petals-chat SERVE, port 5000", True),
        ("Run `make run`.", False),
        ("Run `make run` on Windows, port 5000.", False),
    ],
)
def test_an_answer_needs_all_facts_and_no_contradiction(answer: str, is_right: bool) -> None:
    assert QUESTION.accepts(answer) is is_right


def test_the_last_answer_counts_and_the_earlier_ones_are_part_of_the_conversation() -> None:
    class Echo:
        def answer(self, conversations: Sequence[Sequence[str]]) -> list[str]:
            return [f"answer to {' | '.join(conversation)}" for conversation in conversations]

    two_turns = Question("start.then", ("one", "two"), (("answer to one | answer to one | two",),), ())
    verdicts = judge(Echo(), [QUESTION, two_turns])
    assert [verdict.is_right for verdict in verdicts] == [False, True]


def test_a_third_question_comes_after_two_others() -> None:
    third = as_third_questions(load_questions())
    assert third == as_third_questions(load_questions())
    for question, original in zip(third, load_questions(), strict=True):
        assert question.questions[2:] == original.questions
        assert question.facts == original.facts


def test_the_held_out_set_is_large_enough() -> None:
    areas = [question.area for question in load_questions()]
    assert len([area for area in areas if area != "small_talk"]) >= 100
    assert len(set(areas)) == 9
    assert len(load_off_topic()) >= 100


def test_overlap_counts_5_grams_but_for_wordings_that_are_left_out() -> None:
    entries = [Entry("a.b", ("how do I start it", "how do I stop it now"), "x")]
    questions = [
        Question("a.b", ("How do I stop it now?",), (), ()),  # left out, so what only it has is not seen
        Question("a.b", ("so how do I start it",), (), ()),
    ]
    assert overlap(questions, entries) == pytest.approx(1 / 4)
