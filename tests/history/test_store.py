"""The chats of visitors in real databases."""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from petals_chat.errors import (
    HistoryConflictError,
    HistoryFullError,
    UnknownChatError,
    UnknownMessageError,
    UnknownShareError,
)
from petals_chat.history import store as store_module
from petals_chat.history.database import Database
from petals_chat.history.exchange import from_json, to_json
from petals_chat.history.history import History
from petals_chat.history.interface import AnswerState, Chat, Message, shown_branch
from petals_chat.history.store import ChatStore
from petals_chat.settings import HistorySettings

ANNE, BOB = "a" * 64, "b" * 64


def new_id() -> str:
    return str(uuid.uuid4())


async def new_chat(store: ChatStore, visitor: str = ANNE, title: str = "Cats") -> str:
    chat_id = new_id()
    await store.create_chat(visitor, chat_id, title=title, model="org/model", settings={"top_k": 5})
    return chat_id


async def say(store: ChatStore, chat: str, content: str, parent: str | None = None) -> str:
    return (await store.add_message(ANNE, chat, new_id(), parent=parent, content=content)).id


def answer_to(parent: str) -> Message:
    return Message(
        id=new_id(),
        parent=parent,
        role="assistant",
        content="",
        model="org/model",
        created_at=time.time(),
        state=AnswerState.ANSWERING,
        generation="g",
    )


def imported_chat(title: str, content: str) -> tuple[Chat, list[Message]]:
    now = time.time()
    message = Message(id=new_id(), parent=None, role="user", content=content, created_at=now)
    values: dict[str, Any] = {"model": None, "pinned": False, "settings": {}, "current": None, "shared": None}
    return Chat(id=new_id(), title=title, created_at=now, updated_at=now, **values), [message]


async def contents(store: ChatStore, chat: str) -> list[str]:
    _, messages = await store.read_chat(ANNE, chat)
    return [message.content for message in messages]


async def test_a_chat_comes_back_as_it_was_made(history: History) -> None:
    chat = await new_chat(history.store)
    made, messages = await history.store.read_chat(ANNE, chat)
    assert (made.id, made.title, made.model, made.settings) == (chat, "Cats", "org/model", {"top_k": 5})
    assert (made.pinned, made.current, made.shared, messages) == (False, None, None, [])
    assert made.created_at == made.updated_at == pytest.approx(time.time(), abs=60)


async def test_texts_of_all_scripts_come_back_as_they_were(history: History) -> None:
    chat = await new_chat(history.store, title="Über 猫")
    text = "Что? 👩‍👩‍👧 \N{REPLACEMENT CHARACTER}\r\n\t'\"\\ %s :x {}"
    await say(history.store, chat, text)
    assert await contents(history.store, chat) == [text]
    assert [found.title for found in (await history.store.list_chats(ANNE, query="ЧТО", limit=9))[0]] == [
        "Über 猫"
    ]
    assert (await history.store.list_chats(ANNE, query="%x", limit=9))[0] == []


async def test_pages_hold_all_chats_once(history: History) -> None:
    chats = [await new_chat(history.store) for _ in range(8)]
    for chat in chats[3:5]:
        await history.store.change_chat(ANNE, chat, {"pinned": True})
    found: list[str] = []
    cursor = None
    while True:
        page, cursor = await history.store.list_chats(ANNE, cursor=cursor, limit=3)
        found += [chat.id for chat in page]
        if cursor is None:
            break
    assert found == [chats[number] for number in (4, 3, 7, 6, 5, 2, 1, 0)]


async def test_nobody_finds_what_is_anothers(history: History) -> None:
    store = history.store
    chat = await new_chat(store)
    message = await say(store, chat, "Hello")
    attempts: list[Any] = [
        store.read_chat(BOB, chat),
        store.change_chat(BOB, chat, {"title": "Mine"}),
        store.delete_chat(BOB, chat),
        store.add_message(BOB, chat, new_id(), parent=None, content="Hello"),
        store.begin_answer(BOB, chat, answer_to(message), continues=False),
        store.share(BOB, chat),
        store.unshare(BOB, chat),
    ]
    for attempt in attempts:
        with pytest.raises(UnknownChatError):
            await attempt
    assert await store.list_chats(BOB, limit=9) == ([], None)
    assert await store.delete_chats(BOB) == []
    assert await contents(store, chat) == ["Hello"]


async def test_an_answer_is_begun_written_and_continued(history: History) -> None:
    store = history.store
    chat = await new_chat(store)
    answer = answer_to(await say(store, chat, "Hello"))
    chat_pk, before = await store.begin_answer(ANNE, chat, answer, continues=False)
    assert before.content == ""
    with pytest.raises(HistoryConflictError):
        await store.begin_answer(ANNE, chat, answer, continues=False)
    with pytest.raises(HistoryConflictError):
        await store.begin_answer(ANNE, chat, answer, continues=True)
    await store.write_answer(chat_pk, answer.id, content="Hi", state=AnswerState.STOPPED, generation=None)
    _, before = await store.begin_answer(ANNE, chat, answer, continues=True)
    assert (before.content, before.state) == ("Hi", AnswerState.STOPPED)
    found, messages = await store.read_chat(ANNE, chat)
    assert (found.current, messages[-1].state) == (answer.id, AnswerState.ANSWERING)


async def test_an_answer_needs_a_question_in_the_same_chat(history: History) -> None:
    chat = await new_chat(history.store)
    elsewhere = await say(history.store, await new_chat(history.store), "Hello")
    with pytest.raises(UnknownMessageError):
        await history.store.begin_answer(ANNE, chat, answer_to(elsewhere), continues=False)


async def test_what_is_written_into_a_deleted_chat_is_nowhere(history: History) -> None:
    chat = await new_chat(history.store)
    answer = answer_to(await say(history.store, chat, "Hello"))
    chat_pk, _ = await history.store.begin_answer(ANNE, chat, answer, continues=False)
    assert await history.store.delete_chat(ANNE, chat) == ["g"]
    await history.store.write_answer(chat_pk, answer.id, content="Hi")
    assert await history.store.list_chats(ANNE, limit=9) == ([], None)


async def test_answers_of_an_earlier_process_are_interrupted(url: str, tmp_path: Path) -> None:
    async with History(HistorySettings(url=url), tmp_path) as history:
        chat = await new_chat(history.store)
        answer = answer_to(await say(history.store, chat, "Hello"))
        chat_pk, _ = await history.store.begin_answer(ANNE, chat, answer, continues=False)
        await history.store.write_answer(chat_pk, answer.id, content="Hi")
    async with History(HistorySettings(url=url), tmp_path) as history:
        _, messages = await history.store.read_chat(ANNE, chat)
    assert (messages[1].content, messages[1].state) == ("Hi", AnswerState.INTERRUPTED)
    assert messages[1].generation is None


async def test_a_shared_copy_is_read_only_until_it_is_taken_back(history: History) -> None:
    store = history.store
    chat = await new_chat(store)
    first = await say(store, chat, "Hello")
    await say(store, chat, "Hallo")
    await store.change_chat(ANNE, chat, {"current": first})
    token = await store.share(ANNE, chat)
    await say(store, chat, "more", first)
    assert [message.content for message in (await store.read_shared(token)).messages] == ["Hello"]
    assert await store.share(ANNE, chat) == token
    assert [message.content for message in (await store.read_shared(token)).messages] == ["Hello", "more"]
    await store.unshare(ANNE, chat)
    with pytest.raises(UnknownShareError):
        await store.read_shared(token)


async def test_a_shared_copy_ends_with_its_chat(history: History) -> None:
    chat = await new_chat(history.store)
    token = await history.store.share(ANNE, chat)
    await history.store.delete_chats(ANNE)
    with pytest.raises(UnknownShareError):
        await history.store.read_shared(token)


async def test_chats_that_are_old_expire_with_their_messages(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "DELETED_AT_ONCE", 2)
    store = history.store
    for _ in range(5):
        await say(store, await new_chat(store), "old")
    between = time.time()
    chat = await new_chat(store)
    await say(store, chat, "new")
    await store.delete_older_than(between)
    assert [found.id for found in (await store.list_chats(ANNE, limit=9))[0]] == [chat]


async def test_expiry_runs_when_the_history_opens(url: str, tmp_path: Path) -> None:
    async with History(HistorySettings(url=url), tmp_path) as history:
        chat = await new_chat(history.store)
        a_week_ago = time.time() - 7 * 24 * 3600
        await history.store.change_chat(ANNE, chat, {"updated_at": a_week_ago})
        kept = await new_chat(history.store)
    async with History(HistorySettings(url=url, expire_days=6), tmp_path) as history:
        async with asyncio.timeout(20):
            while len((await history.store.list_chats(ANNE, limit=9))[0]) == 2:
                await asyncio.sleep(0.02)
        assert [found.id for found in (await history.store.list_chats(ANNE, limit=9))[0]] == [kept]


async def test_expiry_goes_on_after_a_time_when_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "EXPIRY_PERIOD_SECONDS", 0.0)
    goes_on, attempts = asyncio.Event(), []

    async def delete_older_than(store: ChatStore, updated_at: float) -> None:
        attempts.append(updated_at)
        if len(attempts) == 1:
            raise HistoryFullError("the server has no room for more chats")
        goes_on.set()

    monkeypatch.setattr(ChatStore, "delete_older_than", delete_older_than)
    async with History(HistorySettings(expire_days=6), tmp_path), asyncio.timeout(20):
        await goes_on.wait()


async def test_the_database_is_closed_even_if_expiry_ended_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_closed = asyncio.Event()
    close = Database.close

    async def delete_older_than(store: ChatStore, updated_at: float) -> None:
        raise ZeroDivisionError

    async def note_and_close(database: Database) -> None:
        is_closed.set()
        await close(database)

    monkeypatch.setattr(ChatStore, "delete_older_than", delete_older_than)
    monkeypatch.setattr(Database, "close", note_and_close)
    with pytest.raises(ZeroDivisionError):
        async with History(HistorySettings(expire_days=6), tmp_path):
            await asyncio.sleep(0.05)
    assert is_closed.is_set()


async def test_an_exported_chat_is_imported_with_new_ids(history: History) -> None:
    store = history.store
    chat = await new_chat(store)
    await say(store, chat, "more", await say(store, chat, "Hello"))
    file = to_json(*await store.read_chat(ANNE, chat)).replace(b"Hello", rb"Hel\u0000lo")
    (imported,) = from_json(file, max_chats=1, max_chat_messages=9, max_messages=9)
    (copy,) = await store.import_chats(BOB, [imported])
    found, messages = await store.read_chat(BOB, copy.id)
    assert found == copy
    assert [message.content for message in shown_branch(found.current, messages)] == ["Hel\ufffdlo", "more"]


async def test_an_import_adds_all_chats_that_there_is_room_for_or_none_if_they_are_too_many(
    tmp_path: Path,
) -> None:
    room, too_much = 1024 * 1024, 2 * 1024 * 1024
    settings = HistorySettings(max_chats=2, max_file_bytes=room, max_chat_chars=2 * too_much)
    async with History(settings, tmp_path) as history:
        small, large = imported_chat("small", "x"), imported_chat("large", "x" * too_much)
        with pytest.raises(HistoryFullError, match="2 chats"):
            await history.store.import_chats(ANNE, [small, small, small])
        assert (await history.store.list_chats(ANNE, limit=9))[0] == []
        with pytest.raises(HistoryFullError, match="no room"):
            await history.store.import_chats(ANNE, [small, large])
        assert [chat.title for chat in (await history.store.list_chats(ANNE, limit=9))[0]] == ["small"]


async def test_many_writers_at_once_lose_nothing(history: History) -> None:
    store = history.store
    chats = [await new_chat(store) for _ in range(5)]
    answers = [
        (await store.begin_answer(ANNE, chat, answer_to(await say(store, chat, "A")), continues=False))
        for chat in chats
    ]

    async def write(chat_pk: int, message: Message) -> None:
        for count in range(1, 11):
            await store.write_answer(chat_pk, message.id, content="x" * count)

    async def talk(chat: str) -> None:
        for number in range(10):
            await say(store, chat, str(number))
            await store.list_chats(ANNE, query="x", limit=9)

    await asyncio.gather(*(write(*answer) for answer in answers), *(talk(chat) for chat in chats))
    for chat in chats:
        assert await contents(store, chat) == ["A", "x" * 10, *(str(number) for number in range(10))]


async def test_one_of_many_makes_the_last_chat_and_the_last_message(url: str, tmp_path: Path) -> None:
    settings = HistorySettings(url=url, max_chats=1, max_chat_messages=2)
    async with History(settings, tmp_path) as history:
        chat = await new_chat(history.store)
        with pytest.raises(HistoryFullError):
            await new_chat(history.store)
        results = await asyncio.gather(
            *(say(history.store, chat, str(number)) for number in range(6)), return_exceptions=True
        )
        assert sum(isinstance(result, HistoryFullError) for result in results) == 4
        assert len(await contents(history.store, chat)) == 2


async def test_the_loop_is_free_while_the_database_works(history: History) -> None:
    """Nothing runs in the event loop for long, even if much is read and written."""
    store = history.store
    chat = await new_chat(store)
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - before)

    watching = asyncio.create_task(watch())
    for _ in range(5):
        await say(store, chat, "x" * 300_000)
        await store.list_chats(ANNE, query="no such text", limit=9)
    watching.cancel()
    assert longest < 5  # a bound that no machine is too slow for


def test_the_shown_branch_ends_where_messages_go_in_circles() -> None:
    messages = [
        Message(id="a", parent="b", role="user", content="", created_at=0.0),
        Message(id="b", parent="a", role="user", content="", created_at=0.0),
    ]
    assert len(shown_branch("a", messages)) == 2
    assert shown_branch(None, []) == []


def test_messages_are_what_they_were_when_they_are_sent() -> None:
    message = answer_to("x")
    assert msgspec.json.decode(msgspec.json.encode(message), type=Message) == message
