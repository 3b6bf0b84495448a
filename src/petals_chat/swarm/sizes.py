"""Sizes of memory, read and written for people."""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?:([kmgt])(b|ib)?|b)?", re.IGNORECASE)
_MAX_SIZE = 1 << 60


def parse_size(text: str) -> int:
    """Bytes, from text like "8GiB", "500 MB" or "1048576"; "8G" is 8 GiB.

    Raises:
        ValueError: it is no such text, or nothing, or more than any machine has.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, letter, suffix = match.groups()
    base = 1000 if suffix in ("b", "B") else 1024
    size = int(float(number) * base ** (" kmgt".index(letter.lower()) if letter else 0))
    if not 0 < size < _MAX_SIZE:
        raise ValueError(text)
    return size


def say_size(size: int) -> str:
    """Bytes for people, like "1.5 GB"."""
    value = float(size)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB" if value < 100 else f"{value:.0f} GB"
