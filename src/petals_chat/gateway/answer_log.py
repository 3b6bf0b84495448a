"""What an answer has come to: its text so far, token by token, and how it ended. No I/O.

Positions count tokens. A follower names the last position that it has seen, and gets what came after it; so every
token is seen once, by any number of followers, however often they come back.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from petals_chat.engine.interface import Chunk
from petals_chat.errors import EngineError, InvalidParameterError, PetalsChatError, SessionExpiredError
from petals_chat.gateway.openai.stop_text import StopTextFilter
from petals_chat.history.interface import AnswerState
from petals_chat.protocol.messages import FinishReason

STOPPED = "stopped"
"""Why an answer ended that somebody stopped."""

_FINISH_REASONS = {
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.END_OF_SEQUENCE: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT_FULL: "context_full",
}


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """The answer waits for room in the swarm; 1 = next."""

    place: int


@dataclass(frozen=True, slots=True)
class Loading:
    """The answer waits until its model is loaded."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of ``token_count`` tokens, up to the token at ``position``."""

    text: str
    token_count: int
    position: int


@dataclass(frozen=True, slots=True)
class End:
    """The last piece, which may be empty, and why it is the last."""

    piece: Piece
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer broke off."""

    error: PetalsChatError


Waiting = QueuePlace | Loading
Followed = Waiting | Piece | End | Failed


class AnswerLog:
    """One answer. It is complete when it has a ``state`` other than ``ANSWERING``, and changes no more then.

    The text has neither the stop text nor the space that many models begin an answer with.

    Args:
        stop_sequences: the engine's, which end the text that it gives.
        continues: the text goes on from an earlier one, so it keeps the space that it begins with.
    """

    def __init__(self, stop_sequences: Sequence[str], *, continues: bool) -> None:
        self.text = ""
        self.tokens = 0
        """Those of the text so far, and of what is held back of it."""
        self.state = AnswerState.ANSWERING
        self.finish_reason: str | None = None
        self.error: PetalsChatError | None = None
        self.waits_for: Waiting | None = None
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._filter = StopTextFilter(stop_sequences)
        self._keeps_space = continues
        # Where pieces end, as counts of tokens and of characters. Arrays, since answers are kept for a while.
        self._positions = array("I", [0])
        self._lengths = array("I", [0])

    @property
    def position(self) -> int:
        """Where the last piece ended: how many tokens the text has."""
        return self._positions[-1]

    @property
    def is_ended(self) -> bool:
        """Whether it changes no more."""
        return self.state is not AnswerState.ANSWERING

    def add(self, chunk: Chunk) -> None:
        """What the engine gave next."""
        if self.is_ended:
            return
        self.waits_for = None if chunk.queue_place is None else QueuePlace(chunk.queue_place)
        if self.waits_for is not None:
            return
        self.tokens += chunk.token_count
        self._prompt_tokens = chunk.prompt_tokens or self._prompt_tokens
        self._cached_tokens = chunk.cached_tokens or self._cached_tokens
        match chunk.finish_reason:
            case None:
                self._append(self._filter.add(chunk.text))
            case FinishReason.CANCELLED:
                self._append(self._filter.end(chunk.text, is_stop_sequence=False))
                self.fail(SessionExpiredError("of this answer", "the server ended it"))
            case reason:
                is_stop_sequence = reason is FinishReason.STOP_SEQUENCE
                self._append(self._filter.end(chunk.text, is_stop_sequence=is_stop_sequence))
                self._end(AnswerState.COMPLETE, _FINISH_REASONS[reason])

    def stop(self) -> None:
        """Somebody wants no more of it."""
        if not self.is_ended:
            self._append(self._filter.end("", is_stop_sequence=False))
            self._end(AnswerState.STOPPED, STOPPED)

    def interrupt(self) -> None:
        """The server stops."""
        if not self.is_ended:
            self.fail(EngineError("the server is being stopped. Try again in a moment"))
            self.state = AnswerState.INTERRUPTED

    def fail(self, error: PetalsChatError) -> None:
        """It cannot go on."""
        if not self.is_ended:
            self.error = error
            self.state = AnswerState.FAILED

    def check_position(self, position: int) -> None:
        """Raise `InvalidParameterError` if no piece ended at ``position``."""
        self._index(position)

    def after(self, position: int) -> Piece:
        """All text after ``position``, as one piece.

        Raises:
            InvalidParameterError: no piece ended there.
        """
        text = self.text[self._lengths[self._index(position)] :]
        return Piece(text, self.position - position, self.position)

    def end_after(self, position: int) -> End | Failed:
        """The end for a follower who has seen everything up to ``position``."""
        assert self.is_ended
        if self.error is not None:
            return Failed(self.error)
        assert self.finish_reason is not None
        return End(self.after(position), self.finish_reason, self._prompt_tokens, self._cached_tokens)

    def _append(self, text: str) -> None:
        if not self.text and not self._keeps_space:
            text = text.lstrip()
        if text:  # else its tokens count with those of the next piece
            self.text += text
            self._mark()

    def _end(self, state: AnswerState, finish_reason: str) -> None:
        self.state, self.finish_reason = state, finish_reason
        if self.position != self.tokens:
            self._mark()

    def _mark(self) -> None:
        self._positions.append(self.tokens)
        self._lengths.append(len(self.text))

    def _index(self, position: int) -> int:
        index = bisect_left(self._positions, position)
        if index == len(self._positions) or self._positions[index] != position:
            raise InvalidParameterError("position", f"no piece of the answer ended at token {position}")
        return index
