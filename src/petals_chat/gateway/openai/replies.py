"""The replies' objects: whole ones, and the chunks of a stream. No I/O.

A `ReplyWriter` belongs to one request. The two kinds of completions stand here, and differ in how they write a choice;
responses have a module of their own.
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
from petals_chat.gateway.openai.errors import ErrorReply
from petals_chat.gateway.openai.event_stream import event
from petals_chat.gateway.openai.logprobs import (
    ChatLogprobsWriter,
    CompletionLogprobsWriter,
    LogprobsFilter,
    LogprobsWriter,
    PlacedLogprobs,
    check_collected,
)
from petals_chat.gateway.openai.stop_text import StopTextFilter
from petals_chat.gateway.openai.tools import Tools
from petals_chat.protocol.messages import FinishReason, GenerationRequest, ToolCall

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
    logprobs: Sequence[PlacedLogprobs] = ()
    calls: Sequence[ToolCall] = ()
    """Calls of functions; with the last piece."""


class Choice:
    """One answer, as its pieces come.

    Args:
        echoed: text of the prompt, if that is part of it.
        tools: functions that it may call.
    """

    def __init__(
        self, index: int, request: GenerationRequest, *, echoed: str = "", tools: Tools | None = None
    ) -> None:
        self.index = index
        self.text = ""
        """All of it so far that is certain; what may become stop text is not in it."""
        self.calls: Sequence[ToolCall] = ()
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._filter = StopTextFilter(request.stop_sequences)
        self._logprobs_filter = LogprobsFilter(echoed)
        self._tool_reader = tools.reader() if tools else None
        self._generated_bytes = 0
        self._echoed = echoed

    def add(self, chunk: Chunk) -> Piece:
        """What is certain now and was not before.

        Raises:
            EngineError: the generation was ended from this side.
        """
        if chunk.finish_reason is FinishReason.CANCELLED:
            raise EngineError("the server ended the generation. Try again in a moment")
        self.completion_tokens += chunk.token_count
        text = self._certain_text(chunk)
        self._generated_bytes += len(text.encode())
        logprobs = [
            *self._logprobs_filter.add_prompt(chunk.prompt_logprobs),
            *self._logprobs_filter.add(chunk.logprobs, self._generated_bytes, chunk.finish_reason),
        ]
        if self._tool_reader:
            text = self._tool_reader.add(text)
            if chunk.finish_reason is not None:
                rest, self.calls = self._tool_reader.end()
                text += rest
        if chunk.finish_reason is not None:
            self.finish_reason = "tool_calls" if self.calls else _FINISH_REASONS[chunk.finish_reason]
            self.prompt_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
        text, self._echoed = self._echoed + text, ""
        self.text += text
        return Piece(text, logprobs, self.calls)

    def _certain_text(self, chunk: Chunk) -> str:
        if chunk.finish_reason is None:
            return self._filter.add(chunk.text)
        return self._filter.end(
            chunk.text, is_stop_sequence=chunk.finish_reason is FinishReason.STOP_SEQUENCE
        )


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
        """The ``usage`` object of completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class ReplyWriter(ABC):
    """Writes the reply to one request: either collects pieces and writes a whole one, or writes events."""

    @abstractmethod
    def collect(self, choice: Choice, piece: Piece) -> None:
        """Keep what is needed of a piece for the whole reply, besides what the choice keeps."""

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The reply that is not a stream."""

    @abstractmethod
    def opening(self, choices: int) -> list[bytes]:
        """The events with which a stream of so many choices begins."""

    @abstractmethod
    def piece(self, choice: Choice, piece: Piece) -> list[bytes]:
        """The events for what was added to a choice, and for its end, if it has ended."""

    @abstractmethod
    def closing(self, choices: Sequence[Choice], usage: Usage) -> list[bytes]:
        """The events that come after all choices have ended."""

    def failure(self, error: ErrorReply) -> list[bytes]:
        """The events with which a stream ends that cannot go on."""
        return [event(msgspec.json.encode(error))]


class CompletionsWriter(ReplyWriter):
    """What both kinds of completions have in common.

    Args:
        model: key of the model.
        includes_usage: a stream is to end with the numbers of tokens.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    logprobs_writer: ClassVar[type[LogprobsWriter]]

    def __init__(self, model: str, *, includes_usage: bool = False) -> None:
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_object,
            "created": int(time.time()),
            "model": model,
        }
        self._includes_usage = includes_usage
        self._logprobs: dict[int, LogprobsWriter] = {}

    def collect(self, choice: Choice, piece: Piece) -> None:
        """Keep the log probabilities."""
        if piece.logprobs:
            self._logprobs.setdefault(choice.index, self.logprobs_writer()).add(piece.logprobs)
            check_collected(self._logprobs.values())

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The reply that is not a stream."""
        return msgspec.json.encode(
            {
                **self._head,
                "object": self.whole_object,
                "choices": [
                    {
                        "index": choice.index,
                        **self._answer(choice),
                        "logprobs": self._collected_logprobs(choice.index),
                        "finish_reason": choice.finish_reason,
                    }
                    for choice in choices
                ],
                "usage": usage.as_json(),
            }
        )

    def opening(self, choices: int) -> list[bytes]:
        """Nothing, unless a subclass has something."""
        return []

    def piece(self, choice: Choice, piece: Piece) -> list[bytes]:
        """The chunks for what was added to a choice, and for its end, if it has ended."""
        chunks = []
        if piece.text or piece.logprobs or piece.calls:
            writer = self.logprobs_writer()
            writer.add(piece.logprobs)
            for part in self._parts(piece):
                chunks.append(self._chunk(choice.index, part, logprobs=writer.value()))
                writer = self.logprobs_writer()
        if choice.finish_reason is not None:
            chunks.append(self._chunk(choice.index, self._no_part, choice.finish_reason))
        return chunks

    def closing(self, choices: Sequence[Choice], usage: Usage) -> list[bytes]:
        """The numbers of tokens, if they were asked for."""
        if not self._includes_usage:
            return []
        return [event(msgspec.json.encode({**self._head, "choices": [], "usage": usage.as_json()}))]

    def _chunk(
        self, index: int, part: Json, finish_reason: str | None = None, logprobs: msgspec.Raw | None = None
    ) -> bytes:
        choice = {"index": index, **part, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk: Json = {**self._head, "choices": [choice]}
        if self._includes_usage:
            chunk["usage"] = None
        return event(msgspec.json.encode(chunk))

    def _collected_logprobs(self, index: int) -> msgspec.Raw | None:
        writer = self._logprobs.get(index)
        return writer.value() if writer else None

    @abstractmethod
    def _answer(self, choice: Choice) -> Json: ...

    @abstractmethod
    def _parts(self, piece: Piece) -> list[Json]: ...

    @property
    @abstractmethod
    def _no_part(self) -> Json: ...


class ChatReplyWriter(CompletionsWriter):
    """Writes chat completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    logprobs_writer = ChatLogprobsWriter

    def opening(self, choices: int) -> list[bytes]:
        """Says who speaks."""
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(index, delta) for index in range(choices)]

    def _answer(self, choice: Choice) -> Json:
        content = None if choice.calls and not choice.text else choice.text
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            message["tool_calls"] = [_call(call) for call in choice.calls]
        return {"message": message}

    def _parts(self, piece: Piece) -> list[Json]:
        deltas: list[Json] = []
        if piece.text or not piece.calls:
            deltas.append({"content": piece.text})
        if piece.calls:
            calls = [{"index": index, **_call(call)} for index, call in enumerate(piece.calls)]
            deltas.append({"tool_calls": calls})
        return [{"delta": delta} for delta in deltas]

    @property
    def _no_part(self) -> Json:
        return {"delta": {}}


class CompletionReplyWriter(CompletionsWriter):
    """Writes completions of prompts."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"
    logprobs_writer = CompletionLogprobsWriter

    def _answer(self, choice: Choice) -> Json:
        return {"text": choice.text}

    def _parts(self, piece: Piece) -> list[Json]:
        return [{"text": piece.text}]

    @property
    def _no_part(self) -> Json:
        return {"text": ""}


def _call(call: ToolCall) -> Json:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
