"""The model's tokenizer, reduced to what sessions need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import cached_file

from petals_chat.errors import ConfigurationError


class Tokenizer:
    """Text to token ids and back.

    Raises:
        ConfigurationError: the repository has no tokenizer that can be loaded.
    """

    def __init__(self, repository: str, revision: str | None, config: dict[str, object]) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{repository}: its tokenizer cannot be loaded: {error}") from error
        self.end_of_sequence_ids = _end_of_sequence_ids(repository, revision, config)
        """Tokens that end a text; a model may have several."""

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Token ids of ``text``; with the special tokens that begin a text (BOS) only ``at_start`` of a session."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=at_start)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special tokens included."""
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _end_of_sequence_ids(repository: str, revision: str | None, config: dict[str, object]) -> frozenset[int]:
    """As ``generate()`` takes them: from generation_config.json, else from config.json; one id or a list."""
    file = cached_file(
        repository,
        "generation_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    generation_config = json.loads(Path(file).read_text()) if file else {}
    ids = generation_config.get("eos_token_id", config.get("eos_token_id"))
    return frozenset([ids] if isinstance(ids, int) else ids or ())
