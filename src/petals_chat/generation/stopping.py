"""Finding stop sequences in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Looks for the first end of a stop sequence in one generation's text, across the borders of its pieces."""

    def __init__(self, stop_sequences: Sequence[str]) -> None:
        if not all(stop_sequences):
            raise ValueError("a stop sequence must not be empty")
        self._stop_sequences = tuple(stop_sequences)
        self._tail_chars = max(map(len, self._stop_sequences), default=1) - 1
        self._tail = ""

    def add(self, text: str) -> int | None:
        """Where in ``text`` the first stop sequence ends (a number of characters), or None if none does."""
        if not self._stop_sequences:
            return None
        searched = self._tail + text
        ends = [start + len(stop) for stop in self._stop_sequences if (start := searched.find(stop)) >= 0]
        if ends:
            return min(ends) - len(self._tail)
        self._tail = searched[max(0, len(searched) - self._tail_chars) :]
        return None
