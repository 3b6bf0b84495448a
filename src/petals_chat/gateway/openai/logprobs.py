"""Log probabilities of an answer's tokens, in the two forms that the API has. No I/O."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from petals_chat.errors import InvalidParameterError
from petals_chat.protocol.messages import FinishReason, TokenLogprobs, TokenProbability

MAX_COLLECTED_BYTES = 32 * 1024 * 1024
"""Log probabilities that are kept for the end of a reply, as JSON. Putting so many together takes some 50 ms."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedLogprobs:
    """A token of the answer, and where it begins in the answer's text (characters)."""

    offset: int
    token: TokenLogprobs


class LogprobsFilter:
    """Keeps the tokens in step with the text: what is held back of that, or never comes, has no token.

    Args:
        echoed: text of the prompt, if that is the beginning of the answer.
    """

    def __init__(self, echoed: str = "") -> None:
        self._echoed = echoed
        self._held: deque[TokenLogprobs] = deque()
        self._bytes = 0
        self._characters = 0

    def add_prompt(self, tokens: Sequence[TokenLogprobs]) -> list[PlacedLogprobs]:
        """The next tokens of the prompt. What tokenizers put in front of a text takes no place in it."""
        placed = []
        for token in tokens:
            placed.append(PlacedLogprobs(self._characters, token))
            text = _text(token.chosen)
            if self._characters == 0 and not self._echoed.startswith(text):
                text = text.removeprefix(" ")
                if not self._echoed.startswith(text):
                    continue
            self._characters += len(text)
        return placed

    def add(
        self, tokens: Sequence[TokenLogprobs], text_bytes: int, finish_reason: FinishReason | None
    ) -> list[PlacedLogprobs]:
        """The tokens that belong to what is certain of the text now.

        Args:
            tokens: the newest ones.
            text_bytes: size of all the generated text that is certain.
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


class LogprobsWriter(ABC):
    """Writes the ``logprobs`` of a choice.

    Each token is written as JSON when it comes: an answer with thousands of them needs little memory, and no long
    time at its end.
    """

    @abstractmethod
    def add(self, tokens: Sequence[PlacedLogprobs]) -> None:
        """Go on with these."""

    @abstractmethod
    def value(self) -> msgspec.Raw | None:
        """The object; None for no tokens."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes so far."""


def check_collected(writers: Iterable[LogprobsWriter]) -> None:
    """Keep a reply from growing for ever.

    Raises:
        InvalidParameterError: the log probabilities of all its choices are more than a reply may have.
    """
    if sum(writer.size for writer in writers) > MAX_COLLECTED_BYTES:
        raise InvalidParameterError(
            "logprobs",
            f"those of this answer are more than the {MAX_COLLECTED_BYTES // 2**20} MiB that a reply may have. Ask for "
            "fewer of them, or for a shorter answer",
        )


class ChatLogprobsWriter(LogprobsWriter):
    """Those of a chat completion."""

    def __init__(self) -> None:
        self._content = _List()

    def add(self, tokens: Sequence[PlacedLogprobs]) -> None:
        """Go on with these."""
        for each in tokens:
            self._content.add(described(each.token))

    def value(self) -> msgspec.Raw | None:
        """The object; None for no tokens."""
        if not self._content.items:
            return None
        return _joined(b'{"content":[', self._content.items, b'],"refusal":null}')

    @property
    def size(self) -> int:
        """Bytes so far."""
        return len(self._content.items)


class ContentLogprobsWriter(ChatLogprobsWriter):
    """Those of a text of a response: the list alone."""

    def value(self) -> msgspec.Raw:
        """The list."""
        return _joined(b"[", self._content.items, b"]")


class CompletionLogprobsWriter(LogprobsWriter):
    """Those of a completion of a prompt."""

    def __init__(self) -> None:
        self._tokens, self._logprobs, self._top, self._offsets = _List(), _List(), _List(), _List()

    def add(self, tokens: Sequence[PlacedLogprobs]) -> None:
        """Go on with these."""
        for each in tokens:
            token = each.token
            self._tokens.add(_text(token.chosen))
            self._logprobs.add(token.chosen.logprob)
            self._top.add(_likeliest(token))
            self._offsets.add(each.offset)

    def value(self) -> msgspec.Raw | None:
        """The object; None for no tokens."""
        if not self._tokens.items:
            return None
        return _joined(
            *(b'{"tokens":[', self._tokens.items),
            *(b'],"token_logprobs":[', self._logprobs.items),
            *(b'],"top_logprobs":[', self._top.items),
            *(b'],"text_offset":[', self._offsets.items, b"]}"),
        )

    @property
    def size(self) -> int:
        """Bytes so far."""
        return sum(len(each.items) for each in (self._tokens, self._logprobs, self._top, self._offsets))


def described(token: TokenLogprobs) -> dict[str, Any]:
    """A token and those in its place, as chats and responses have it."""
    return {**_described(token.chosen), "top_logprobs": [_described(each) for each in token.top]}


class _List:
    """A JSON list that grows."""

    def __init__(self) -> None:
        self.items = bytearray()
        """Without the brackets."""

    def add(self, item: object) -> None:
        if self.items:
            self.items += b","
        self.items += msgspec.json.encode(item)


def _joined(*parts: bytes | bytearray) -> msgspec.Raw:
    return msgspec.Raw(b"".join(parts))  # one copy: it may be many megabytes


def _likeliest(token: TokenLogprobs) -> dict[str, float | None] | None:
    if token.chosen.logprob is None:
        return None
    likeliest: dict[str, float | None] = {}
    for each in (*token.top, token.chosen):
        likeliest.setdefault(
            _text(each), each.logprob
        )  # of parts of characters, which look the same, the likeliest
    return likeliest


def _described(probability: TokenProbability) -> dict[str, Any]:
    return {
        "token": _text(probability),
        "logprob": probability.logprob,
        "bytes": list(probability.text),
    }


def _text(probability: TokenProbability) -> str:
    return probability.text.decode(errors="replace")
