"""The visitors' chats in the database. Everything is looked up with its visitor: nobody meets what is another's.

A visitor is a text, here without further meaning. Limits are those of the settings, and hold in each transaction.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NoReturn

import msgspec
from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    and_,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from petals_chat.errors import (
    HistoryConflictError,
    HistoryFullError,
    InvalidParameterError,
    PetalsChatError,
    UnknownChatError,
    UnknownMessageError,
    UnknownShareError,
)
from petals_chat.history.database import Database
from petals_chat.history.interface import AnswerState, Chat, Message, Snapshot, shown_branch
from petals_chat.history.tables import chats, messages, shares
from petals_chat.settings import HistorySettings

logger = logging.getLogger(__name__)

MAX_SEARCHES = 2
"""Searches at once, which read all that a visitor has; others wait for their turn."""
EXPIRY_PERIOD_SECONDS = 3600.0
SECONDS_PER_DAY = 24 * 3600
DELETED_AT_ONCE = 100
"""Chats that one transaction deletes, so that other writers need not wait for long."""

_MESSAGE_COLUMNS = [messages.c[name] for name in Message.__struct_fields__]
_CHAT_COLUMNS = [
    *(chats.c[name] for name in Chat.__struct_fields__ if name != "shared"),
    shares.c.token.label("shared"),
]
_CHATS_WITH_SHARES = chats.outerjoin(shares, shares.c.chat_pk == chats.c.pk)


class ChatStore:
    """The chats. `expire` must be running if chats shall expire."""

    def __init__(self, database: Database, settings: HistorySettings) -> None:
        self._database = database
        self._settings = settings
        self._searches = asyncio.Semaphore(MAX_SEARCHES)

    async def begin(self) -> None:
        """Note that no answer of an earlier process is being written any more."""
        async with self._database.writing() as connection:
            await connection.execute(
                update(messages)
                .where(messages.c.state == AnswerState.ANSWERING)
                .values(state=AnswerState.INTERRUPTED, generation=None)
            )

    async def list_chats(
        self, visitor: str, *, query: str = "", cursor: str | None = None, limit: int
    ) -> tuple[list[Chat], str | None]:
        """Chats whose title or messages have ``query``: the pinned ones first, then the newest; and the next cursor.

        Raises:
            InvalidParameterError: this is no cursor of ours.
        """
        order = (chats.c.pinned, chats.c.updated_at, chats.c.pk)
        statement = _select_chats(visitor, chats.c.pk).order_by(*(column.desc() for column in order))
        if query:
            statement = statement.where(_has_text(query))
        if cursor is not None:
            statement = statement.where(tuple_(*order) < tuple_(*_read_cursor(cursor)))
        async with self._searches if query else nullcontext(), self._database.reading() as connection:
            rows = (await connection.execute(statement.limit(limit + 1))).all()
        more = _cursor(rows[limit - 1]) if len(rows) > limit else None
        return [_chat(row) for row in rows[:limit]], more

    async def create_chat(
        self, visitor: str, chat_id: str, *, title: str, model: str | None, settings: Mapping[str, Any]
    ) -> Chat:
        """Make a chat; the one that is there already if the visitor has one of this id.

        Raises:
            HistoryFullError: the visitor has too many.
        """
        now = time.time()
        values = {"title": title, "model": model, "settings": dict(settings), "pinned": False}
        async with self._database.writing() as connection:
            if (there := await _find(connection, visitor, chat_id)) is not None:
                return _chat(there)
            await self._check_number_of_chats(connection, visitor, 1)
            await connection.execute(
                insert(chats).values(
                    visitor=visitor, id=chat_id, current=None, created_at=now, updated_at=now, **values
                )
            )
            return _chat(await _found(connection, visitor, chat_id))

    async def read_chat(self, visitor: str, chat_id: str) -> tuple[Chat, list[Message]]:
        """A chat with the messages of all its branches, the oldest first.

        Raises:
            UnknownChatError: the visitor has no such chat.
        """
        async with self._database.reading() as connection:
            chat = await _found(connection, visitor, chat_id)
            return _chat(chat), await _messages(connection, chat.pk)

    async def change_chat(self, visitor: str, chat_id: str, changes: Mapping[str, Any]) -> Chat:
        """Give some columns of a chat other values.

        Raises:
            UnknownChatError: the visitor has no such chat.
            UnknownMessageError: ``current`` is no message of it.
        """
        async with self._database.writing() as connection:
            chat = await _found(connection, visitor, chat_id)
            if changes.get("current") is not None:
                await _found_message(connection, chat.pk, changes["current"])
            if changes:
                await connection.execute(update(chats).where(chats.c.pk == chat.pk).values(**changes))
            return _chat(await _found(connection, visitor, chat_id))

    async def delete_chat(self, visitor: str, chat_id: str) -> list[str]:
        """Delete a chat; gives the generations that were being written into it.

        Raises:
            UnknownChatError: the visitor has no such chat.
        """
        async with self._database.writing() as connection:
            chat = await _found(connection, visitor, chat_id)
            generations = await _running(connection, chats.c.pk == chat.pk)
            await connection.execute(delete(chats).where(chats.c.pk == chat.pk))
            return generations

    async def delete_chats(self, visitor: str) -> list[str]:
        """Delete all of the visitor's chats; gives the generations that were being written into them."""
        async with self._database.writing() as connection:
            generations = await _running(connection, chats.c.visitor == visitor)
            await connection.execute(delete(chats).where(chats.c.visitor == visitor))
            return generations

    async def add_message(
        self, visitor: str, chat_id: str, message_id: str, *, parent: str | None, content: str
    ) -> Message:
        """Add what the visitor writes; the message that is there already if it is the same.

        Raises:
            UnknownChatError, UnknownMessageError: there is no such chat, or parent.
            HistoryConflictError: there is another message of this id.
            HistoryFullError: the chat has no room for it.
        """
        message = Message(id=message_id, parent=parent, role="user", content=content, created_at=time.time())
        async with self._database.writing() as connection:
            chat = await _found(connection, visitor, chat_id, for_update=True)
            there = await _find_message(connection, chat.pk, message_id)
            if there is not None:
                if (there.role, there.parent, there.content) != ("user", parent, content):
                    raise HistoryConflictError(f"the chat has another message {message_id!r}")
                return there
            if parent is not None:
                await _found_message(connection, chat.pk, parent)
            await self._check_room(connection, chat.pk, len(content))
            await _insert_messages(connection, chat.pk, [message])
            await _touch(connection, chat.pk, current=message_id)
        return message

    async def begin_answer(
        self,
        visitor: str,
        chat_id: str,
        message: Message,
        *,
        continues: bool,
    ) -> tuple[int, Message]:
        """Note that an answer is being written, or that an earlier one is gone on with.

        Args:
            message: as it is to be in the beginning.

        Returns:
            The chat's ``pk``, and the message as it was before that.

        Raises:
            UnknownChatError, UnknownMessageError: there is no such chat, parent, or message to continue.
            HistoryConflictError: the message is there already, or is being written.
            HistoryFullError: the chat has no room for it.
        """
        async with self._database.writing() as connection:
            chat = await _found(connection, visitor, chat_id, for_update=True)
            assert message.parent is not None
            parent = await _found_message(connection, chat.pk, message.parent)
            if parent.role != "user":
                raise InvalidParameterError("record", "the parent of an answer is a message of the user")
            there = await _find_message(connection, chat.pk, message.id)
            await self._check_room(connection, chat.pk, 0, new_messages=0 if there else 1)
            if continues:
                before = _continuable(there, message)
                values = {"state": AnswerState.ANSWERING, "generation": message.generation}
                await _update_message(
                    connection, chat.pk, message.id, **values, error=None, finish_reason=None
                )
            else:
                if there is not None:
                    raise HistoryConflictError(f"the chat has another message {message.id!r}")
                before = message
                await _insert_messages(connection, chat.pk, [message])
            await _touch(connection, chat.pk, current=message.id)
            return chat.pk, before

    async def write_answer(self, chat_pk: int, message_id: str, **values: Any) -> None:
        """Write what an answer has come to. If its chat was deleted in the meantime, nothing happens."""
        async with self._database.writing() as connection:
            await _update_message(connection, chat_pk, message_id, **values)

    async def import_chats(self, visitor: str, imported: Sequence[tuple[Chat, list[Message]]]) -> list[Chat]:
        """Add chats with their messages, whose ids must be new.

        Each is added by itself, so that other writers need not wait for long: those before an error stay.

        Raises:
            HistoryFullError: there are too many, or one is too large (then none is added); or there is no more room.
        """
        for _, its_messages in imported:
            self._check_sizes(len(its_messages), sum(len(message.content) for message in its_messages))
        for number, (chat, its_messages) in enumerate(imported):
            async with self._database.writing() as connection:
                await self._check_number_of_chats(connection, visitor, len(imported) - number)
                columns = msgspec.structs.asdict(chat)
                del columns["shared"]
                added = await connection.execute(insert(chats).values(visitor=visitor, **columns))
                assert added.inserted_primary_key is not None
                await _insert_messages(connection, added.inserted_primary_key[0], its_messages)
        return [chat for chat, _ in imported]

    async def share(self, visitor: str, chat_id: str) -> str:
        """Make what a chat shows now readable for whoever has the token that this returns.

        Raises:
            UnknownChatError: the visitor has no such chat.
        """
        async with self._database.writing() as connection:
            chat = await _found(connection, visitor, chat_id, for_update=True)
            branch = shown_branch(chat.current, await _messages(connection, chat.pk))
            values = {
                "title": chat.title,
                "model": chat.model,
                "created_at": time.time(),
                "messages": msgspec.json.encode([_frozen(message) for message in branch]).decode(),
            }
            if chat.shared is not None:
                await connection.execute(update(shares).where(shares.c.chat_pk == chat.pk).values(**values))
                return str(chat.shared)
            token = secrets.token_urlsafe(32)
            await connection.execute(insert(shares).values(chat_pk=chat.pk, token=token, **values))
            return token

    async def unshare(self, visitor: str, chat_id: str) -> None:
        """Make a chat's link worthless.

        Raises:
            UnknownChatError: the visitor has no such chat.
        """
        async with self._database.writing() as connection:
            chat = await _found(connection, visitor, chat_id)
            await connection.execute(delete(shares).where(shares.c.chat_pk == chat.pk))

    async def read_shared(self, token: str) -> Snapshot:
        """What is shared under this token.

        Raises:
            UnknownShareError: nothing.
        """
        async with self._database.reading() as connection:
            row = (await connection.execute(select(shares).where(shares.c.token == token))).first()
        if row is None:
            raise UnknownShareError
        return Snapshot(
            title=row.title,
            model=row.model,
            created_at=row.created_at,
            messages=msgspec.json.decode(row.messages, type=tuple[Message, ...]),
        )

    async def expire(self) -> NoReturn:
        """Delete chats in which nothing was written for ``expire_days``, now and from time to time."""
        while True:
            if self._settings.expire_days is not None:
                with suppress(PetalsChatError):  # it is logged; the next time will do
                    await self.delete_older_than(time.time() - self._settings.expire_days * SECONDS_PER_DAY)
            await asyncio.sleep(EXPIRY_PERIOD_SECONDS)

    async def delete_older_than(self, updated_at: float) -> None:
        """Delete all visitors' chats in which nothing was written since then."""
        old = select(chats.c.pk).where(chats.c.updated_at < updated_at).limit(DELETED_AT_ONCE)
        deleted = DELETED_AT_ONCE
        while deleted == DELETED_AT_ONCE:
            async with self._database.writing() as connection:
                result = await connection.execute(delete(chats).where(chats.c.pk.in_(old)))
                deleted = result.rowcount

    async def _check_number_of_chats(self, connection: AsyncConnection, visitor: str, new: int) -> None:
        count = await connection.scalar(
            select(func.count()).select_from(chats).where(chats.c.visitor == visitor)
        )
        limit = self._settings.max_chats
        if (count or 0) + new > limit:
            raise HistoryFullError(f"you may keep {limit} chats; delete some")

    async def _check_room(
        self, connection: AsyncConnection, chat_pk: int, new_chars: int, *, new_messages: int = 1
    ) -> None:
        row = (
            await connection.execute(
                select(func.count(), func.coalesce(func.sum(func.length(messages.c.content)), 0)).where(
                    messages.c.chat_pk == chat_pk
                )
            )
        ).one()
        self._check_sizes(row[0] + new_messages, row[1] + new_chars)

    def _check_sizes(self, number_of_messages: int, chars: int) -> None:
        if number_of_messages > self._settings.max_chat_messages:
            raise HistoryFullError(
                f"a chat may have {self._settings.max_chat_messages} messages; begin a new one"
            )
        if chars > self._settings.max_chat_chars:
            raise HistoryFullError(
                f"a chat may have {self._settings.max_chat_chars} characters; begin a new one"
            )


def _select_chats(visitor: str, *more: ColumnElement[Any]) -> Select[Any]:
    return select(*_CHAT_COLUMNS, *more).select_from(_CHATS_WITH_SHARES).where(chats.c.visitor == visitor)


async def _find(
    connection: AsyncConnection, visitor: str, chat_id: str, *, for_update: bool = False
) -> Row[Any] | None:
    statement = _select_chats(visitor, chats.c.pk).where(chats.c.id == chat_id)
    if for_update:  # where writers do not wait for each other anyway
        statement = statement.with_for_update(of=chats)
    row: Row[Any] | None = (await connection.execute(statement)).first()
    return row


async def _found(
    connection: AsyncConnection, visitor: str, chat_id: str, *, for_update: bool = False
) -> Row[Any]:
    row = await _find(connection, visitor, chat_id, for_update=for_update)
    if row is None:
        raise UnknownChatError
    return row


async def _messages(connection: AsyncConnection, chat_pk: int) -> list[Message]:
    statement = select(*_MESSAGE_COLUMNS).where(messages.c.chat_pk == chat_pk).order_by(messages.c.pk)
    return [_message(row) for row in await connection.execute(statement)]


async def _find_message(connection: AsyncConnection, chat_pk: int, message_id: str) -> Message | None:
    statement = select(*_MESSAGE_COLUMNS).where(messages.c.chat_pk == chat_pk, messages.c.id == message_id)
    row = (await connection.execute(statement)).first()
    return None if row is None else _message(row)


async def _found_message(connection: AsyncConnection, chat_pk: int, message_id: str) -> Message:
    message = await _find_message(connection, chat_pk, message_id)
    if message is None:
        raise UnknownMessageError(message_id)
    return message


async def _insert_messages(connection: AsyncConnection, chat_pk: int, new: Iterable[Message]) -> None:
    rows = [{"chat_pk": chat_pk, **msgspec.structs.asdict(message)} for message in new]
    if rows:
        await connection.execute(insert(messages), rows)


async def _update_message(connection: AsyncConnection, chat_pk: int, message_id: str, **values: Any) -> None:
    this = and_(messages.c.chat_pk == chat_pk, messages.c.id == message_id)
    await connection.execute(update(messages).where(this).values(**values))


async def _touch(connection: AsyncConnection, chat_pk: int, *, current: str) -> None:
    statement = update(chats).where(chats.c.pk == chat_pk)
    await connection.execute(statement.values(current=current, updated_at=time.time()))


async def _running(connection: AsyncConnection, of_chats: ColumnElement[bool]) -> list[str]:
    statement = (
        select(messages.c.generation)
        .join(chats, messages.c.chat_pk == chats.c.pk)
        .where(of_chats, messages.c.state == AnswerState.ANSWERING)
    )
    return [generation for generation in await connection.scalars(statement) if generation is not None]


def _continuable(there: Message | None, message: Message) -> Message:
    if there is None:
        raise UnknownMessageError(message.id)
    if there.role != "assistant" or there.parent != message.parent:
        raise HistoryConflictError(f"message {message.id!r} is no answer to message {message.parent!r}")
    if there.state is AnswerState.ANSWERING:
        raise HistoryConflictError(f"message {message.id!r} is being written already")
    return there


def _frozen(message: Message) -> Message:
    """As it is in a copy, which nobody writes on."""
    if message.state is not AnswerState.ANSWERING:
        return message
    return msgspec.structs.replace(message, state=AnswerState.INTERRUPTED, generation=None)


def _has_text(query: str) -> ColumnElement[bool]:
    in_messages = exists().where(
        messages.c.chat_pk == chats.c.pk, messages.c.content.icontains(query, autoescape=True)
    )
    return or_(chats.c.title.icontains(query, autoescape=True), in_messages)


def _chat(row: Row[Any]) -> Chat:
    values = row._mapping
    return Chat(**{name: values[name] for name in Chat.__struct_fields__})


def _message(row: Row[Any]) -> Message:
    return msgspec.convert(dict(zip(Message.__struct_fields__, row, strict=True)), Message)


def _cursor(row: Row[Any]) -> str:
    return f"{int(row.pinned)}_{row.updated_at!r}_{row.pk}"


def _read_cursor(cursor: str) -> tuple[bool, float, int]:
    try:
        pinned, updated_at, pk = cursor.split("_")
        values = pinned == "1", float(updated_at), int(pk)
    except ValueError:
        raise _wrong_cursor() from None
    if not 0 <= values[2] < 2**63:  # what a database can compare
        raise _wrong_cursor()
    return values


def _wrong_cursor() -> InvalidParameterError:
    return InvalidParameterError("cursor", "it must be the next of an earlier reply")
