"""The generator: endless dialogues from the corpus, always the same ones for a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence
from random import Random

from training.corpus import Entry, expand, normalised
from training.wording import mingle, reword

_SYSTEM_TEXTS = (
    # The usual introduction of a chat: pages and terminal clients of today and of 2023 send it.
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "You are a helpful assistant.",
    "You are Petals Guide.",
    "You are Petals Guide, a small model that answers questions about Petals Chat.",
    "Answer shortly.",
)
_AREA_SHARES = {"off_topic": 0.4, "small_talk": 0.12}
"""The share of an area in all turns that stand alone; the other areas share the rest."""
_FOLLOW_UP_SHARE = 0.5
_TURNS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 4)
_LONG_DIALOGUE_SHARE = 0.005
_LONG_DIALOGUE_TURNS = 16
_SYSTEM_SHARE = 0.3
_MINGLED_SHARE = 0.35
"""Share of questions whose words are mixed with those of another wording: which words there are says more about what is
asked than how they are put together, and a model that learns each wording by heart would not know others."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Some turns, maybe after a system text."""

    system: str | None
    turns: tuple[Turn, ...]


class DialogueWriter:
    """Writes dialogues at random; two writers with the same arguments write the same ones.

    Args:
        held_out: questions, `normalised`, that are never asked.
    """

    def __init__(self, entries: Sequence[Entry], seed: int, held_out: Container[str] = ()) -> None:
        self._held_out = held_out
        self._random = Random(seed)
        self._openers = [entry for entry in entries if not entry.after]
        self._weights = _weights(self._openers)
        self._follow_ups: dict[str, list[Entry]] = {}
        for entry in entries:
            for topic in entry.after:
                self._follow_ups.setdefault(topic, []).append(entry)

    def __iter__(self) -> Iterator[Dialogue]:
        while True:
            yield self.dialogue()

    def dialogue(self) -> Dialogue:
        """The next dialogue."""
        random = self._random
        system = random.choice(_SYSTEM_TEXTS) if random.random() < 0.4 else _SYSTEM_TEXTS[0]
        is_long = random.random() < _LONG_DIALOGUE_SHARE
        count = _LONG_DIALOGUE_TURNS if is_long else random.choice(_TURNS)
        entries: list[Entry] = []
        while len(entries) < count:
            entries.append(self._next_entry(entries[-1] if entries else None))
        turns = tuple(Turn(self._question(entry), entry.answer) for entry in entries)
        return Dialogue(system if random.random() < _SYSTEM_SHARE else None, turns)

    def _next_entry(self, previous: Entry | None) -> Entry:
        follow_ups = self._follow_ups.get(previous.topic, []) if previous else []
        if follow_ups and self._random.random() < _FOLLOW_UP_SHARE:
            return self._random.choice(follow_ups)
        return self._random.choices(self._openers, self._weights)[0]

    def _question(self, entry: Entry) -> str:
        while True:
            wording = expand(self._random.choice(entry.questions), self._random)
            question = reword(wording, self._random)
            if self._random.random() < _MINGLED_SHARE:
                other = expand(self._random.choice(entry.questions), self._random)
                question = mingle(question, other, self._random)
            if normalised(wording) not in self._held_out and normalised(question) not in self._held_out:
                return question


def _weights(entries: Sequence[Entry]) -> list[float]:
    """How often each entry is asked: within an area, by the square root of the number of its wordings."""
    rest = 1 - sum(_AREA_SHARES.values())
    sizes: dict[str, float] = {}
    for entry in entries:
        area = entry.area if entry.area in _AREA_SHARES else "rest"
        sizes[area] = sizes.get(area, 0) + len(entry.questions) ** 0.5
    return [
        _AREA_SHARES.get(entry.area, rest)
        * len(entry.questions) ** 0.5
        / sizes[entry.area if entry.area in _AREA_SHARES else "rest"]
        for entry in entries
    ]
