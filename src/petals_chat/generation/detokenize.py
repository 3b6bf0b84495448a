"""Token ids into text, piece by piece, never splitting a character.

Decoding a token on its own gives the wrong text: tokenizers drop the leading space of the first token, and a
character may be spread over several tokens. Therefore the text of new tokens is the difference between two
decodings that share a context of earlier tokens, and it is given out only when it does not end within a
character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode the bytes of an incomplete character to."""

MAX_CONTEXT_TOKENS = 32
MAX_HELD_TOKENS = 16
"""A character has at most 4 bytes. When this many tokens end in no character, their bytes are not text."""


class IncrementalDetokenizer:
    """Decodes the tokens of one session as they come.

    Args:
        decode: token ids to text, special tokens included.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []

    @property
    def holds_tokens(self) -> bool:
        """Whether tokens are held back because they end within a character."""
        return bool(self._held)

    def start_after(self, tokens: Sequence[int]) -> None:
        """Begin anew: the next tokens follow ``tokens``, whose text is known already."""
        size = min(4, len(tokens))
        while True:
            self._set_context(list(tokens[len(tokens) - size :]))
            # A context that begins within a character would hide the characters after it.
            if not self._context_text.startswith(REPLACEMENT_CHARACTER) or size >= min(
                MAX_CONTEXT_TOKENS, len(tokens)
            ):
                break
            size += 1
        self._held = []

    def add(self, token: int) -> str:
        """The text that ``token`` completes; "" while a character is incomplete."""
        self._held.append(token)
        text = self._decode(self._context + self._held)
        if text.endswith(REPLACEMENT_CHARACTER) and len(self._held) < MAX_HELD_TOKENS:
            return ""
        new_text = text[len(self._context_text) :]
        self._set_context(self._held)
        self._held = []
        return new_text

    def _set_context(self, tokens: list[int]) -> None:
        self._context = tokens
        self._context_text = self._decode(tokens) if tokens else ""
