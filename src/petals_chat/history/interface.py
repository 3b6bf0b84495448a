"""What the history knows of chats, and what it needs of an answer that it writes down. No database here.

Times are seconds since 1970.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

MAX_TITLE_CHARS = 200
MAX_NAME_CHARS = 200
"""Names of models and codes of errors."""


class AnswerState(enum.StrEnum):
    """How a message is; those of users are complete from the beginning."""

    COMPLETE = "complete"
    ANSWERING = "answering"
    """It is being written."""
    STOPPED = "stopped"
    """Somebody stopped it."""
    FAILED = "failed"
    """It broke off with an error."""
    INTERRUPTED = "interrupted"
    """The server ended while it was written."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a chat. Those with the same parent are branches."""

    id: str
    """A UUID that the client chose."""
    parent: str | None
    role: Literal["user", "assistant"]
    content: str
    model: str | None = None
    created_at: float
    state: AnswerState = AnswerState.COMPLETE
    error: str | None = None
    """The code of the error with which it broke off."""
    generation: str | None = None
    """While it is being written: what to attach to."""
    finish_reason: str | None = None
    tokens: int | None = None
    seconds: float | None = None
    first_token_seconds: float | None = None


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """A chat without its messages."""

    id: str
    """A UUID that the client chose; unique among the visitor's chats."""
    title: str
    model: str | None
    pinned: bool
    settings: dict[str, Any]
    current: str | None
    """Id of the last message of the branch that is shown."""
    created_at: float
    updated_at: float
    shared: str | None
    """The token under which a snapshot of it can be read by anybody."""


def shown_branch(current: str | None, all_messages: Sequence[Message]) -> list[Message]:
    """The messages from the first one to ``current``, or to the newest one."""
    by_id = {message.id: message for message in all_messages}
    message = by_id.get(current or "", all_messages[-1] if all_messages else None)
    branch: list[Message] = []
    while message is not None and len(branch) < len(all_messages):
        branch.append(message)
        message = by_id.get(message.parent or "")
    return branch[::-1]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What of a chat was shared: the branch that was shown at that time."""

    title: str
    model: str | None
    created_at: float
    messages: tuple[Message, ...]


class Record(msgspec.Struct, frozen=True):
    """Where an answer is to be written down."""

    chat: str
    message: str
    """Id of the answer's message: a new one, or the one that is continued."""
    parent: str
    """Id of the message that is answered."""


class RunningAnswer(Protocol):
    """An answer in the making, as far as writing it down goes."""

    @property
    def id(self) -> str:
        """Its generation's id."""

    @property
    def model_key(self) -> str:
        """Which model writes it."""

    @property
    def continues(self) -> bool:
        """It goes on from the text of its message."""

    @property
    def text(self) -> str:
        """What there is of it."""

    @property
    def tokens(self) -> int:
        """How many tokens that is."""

    @property
    def state(self) -> AnswerState:
        """``ANSWERING`` until it changes no more."""

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, unless it broke off."""

    @property
    def error_code(self) -> str | None:
        """The error with which it broke off."""

    @property
    def seconds(self) -> float:
        """From its beginning until now, or its end."""

    @property
    def first_token_seconds(self) -> float | None:
        """From its beginning until its first text."""

    async def wait_until_ended(self) -> None:
        """Return when it changes no more."""


class Recording(Protocol):
    """Writes one answer down."""

    async def begin(self, answer: RunningAnswer) -> None:
        """Make its message, or take up the one that it continues.

        Raises:
            PetalsChatError: it cannot be written there.
        """

    def values(self, answer: RunningAnswer) -> dict[str, Any]:
        """What the answer makes of its message so far: the text, with what it continues, and its figures."""

    async def write(self, answer: RunningAnswer) -> None:
        """Write what it comes to, until it has ended. Never raises because of the database."""
