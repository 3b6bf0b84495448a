"""Chats as files: JSON, which can be imported again, and Markdown, for people. No I/O."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from petals_chat.errors import InvalidParameterError
from petals_chat.history.interface import (
    MAX_NAME_CHARS,
    MAX_TITLE_CHARS,
    AnswerState,
    Chat,
    Message,
    shown_branch,
)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
_Id = Annotated[str, Meta(min_length=1, max_length=64)]
_Seconds = Annotated[float, Meta(ge=0, le=1e9)]
_Time = Annotated[float, Meta(ge=0, le=1e11)]


class ExportedMessage(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A message in a file."""

    id: _Id
    parent: _Id | None = None
    role: Literal["user", "assistant"]
    content: str
    model: _Name | None = None
    created_at: _Time | None = None
    state: AnswerState = AnswerState.COMPLETE
    error: _Name | None = None
    finish_reason: Annotated[str, Meta(max_length=16)] | None = None
    tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    seconds: _Seconds | None = None
    first_token_seconds: _Seconds | None = None


class ExportedChat(msgspec.Struct, kw_only=True):
    """A chat in a file, with all its branches."""

    title: Annotated[str, Meta(max_length=MAX_TITLE_CHARS)]
    model: _Name | None = None
    pinned: bool = False
    settings: dict[str, Any] = {}
    current: _Id | None = None
    created_at: _Time | None = None
    messages: list[ExportedMessage]


class ExportedChats(msgspec.Struct, kw_only=True):
    """A file."""

    format: Literal["petals-chat"]
    version: Literal[1]
    chats: list[ExportedChat]


def to_json(chat: Chat, messages: Sequence[Message]) -> bytes:
    """The chat as a file that `from_json` reads."""
    exported = ExportedChat(
        title=chat.title,
        model=chat.model,
        pinned=chat.pinned,
        settings=chat.settings,
        current=chat.current,
        created_at=chat.created_at,
        messages=[_exported(message) for message in messages],
    )
    file = msgspec.json.encode(ExportedChats(format="petals-chat", version=1, chats=[exported]))
    return msgspec.json.format(file, indent=2)


def from_json(
    file: bytes, *, max_chats: int, max_chat_messages: int, max_messages: int
) -> list[tuple[Chat, list[Message]]]:
    """The chats in a file, under new ids, as the newest ones.

    Args:
        max_chat_messages: how many one chat may have.
        max_messages: how many all chats together may have.

    Raises:
        InvalidParameterError: the file is none of ours, or has too much.
    """
    try:
        exported = msgspec.json.decode(file, type=ExportedChats)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidParameterError("body", f"it is no exported chat: {error}") from None
    if len(exported.chats) > max_chats:
        raise InvalidParameterError("chats", f"there may be {max_chats} of them")
    count = sum(len(chat.messages) for chat in exported.chats)
    if count > max_messages:
        raise InvalidParameterError(
            "messages", f"a file may have {max_messages} of them, and this one has {count}"
        )
    return [_imported(chat, max_chat_messages) for chat in exported.chats]


def to_markdown(chat: Chat, messages: Sequence[Message]) -> str:
    """The branch that is shown."""
    parts = [f"# {' '.join(chat.title.split()) or 'Chat'}"]
    for message in shown_branch(chat.current, messages):
        name = "You" if message.role == "user" else message.model or "Assistant"
        parts += [f"## {name}", message.content.strip()]
    return "\n\n".join(parts) + "\n"


def _exported(message: Message) -> ExportedMessage:
    values = msgspec.structs.asdict(message)
    del values["generation"]
    return ExportedMessage(**values | {"state": _at_rest(message.state)})


def _imported(chat: ExportedChat, max_messages: int) -> tuple[Chat, list[Message]]:
    if len(chat.messages) > max_messages:
        raise InvalidParameterError("messages", f"a chat may have {max_messages} of them")
    now = time.time()
    ids = {message.id: str(uuid.uuid4()) for message in chat.messages}
    if len(ids) < len(chat.messages):
        raise InvalidParameterError("messages", "two have the same id")
    known: set[str | None] = {None}
    messages = []
    for message in chat.messages:
        if message.parent not in known:
            raise InvalidParameterError("messages", "a parent must come before its message")
        known.add(message.id)
        values = _storable(msgspec.structs.asdict(message)) | {
            "id": ids[message.id],
            "parent": message.parent and ids[message.parent],
            "created_at": now if message.created_at is None else message.created_at,
            "state": _at_rest(message.state),
        }
        messages.append(Message(**values))
    values = _storable(msgspec.structs.asdict(chat)) | {
        "id": str(uuid.uuid4()),
        "current": ids.get(chat.current or ""),
        "created_at": now if chat.created_at is None else chat.created_at,
    }
    del values["messages"]
    return Chat(**values, updated_at=now, shared=None), messages


def _storable(values: dict[str, Any]) -> dict[str, Any]:
    """The values without the one character that not every database can keep."""
    return {
        name: value.replace("\0", REPLACEMENT) if isinstance(value, str) else value
        for name, value in values.items()
    }


def _at_rest(state: AnswerState) -> AnswerState:
    return AnswerState.INTERRUPTED if state is AnswerState.ANSWERING else state
