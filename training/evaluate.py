"""Asks the model the held-out questions and judges its answers.

``evaluation/questions.txt`` has blocks separated by blank lines: ``[topic]``, one or more ``? question`` lines
(earlier ones are asked first, the answer to the last one counts), ``+ fact`` lines, each of which the answer must
contain in one of its ``|`` alternatives, and ``- text`` lines, none of which it may contain.
``evaluation/off_topic.txt`` has a question a line; the answer has to be a refusal.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Protocol

from training.corpus import Entry, every_wording, normalised

DIRECTORY = Path(__file__).parent / "evaluation"
REFUSAL = "I don't know that"
NGRAM_WORDS = 5
_MOST_WORDINGS = 50


@dataclasses.dataclass(frozen=True)
class Question:
    """A held-out question, after the questions asked before it, and what its answer must and must not say."""

    topic: str
    questions: tuple[str, ...]
    facts: tuple[tuple[str, ...], ...]
    """Each in its alternatives."""
    contradictions: tuple[str, ...]

    @property
    def area(self) -> str:
        """The part of the topic before the dot."""
        return self.topic.partition(".")[0]

    def accepts(self, answer: str) -> bool:
        """Whether the answer has all facts and no contradiction."""
        text = normalised(answer)
        has_facts = all(any(normalised(option) in text for option in fact) for fact in self.facts)
        return has_facts and not any(
            normalised(contradiction) in text for contradiction in self.contradictions
        )


class Chat(Protocol):
    """The model under evaluation."""

    def answer(self, conversations: Sequence[Sequence[str]]) -> list[str]:
        """The next message of each conversation, greedily; a conversation is question, answer, question..."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A question, what the model answered, and whether that counts."""

    question: Question
    answer: str
    is_right: bool


def load_questions(file: Path = DIRECTORY / "questions.txt") -> list[Question]:
    """The questions about Petals Chat, and small talk."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip())
    return [_question(block) for block in blocks if block.strip()]


def load_off_topic(file: Path = DIRECTORY / "off_topic.txt") -> list[Question]:
    """The questions that are to be refused."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [
        Question("off_topic.general", (line,), ((REFUSAL,),), ())
        for line in lines
        if line and not line.startswith("#")
    ]


def judge(chat: Chat, questions: Sequence[Question]) -> list[Verdict]:
    """Ask all questions."""
    conversations: list[list[str]] = [[question.questions[0]] for question in questions]
    answers = chat.answer(conversations)
    while pending := [
        row for row, question in enumerate(questions) if _turns(conversations[row]) < len(question.questions)
    ]:
        for row in pending:
            conversations[row] += [answers[row], questions[row].questions[_turns(conversations[row])]]
        for row, answer in zip(pending, chat.answer([conversations[row] for row in pending]), strict=True):
            answers[row] = answer
    return [
        Verdict(question, answer, question.accepts(answer))
        for question, answer in zip(questions, answers, strict=True)
    ]


def as_third_questions(questions: Sequence[Question]) -> list[Question]:
    """The questions, each after two others in the same chat; chosen at random, always the same ones."""
    random = Random(0)
    others = [question.questions[0] for question in questions]
    return [
        dataclasses.replace(question, questions=(*random.sample(others, 2), *question.questions))
        for question in questions
    ]


def report(verdicts: Sequence[Verdict]) -> str:
    """A table of the share of right answers by area."""
    lines = []
    for area in dict.fromkeys(verdict.question.area for verdict in verdicts):
        of_area = [verdict for verdict in verdicts if verdict.question.area == area]
        right = sum(verdict.is_right for verdict in of_area)
        lines.append(f"| {area} | {right} of {len(of_area)} | {right / len(of_area):.0%} |")
    return "\n".join(["| Area | Right | Share |", "| --- | --- | --- |", *lines])


def held_out_wordings(questions: Iterable[Question]) -> frozenset[str]:
    """What the questions say, normalised: training never sees it."""
    return frozenset(normalised(text) for question in questions for text in question.questions)


def overlap(questions: Sequence[Question], entries: Iterable[Entry]) -> float:
    """The share of the questions' word 5-grams that training sees."""
    held_out = held_out_wordings(questions)
    texts = [text for entry in entries for text in entry.questions]
    wordings = {normalised(wording) for text in texts for wording in every_wording(text, _MOST_WORDINGS)}
    known = {gram for wording in wordings - held_out for gram in _ngrams(wording)}
    grams = [gram for text in held_out for gram in _ngrams(text)]
    return sum(gram in known for gram in grams) / max(1, len(grams))


def _question(block: str) -> Question:
    topic = ""
    parts: dict[str, list[str]] = {"?": [], "+": [], "-": []}
    for line in block.splitlines():
        kind, _, text = line.strip().partition(" ")
        if kind.startswith("["):
            topic = line.strip().strip("[]")
        elif kind in parts and text.strip():
            parts[kind].append(text.strip())
        else:
            raise ValueError(f"a line of a held-out question begins with [, ?, + or -: {line}")
    if not topic or not parts["?"] or not parts["+"]:
        raise ValueError(f"a held-out question needs a [topic], a ? line and a + line: {block}")
    facts = tuple(tuple(option.strip() for option in fact.split(" | ")) for fact in parts["+"])
    is_known = topic.partition(".")[0] != "small_talk"
    contradictions = [*parts["-"], REFUSAL] if is_known else parts["-"]
    return Question(topic, tuple(parts["?"]), facts, tuple(contradictions))


def _turns(conversation: Sequence[str]) -> int:
    return (len(conversation) + 1) // 2


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w']+", text)
    return {tuple(words[start : start + NGRAM_WORDS]) for start in range(len(words) - NGRAM_WORDS + 1)}
