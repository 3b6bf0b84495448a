"""What a person reads while a host runs: lines, and on a terminal a last line that changes.

Knows nothing of the host: it is told.
"""

from __future__ import annotations

import collections
import shutil
from collections.abc import Sequence
from typing import TextIO

from petals_chat.swarm.host_options import HostLoad

LOG_PERIOD_SECONDS = 60.0
"""Between two lines of status where there is no terminal."""
RATE_SECONDS = 5.0
"""Over which tokens per second are averaged on a terminal."""

_ERASE_LINE = "\r\x1b[K"


class HostDisplay:
    """Writes to ``stream``; a reader who has gone is no error.

    Args:
        is_quiet: write nothing.
    """

    def __init__(self, stream: TextIO, *, is_quiet: bool) -> None:
        self._stream = stream
        self._is_quiet = is_quiet
        self._is_terminal = not is_quiet and stream.isatty()
        self._has_status = False
        self._samples: collections.deque[tuple[float, int]] = collections.deque()
        self._blocks: tuple[int, int] | None = None

    def say(self, text: str = "") -> None:
        """Write a line."""
        self._write(self._erased() + text + "\n")

    def show_loading(self, number: int, total: int) -> None:
        """On a terminal: block number ``number``, counted from 1, of ``total`` is being loaded."""
        if self._is_terminal:
            self._show_status(f"Loading block {number} of {total}")

    def show_load(self, load: HostLoad, missing: Sequence[int], now: float) -> None:
        """What the host is doing; to be called every second or so.

        Args:
            missing: numbers of blocks that nobody in the swarm serves.
            now: seconds of a clock that never goes back.
        """
        if self._blocks not in (None, (load.start, load.end)):
            self.say(f"The swarm needs blocks {load.start}:{load.end} more: serving them now.")
        self._blocks = load.start, load.end
        self._samples.append((now, load.tokens))
        began, tokens_then = self._samples[0]
        rate = (load.tokens - tokens_then) / (now - began) if now > began else 0.0
        if self._is_terminal:
            self._show_status(status_text(load, missing, rate))
            if now - began >= RATE_SECONDS:
                self._samples.popleft()
        elif now - began >= LOG_PERIOD_SECONDS:
            self.say(status_text(load, missing, rate))
            self._samples.clear()
            self._samples.append((now, load.tokens))

    def clear(self) -> None:
        """Take away the line that changes."""
        self._write(self._erased())

    def _show_status(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        self._write(_ERASE_LINE + text[: width - 1])
        self._has_status = True

    def _erased(self) -> str:
        had_status, self._has_status = self._has_status, False
        return _ERASE_LINE if had_status else ""

    def _write(self, text: str) -> None:
        if self._is_quiet or not text:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # whoever read has read enough
            self._is_quiet = True


def status_text(load: HostLoad, missing: Sequence[int], tokens_per_second: float) -> str:
    """One line: blocks, sessions, cache, speed and what the swarm lacks."""
    parts = [
        f"blocks {load.start}:{load.end} of {load.num_blocks}",
        f"{load.sessions} session{'' if load.sessions == 1 else 's'}",
        f"cache {load.cache_used:.0%}",
        f"{tokens_per_second:.1f} tokens/s"
        if tokens_per_second < 10
        else f"{tokens_per_second:.0f} tokens/s",
    ]
    if missing:
        parts.append(f"nobody serves {block_ranges(missing)}")
    return "  ".join(parts)


def block_ranges(blocks: Sequence[int]) -> str:
    """Ascending block numbers as ranges in the form of ``--blocks``, like "0:4, 7:8"."""
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        if ranges and ranges[-1][1] == block:
            ranges[-1] = ranges[-1][0], block + 1
        else:
            ranges.append((block, block + 1))
    return ", ".join(f"{start}:{end}" for start, end in ranges)
