"""The corpus: entries of question wordings with one answer each, read from ``corpus/*.txt``.

The format, line by line: ``[topic]`` begins an entry, ``? `` is a wording of its question, ``= `` its answer,
``after topic, ...`` makes it a follow-up of other entries, ``#`` begins a comment. In questions, ``{a|b}`` stands
for one of its alternatives.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

DIRECTORY = Path(__file__).parent / "corpus"

_ALTERNATIVES = re.compile(r"\{([^{}]*)\}")
_TOPIC = re.compile(r"[a-z_]+\.[a-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A question in many wordings, and its answer."""

    topic: str
    questions: tuple[str, ...]
    answer: str
    after: tuple[str, ...] = ()
    """The topics after whose answers the question makes sense; empty = it stands alone."""

    @property
    def area(self) -> str:
        """The part of the topic before the dot."""
        return self.topic.partition(".")[0]


class CorpusError(ValueError):
    """A corpus file breaks the format; the message begins with file and line."""


def load_corpus(directory: Path = DIRECTORY) -> list[Entry]:
    """All entries, in the order of the files' names. Raises `CorpusError`."""
    entries = [entry for file in sorted(directory.glob("*.txt")) for entry in _read(file)]
    topics = [entry.topic for entry in entries]
    for entry in entries:
        if topics.count(entry.topic) > 1:
            raise CorpusError(f"{directory}: [{entry.topic}] stands there more than once")
        for topic in entry.after:
            if topic not in topics:
                raise CorpusError(f"{directory}: [{entry.topic}] comes after {topic}, which is not there")
    return entries


def expand(question: str, random: Random) -> str:
    """The question with one alternative of each ``{a|b}``; the innermost first."""
    while match := _ALTERNATIVES.search(question):
        chosen = random.choice(match[1].split("|"))
        question = question[: match.start()] + chosen + question[match.end() :]
    return " ".join(question.split())


def normalised(text: str) -> str:
    """The text as it is compared: without case, code marks, extra spaces and the last sign."""
    text = text.lower().replace("`", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return " ".join(text.split()).rstrip("?.! ")


def every_wording(question: str, limit: int) -> Iterator[str]:
    """Up to ``limit`` expansions of a question, each once."""
    random = Random(0)
    seen: set[str] = set()
    for _ in range(3 * limit if "{" in question else 1):
        wording = expand(question, random)
        if wording not in seen and len(seen) < limit:
            seen.add(wording)
            yield wording


def _read(file: Path) -> Iterator[Entry]:
    draft: _Draft | None = None
    for number, line in enumerate(file.read_text().splitlines(), 1):
        place = f"{file.name}:{number}"
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            if draft:
                yield draft.finished()
            draft = _Draft(place, line)
        elif draft is None:
            raise CorpusError(f"{place}: a line before the first [topic]")
        else:
            draft.add(place, line)
    if draft:
        yield draft.finished()


class _Draft:
    """An entry that is being read."""

    def __init__(self, place: str, line: str) -> None:
        self._place = place
        self._topic = line.strip("[]")
        if not line.endswith("]") or not _TOPIC.fullmatch(self._topic):
            raise CorpusError(f"{place}: {line} is not a topic like [start.run]")
        self._questions: list[str] = []
        self._answers: list[str] = []
        self._after: list[str] = []

    def add(self, place: str, line: str) -> None:
        kind, _, text = line.partition(" ")
        text = text.strip()
        if kind == "?" and text:
            self._questions.append(text)
        elif kind == "=" and text:
            self._answers.append(text)
        elif kind == "after" and text:
            self._after += [topic.strip() for topic in text.split(",")]
        else:
            raise CorpusError(f"{place}: a line begins with [, ?, =, after or #, and then says something")

    def finished(self) -> Entry:
        if not self._questions or len(self._answers) != 1:
            raise CorpusError(f"{self._place}: [{self._topic}] needs questions and exactly one answer")
        questions = _without_repetitions(self._questions)
        return Entry(self._topic, questions, self._answers[0], tuple(self._after))


def _without_repetitions(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
