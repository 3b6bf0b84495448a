"""Answers without the text that ended them, although they come in pieces. No I/O."""

from __future__ import annotations

from collections.abc import Sequence


class StopTextFilter:
    """Holds back the end of a text while it may become a stop sequence.

    The engine finds stop sequences, and its text ends with the one that it found.
    """

    def __init__(self, stop_sequences: Sequence[str]) -> None:
        # Longest first: of two that end at the same place, the one that began first counts.
        self._stop_sequences = sorted(stop_sequences, key=len, reverse=True)
        self._held = ""

    def add(self, text: str) -> str:
        """What is certain to be part of the answer, after one more piece that was not the last."""
        text = self._held + text
        certain = len(text) - self._beginning_of_stop_sequence(text)
        self._held = text[certain:]
        return text[:certain]

    def end(self, text: str, *, is_stop_sequence: bool) -> str:
        """The rest of the answer.

        Args:
            text: the last piece.
            is_stop_sequence: the text ends with a stop sequence.
        """
        text = self._held + text
        self._held = ""
        if is_stop_sequence:
            for stop in self._stop_sequences:
                if text.endswith(stop):
                    return text[: len(text) - len(stop)]
        return text

    def _beginning_of_stop_sequence(self, text: str) -> int:
        """How many characters at the end of ``text`` a stop sequence, at most, may begin with."""
        longest = 0
        for stop in self._stop_sequences:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
