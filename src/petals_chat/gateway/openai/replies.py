"""The replies' objects: whole ones, and the chunks of a stream. No I/O.

A `ReplyWriter` belongs to one request; the two kinds of completions differ in how they write a choice.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from petals_chat.engine.interface import Chunk
from petals_chat.errors import EngineError
from petals_chat.gateway.openai.logprobs import (
    LogprobsFilter,
    PlacedLogprobs,
    chat_logprobs,
    completion_logprobs,
)
from petals_chat.gateway.openai.stop_text import StopTextFilter
from petals_chat.protocol.messages import FinishReason, GenerationRequest

_FINISH_REASONS = {
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.END_OF_SEQUENCE: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT_FULL: "length",
}

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What is added to an answer."""

    text: str
    logprobs: Sequence[PlacedLogprobs]


class Choice:
    """One answer, as its pieces come.

    Args:
        echo: the prompt's text is part of it.
    """

    def __init__(self, index: int, request: GenerationRequest, *, echo: bool = False) -> None:
        self.index = index
        self.text = ""
        """All of it so far that is certain; what may become stop text is not in it."""
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.logprobs: list[PlacedLogprobs] = []
        """Of the tokens of `text`, if they were asked for."""
        self._filter = StopTextFilter(request.stop_sequences)
        self._logprobs_filter = LogprobsFilter()
        self._generated_bytes = 0
        self._echoed = request.inputs if echo and isinstance(request.inputs, str) else ""

    def add(self, chunk: Chunk) -> Piece:
        """What is certain now and was not before.

        Raises:
            EngineError: the generation was ended from this side.
        """
        self.completion_tokens += chunk.token_count
        if chunk.finish_reason is None:
            piece = self._filter.add(chunk.text)
        elif chunk.finish_reason is FinishReason.CANCELLED:
            raise EngineError("the server ended the generation. Try again in a moment")
        else:
            piece = self._filter.end(
                chunk.text, is_stop_sequence=chunk.finish_reason is FinishReason.STOP_SEQUENCE
            )
            self.finish_reason = _FINISH_REASONS[chunk.finish_reason]
            self.prompt_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
        self._generated_bytes += len(piece.encode())
        logprobs = self._logprobs_filter.add(chunk.logprobs, self._generated_bytes, chunk.finish_reason)
        self.logprobs += logprobs
        piece, self._echoed = self._echoed + piece, ""
        self.text += piece
        return Piece(piece, logprobs)


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @classmethod
    def of(cls, choices: Sequence[Choice], choices_per_prompt: int) -> Usage:
        """All choices' tokens; each prompt counts once, however many choices it has."""
        prompts = choices[::choices_per_prompt]
        return cls(
            sum(choice.prompt_tokens for choice in prompts),
            sum(choice.completion_tokens for choice in choices),
            sum(choice.cached_tokens for choice in prompts),
        )

    def as_json(self) -> Json:
        """The ``usage`` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class ReplyWriter(ABC):
    """Writes the reply to one request, as JSON.

    Args:
        model: key of the model.
        includes_usage: a stream is to end with the numbers of tokens.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, *, includes_usage: bool = False) -> None:
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_object,
            "created": int(time.time()),
            "model": model,
        }
        self._includes_usage = includes_usage

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The reply that is not a stream."""
        return msgspec.json.encode(
            {
                **self._head,
                "object": self.whole_object,
                "choices": [self._whole_choice(choice) for choice in choices],
                "usage": usage.as_json(),
            }
        )

    def opening(self, index: int) -> list[bytes]:
        """The chunks with which a choice begins."""
        return []

    def piece(self, choice: Choice, piece: Piece) -> list[bytes]:
        """The chunks for what was added to a choice, and for its end, if it has ended."""
        chunks = []
        if piece.text or piece.logprobs:
            chunks.append(self._chunk(self._piece_choice(choice.index, piece)))
        if choice.finish_reason is not None:
            chunks.append(self._chunk(self._finished_choice(choice.index, choice.finish_reason)))
        return chunks

    def closing(self, usage: Usage) -> list[bytes]:
        """The chunks that come after all choices have ended."""
        if not self._includes_usage:
            return []
        return [msgspec.json.encode({**self._head, "choices": [], "usage": usage.as_json()})]

    def _chunk(self, choice: Json) -> bytes:
        chunk: Json = {**self._head, "choices": [choice]}
        if self._includes_usage:
            chunk["usage"] = None
        return msgspec.json.encode(chunk)

    @abstractmethod
    def _whole_choice(self, choice: Choice) -> Json: ...

    @abstractmethod
    def _piece_choice(self, index: int, piece: Piece) -> Json: ...

    @abstractmethod
    def _finished_choice(self, index: int, finish_reason: str) -> Json: ...


class ChatReplyWriter(ReplyWriter):
    """Writes chat completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> list[bytes]:
        """Says who speaks."""
        return [self._chunk(_delta(index, {"role": "assistant", "content": ""}))]

    def _whole_choice(self, choice: Choice) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _piece_choice(self, index: int, piece: Piece) -> Json:
        return {**_delta(index, {"content": piece.text}), "logprobs": chat_logprobs(piece.logprobs)}

    def _finished_choice(self, index: int, finish_reason: str) -> Json:
        return _delta(index, {}, finish_reason)


class CompletionReplyWriter(ReplyWriter):
    """Writes completions of prompts."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _whole_choice(self, choice: Choice) -> Json:
        reply = _text(choice.index, choice.text, choice.finish_reason)
        return {**reply, "logprobs": completion_logprobs(choice.logprobs)}

    def _piece_choice(self, index: int, piece: Piece) -> Json:
        return {**_text(index, piece.text), "logprobs": completion_logprobs(piece.logprobs)}

    def _finished_choice(self, index: int, finish_reason: str) -> Json:
        return _text(index, "", finish_reason)


def _delta(index: int, delta: Json, finish_reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _text(index: int, text: str, finish_reason: str | None = None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
