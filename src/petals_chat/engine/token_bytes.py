"""The bytes that a single token stands for: decoding a token on its own loses spaces and parts of characters."""

from __future__ import annotations

import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"
"""How SentencePiece writes a space."""


class TokenBytes:
    """Looks up tokens of a tokenizer of transformers: byte-level ones, and those that come from SentencePiece."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = any("Ġ" in piece for piece in tokenizer.tokenize("a b"))
        self._special_ids = frozenset(tokenizer.added_tokens_decoder)

    def of(self, token: int) -> bytes:
        """The token's bytes; none for an id that the tokenizer does not know."""
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._special_ids:
            return piece.encode()
        if self._is_byte_level:
            return b"".join(_BYTES.get(character) or character.encode() for character in piece)
        if byte := _BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace(_SPACE, " ").encode()


def _byte_level_characters() -> dict[str, bytes]:
    """Byte-level tokenizers write each byte as a printable character: as itself, or as one from U+0100 on (GPT-2)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}


_BYTES = _byte_level_characters()
