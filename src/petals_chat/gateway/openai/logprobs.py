"""Log probabilities of an answer's tokens, in the two forms that the API has. No I/O."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any

from petals_chat.protocol.messages import FinishReason, TokenLogprobs, TokenProbability


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedLogprobs:
    """A token of the answer, and where it begins in the answer's text (characters)."""

    offset: int
    token: TokenLogprobs


class LogprobsFilter:
    """Keeps the tokens in step with the text: what is held back of that, or never comes, has no token."""

    def __init__(self) -> None:
        self._held: deque[TokenLogprobs] = deque()
        self._bytes = 0
        self._characters = 0

    def add(
        self, tokens: Sequence[TokenLogprobs], text_bytes: int, finish_reason: FinishReason | None
    ) -> list[PlacedLogprobs]:
        """The tokens that belong to what is certain of the text now.

        Args:
            tokens: the newest ones.
            text_bytes: size of all the text that is certain.
            finish_reason: None if more may come.
        """
        self._held += tokens
        if finish_reason is FinishReason.END_OF_SEQUENCE and self._held:
            self._held.pop()
        all_are_certain = finish_reason not in (None, FinishReason.STOP_SEQUENCE)
        placed = []
        while self._held and (all_are_certain or self._bytes < text_bytes):
            token = self._held.popleft()
            placed.append(PlacedLogprobs(self._characters, token))
            self._bytes += len(token.chosen.text)
            self._characters += len(_text(token.chosen))
        return placed


def chat_logprobs(tokens: Sequence[PlacedLogprobs]) -> dict[str, Any] | None:
    """The ``logprobs`` of a choice of a chat completion; None for no tokens."""
    if not tokens:
        return None
    content = [
        {
            **_described(each.token.chosen),
            "top_logprobs": [_described(probability) for probability in each.token.top],
        }
        for each in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[PlacedLogprobs]) -> dict[str, Any] | None:
    """The ``logprobs`` of a choice of a completion; None for no tokens."""
    if not tokens:
        return None
    return {
        "tokens": [_text(each.token.chosen) for each in tokens],
        "token_logprobs": [each.token.chosen.logprob for each in tokens],
        "top_logprobs": [
            {_text(probability): probability.logprob for probability in (*each.token.top, each.token.chosen)}
            for each in tokens
        ],
        "text_offset": [each.offset for each in tokens],
    }


def _described(probability: TokenProbability) -> dict[str, Any]:
    return {
        "token": _text(probability),
        "logprob": probability.logprob,
        "bytes": list(probability.text),
    }


def _text(probability: TokenProbability) -> str:
    return probability.text.decode(errors="replace")
