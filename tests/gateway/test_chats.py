"""The chats of visitors, over HTTP and the WebSocket API, with a real database."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from petals_chat.gateway import chats
from petals_chat.gateway.visitors import COOKIE, MAX_AGE_SECONDS
from petals_chat.history import recorder
from petals_chat.history.exchange import from_json
from petals_chat.settings import EngineSettings, HistorySettings
from tests.fakes import END, FakeEngine
from tests.gateway.gateways import Gateway, running_gateway, settings_with, until
from tests.gateway.test_answers import receive_rest, text_of
from tests.gateway.test_websocket_v2 import ask, receive, send


def new_id() -> str:
    return str(uuid.uuid4())


class Visitor:
    """A browser with its cookie."""

    def __init__(self, gateway: Gateway, http: httpx.AsyncClient) -> None:
        self.gateway = gateway
        self.http = http

    async def call(self, method: str, path: str, *, expect: int = 200, **options: Any) -> Any:
        response = await self.http.request(method, f"/api/{path}", **options)
        assert response.status_code == expect, response.text
        assert response.headers["content-type"] == "application/json"
        return response.json()

    async def get(self, path: str, **options: Any) -> Any:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Any:
        return await self.call("POST", path, json=body, **options)

    async def new_chat(self, title: str = "A chat", **values: Any) -> str:
        chat_id = new_id()
        chat = await self.post("chats", {"id": chat_id, "title": title, **values})
        assert chat["id"] == chat_id
        return chat_id

    async def say(self, chat: str, content: str, parent: str | None = None) -> str:
        message_id = new_id()
        message = await self.post(
            f"chats/{chat}/messages", {"id": message_id, "parent": parent, "content": content}
        )
        assert message["content"] == content
        return message_id

    def connect(self) -> Any:
        cookie = f"{COOKIE}={self.http.cookies[COOKIE]}"
        return self.gateway.connect(additional_headers={"Cookie": cookie})

    async def messages(self, chat: str) -> list[Any]:
        messages: list[Any] = (await self.get(f"chats/{chat}"))["messages"]
        return messages

    async def titles(self, **parameters: Any) -> list[str]:
        return [chat["title"] for chat in (await self.get("chats", params=parameters))["chats"]]


@asynccontextmanager
async def visiting(gateway: Gateway) -> AsyncIterator[Visitor]:
    async with httpx.AsyncClient(base_url=f"http://{gateway.address}", timeout=20) as http:
        visitor = Visitor(gateway, http)
        assert (await visitor.get("history"))["enabled"] is True
        yield visitor


def with_history(directory: Path, **settings: Any) -> Any:
    engine = EngineSettings(data_dir=directory)
    return settings_with(history=HistorySettings(**settings), engine=engine)


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(with_history(tmp_path)) as gateway:
        yield gateway


@pytest.fixture
async def visitor(gateway: Gateway) -> AsyncIterator[Visitor]:
    async with visiting(gateway) as visitor:
        yield visitor


def answer(chat: str, message: str, parent: str, *contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "type": "answer",
        "messages": [
            {"role": roles[number % 2], "content": text} for number, text in enumerate(contents or ("Hi",))
        ],
        "record": {"chat": chat, "message": message, "parent": parent},
    }


async def test_a_visitor_is_known_by_a_cookie_that_scripts_cannot_read(gateway: Gateway) -> None:
    response = await gateway.http.get("/api/history")
    assert response.json() == {"enabled": True, "expire_days": None}
    (cookie,) = response.headers.get_list("set-cookie")
    name, _, value = cookie.partition("=")
    attributes = {part.strip().lower() for part in value.split(";")[1:]}
    assert name == COOKIE
    assert len(value.partition(";")[0]) == 43
    assert attributes == {"httponly", f"max-age={MAX_AGE_SECONDS}", "path=/", "samesite=lax"}
    assert response.headers["cache-control"] == "no-store"


async def test_the_cookie_is_for_the_servers_path_and_for_https_if_it_is_there(tmp_path: Path) -> None:
    settings = settings_with(
        server={"root_path": "/chat"},
        history=HistorySettings(),
        engine=EngineSettings(data_dir=tmp_path),
    )
    async with running_gateway(settings) as gateway:
        response = await gateway.http.get("/chat/api/history", headers={"X-Forwarded-Proto": "https"})
    cookie = response.headers["set-cookie"]
    assert "Path=/chat;" in cookie
    assert "Secure" in cookie


async def test_a_visitor_keeps_the_cookie(visitor: Visitor) -> None:
    before = visitor.http.cookies[COOKIE]
    await visitor.get("history")
    await visitor.new_chat()
    assert visitor.http.cookies[COOKIE] == before


async def test_who_has_a_made_up_cookie_gets_another(gateway: Gateway) -> None:
    response = await gateway.http.get("/api/history", headers={"Cookie": f"{COOKIE}=1234"})
    assert "1234;" not in response.headers["set-cookie"]


async def test_a_chat_is_made_once_however_often_that_is_asked_for(visitor: Visitor) -> None:
    body = {"id": new_id(), "title": "Cats", "model": "org/model", "settings": {"system": None, "top_k": 5}}
    chat = await visitor.post("chats", body)
    assert chat == {
        **body,
        "pinned": False,
        "current": None,
        "created_at": chat["created_at"],
        "updated_at": chat["created_at"],
        "shared": None,
    }
    assert await visitor.post("chats", {**body, "title": "Dogs"}) == chat
    assert await visitor.get(f"chats/{body['id']}") == {**chat, "messages": []}


async def test_a_chat_can_be_changed(visitor: Visitor) -> None:
    chat = await visitor.new_chat(model="org/model")
    message = await visitor.say(chat, "Hello")
    changes = {
        "title": "Dogs",
        "pinned": True,
        "model": None,
        "settings": {"temperature": 0.5},
        "current": message,
    }
    for name, value in changes.items():
        assert (await visitor.call("PATCH", f"chats/{chat}", json={name: value}))[name] == value
    changed = await visitor.get(f"chats/{chat}")
    assert {name: changed[name] for name in changes} == changes
    error = await visitor.call("PATCH", f"chats/{chat}", json={"current": new_id()}, expect=404)
    assert error["code"] == "unknown_message"
    assert (await visitor.call("PATCH", f"chats/{chat}", json={"current": None}))["current"] is None


async def test_pinned_chats_come_first_then_the_newest_page_by_page(visitor: Visitor) -> None:
    chats = [await visitor.new_chat(f"chat {number}") for number in range(7)]
    await visitor.call("PATCH", f"chats/{chats[2]}", json={"pinned": True})
    await visitor.say(chats[1], "Hello")
    expected = [f"chat {number}" for number in (2, 1, 6, 5, 4, 3, 0)]
    assert await visitor.titles() == expected
    titles, cursor = [], None
    while True:
        page = await visitor.get("chats", params={"limit": 3, **({"cursor": cursor} if cursor else {})})
        titles += [chat["title"] for chat in page["chats"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert titles == expected
    for wrong in ("x", f"1_1.0_{'9' * 30}", "1_1.0_-1"):
        error = await visitor.get("chats", params={"cursor": wrong}, expect=400)
        assert error["code"] == "invalid_parameter"


async def test_titles_and_messages_are_searched_in_any_script(visitor: Visitor) -> None:
    cats = await visitor.new_chat("Über KATZEN")
    await visitor.say(cats, "Что такое 100% кот?")
    await visitor.new_chat("Dogs_")
    assert await visitor.titles(query="katzen") == ["Über KATZEN"]
    assert await visitor.titles(query="über") == ["Über KATZEN"]
    assert await visitor.titles(query="ЧТО ТАКОЕ") == ["Über KATZEN"]
    assert await visitor.titles(query="0% к") == ["Über KATZEN"]
    assert await visitor.titles(query="s_") == ["Dogs_"]
    assert await visitor.titles(query="%") == ["Über KATZEN"]
    assert await visitor.titles(query="mouse") == []


async def test_messages_are_kept_with_their_branches(visitor: Visitor) -> None:
    chat = await visitor.new_chat()
    first, second = await visitor.say(chat, "Hello"), await visitor.say(chat, "Hallo")
    messages = await visitor.messages(chat)
    assert [(message["id"], message["parent"]) for message in messages] == [(first, None), (second, None)]
    assert messages[0] == {
        "id": first,
        "parent": None,
        "role": "user",
        "content": "Hello",
        "model": None,
        "created_at": messages[0]["created_at"],
        "state": "complete",
        "error": None,
        "generation": None,
        "finish_reason": None,
        "tokens": None,
        "seconds": None,
        "first_token_seconds": None,
    }
    assert (await visitor.get(f"chats/{chat}"))["current"] == second


async def test_a_message_is_added_once_and_never_changed(visitor: Visitor) -> None:
    chat = await visitor.new_chat()
    body = {"id": new_id(), "parent": None, "content": "Hello"}
    message = await visitor.post(f"chats/{chat}/messages", body)
    assert await visitor.post(f"chats/{chat}/messages", body) == message
    other = await visitor.post(f"chats/{chat}/messages", {**body, "content": "Bye"}, expect=409)
    assert other["code"] == "history_conflict"
    orphan = {"id": new_id(), "parent": new_id(), "content": "Hello"}
    assert (await visitor.post(f"chats/{chat}/messages", orphan, expect=404))["code"] == "unknown_message"


async def test_an_answer_is_written_down(visitor: Visitor) -> None:
    visitor.gateway.engine.tokens = [" Hi", " you", END]
    chat, message = await visitor.new_chat(), new_id()
    question = await visitor.say(chat, "Hello")
    async with visitor.connect() as client:
        await ask(client, answer(chat, message, question, "Hello"))
        assert text_of(await receive_rest(client)) == "Hi you"
    await until_written(visitor, chat)
    written = (await visitor.messages(chat))[1]
    times = {name: written[name] for name in ("created_at", "seconds", "first_token_seconds")}
    assert written == {
        "id": message,
        "parent": question,
        "role": "assistant",
        "content": "Hi you",
        "model": "org/model",
        "state": "complete",
        "error": None,
        "generation": None,
        "finish_reason": "stop",
        "tokens": 3,
        **times,
    }
    assert 0 <= times["first_token_seconds"] <= times["seconds"]
    assert (await visitor.get(f"chats/{chat}"))["current"] == message


async def until_written(visitor: Visitor, chat: str) -> None:
    """Wait until no answer is being written."""
    async with asyncio.timeout(20):
        while any(message["state"] == "answering" for message in await visitor.messages(chat)):
            await asyncio.sleep(0.02)


async def test_an_answer_is_written_down_while_it_is_made_and_can_be_attached_to(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "PERIOD_SECONDS", 0.05)
    engine = visitor.gateway.engine
    chat = await visitor.new_chat()
    question = await visitor.say(chat, "Hello")
    async with visitor.connect() as client:
        await ask(client, answer(chat, new_id(), question))
        await receive(client)
        engine.may_generate.clear()
    kept: Any = {"content": ""}
    async with asyncio.timeout(20):
        while not kept["content"]:  # what is exported is what the database has
            kept = (await visitor.get(f"chats/{chat}/export"))["chats"][0]["messages"][1]
            await asyncio.sleep(0.02)
    running = (await visitor.messages(chat))[1]
    assert running["state"] == "answering"
    assert running["content"].startswith(kept["content"])
    engine.may_generate.set()
    async with visitor.connect() as client:
        await send(client, {"type": "attach", "generation": running["generation"]})
        first = await receive(client)
        assert first["outputs"].startswith(running["content"])
        await send(client, {"type": "stop", "generation": running["generation"]})
        frames = [first, *await receive_rest(client)]
    await until_written(visitor, chat)
    stopped = (await visitor.messages(chat))[1]
    assert (stopped["content"], stopped["state"]) == (text_of(frames), "stopped")
    assert stopped["tokens"] == frames[-1]["position"]


async def test_an_answer_that_is_continued_is_attached_to_where_its_text_ends(visitor: Visitor) -> None:
    engine = visitor.gateway.engine
    engine.tokens = [" Hi", " you", *(f" {number}" for number in range(100)), END]
    chat, message = await visitor.new_chat(), new_id()
    question = await visitor.say(chat, "Hello")
    async with visitor.connect() as client:
        await ask(client, {**answer(chat, message, question, "Hello"), "max_new_tokens": 2})
        await receive_rest(client)
        await until_written(visitor, chat)
        engine.may_generate.clear()
        await ask(client, answer(chat, message, question, "Hello", "Hi you"))
        begun = (await visitor.messages(chat))[1]
        assert (begun["content"], begun["position"], begun["tokens"]) == ("Hi you", 0, 2)
        engine.may_generate.set()
        async with asyncio.timeout(20):
            while engine.tokens_pulled < 4:
                await asyncio.sleep(0)
        engine.may_generate.clear()
        running = (await visitor.messages(chat))[1]
        assert running["tokens"] == 2 + running["position"] > 3
        engine.may_generate.set()
        whole = "Hi you" + text_of(await receive_rest(client))
        attach = {name: running[name] for name in ("generation", "position")}
        await send(client, {"type": "attach", **attach})
        assert running["content"] + text_of(await receive_rest(client)) == whole
    await until_written(visitor, chat)
    written = (await visitor.messages(chat))[1]
    assert (written["content"], "position" in written) == (whole, False)


async def test_who_asks_and_leaves_at_once_finds_the_answer_later(visitor: Visitor) -> None:
    visitor.gateway.engine.tokens = [" Hi", END]
    for leave_at_once in (False, True):
        chat = await visitor.new_chat()
        request = answer(chat, new_id(), await visitor.say(chat, "Hello"))
        async with visitor.connect() as client:
            await send(client, request)
            if leave_at_once:
                client.transport.write_eof()
        async with asyncio.timeout(20):
            while [message["content"] for message in await visitor.messages(chat)] != ["Hello", "Hi"]:
                await asyncio.sleep(0.02)


async def test_a_cut_answer_is_continued_in_its_message(visitor: Visitor) -> None:
    visitor.gateway.engine.tokens = [" Hi", " you", " there", END]
    chat, message = await visitor.new_chat(), new_id()
    question = await visitor.say(chat, "Hello")
    async with visitor.connect() as client:
        await ask(client, {**answer(chat, message, question, "Hello"), "max_new_tokens": 2})
        assert (await receive_rest(client))[-1]["finish_reason"] == "length"
        await until_written(visitor, chat)
        assert (await ask(client, answer(chat, message, question, "Hello", "Hi you")))["ok"]
        await receive_rest(client)
    await until_written(visitor, chat)
    (_, written) = await visitor.messages(chat)
    assert (written["content"], written["tokens"]) == ("Hi you Hi you there", 6)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"chat": new_id()}, "unknown_chat"),
        ({"parent": new_id()}, "unknown_message"),
        ({"message": "question"}, "history_conflict"),
    ],
)
async def test_an_answer_that_has_no_place_is_refused(
    visitor: Visitor, change: dict[str, str], code: str
) -> None:
    chat = await visitor.new_chat()
    question = await visitor.say(chat, "Hello")
    request = answer(chat, new_id(), question)
    request["record"] |= {name: question if value == "question" else value for name, value in change.items()}
    async with visitor.connect() as client:
        assert (await ask(client, request))["code"] == code
    assert visitor.gateway.engine.opened == []


async def test_an_answer_is_continued_by_one_at_a_time_and_only_if_it_is_there(visitor: Visitor) -> None:
    chat, message = await visitor.new_chat(), new_id()
    question = await visitor.say(chat, "Hello")
    async with visitor.connect() as client, visitor.connect() as other, visitor.connect() as third:
        continuing = answer(chat, message, question, "Hello", "Hi")
        assert (await ask(third, continuing))["code"] == "unknown_message"
        await ask(client, answer(chat, message, question))
        assert (await ask(other, continuing))["code"] == "history_conflict"


async def test_an_answer_needs_the_visitor_of_its_chat(visitor: Visitor, gateway: Gateway) -> None:
    chat = await visitor.new_chat()
    request = answer(chat, new_id(), await visitor.say(chat, "Hello"))
    async with visiting(gateway) as other, other.connect() as client:
        assert (await ask(client, request))["code"] == "unknown_chat"
    async with gateway.connect() as client:
        assert (await ask(client, request))["code"] == "unknown_chat"


async def test_a_failed_answer_says_why(visitor: Visitor) -> None:
    chat = await visitor.new_chat()
    request = answer(chat, new_id(), await visitor.say(chat, "Hello"))
    visitor.gateway.engine.generate_error = ZeroDivisionError("secret")
    async with visitor.connect() as client:
        await ask(client, request)
        assert (await receive(client))["code"] == "internal_error"
    await until_written(visitor, chat)
    failed = (await visitor.messages(chat))[1]
    assert (failed["state"], failed["error"], failed["content"]) == ("failed", "internal_error", "")


async def test_visitors_do_not_meet(visitor: Visitor, gateway: Gateway) -> None:
    chat = await visitor.new_chat("Secret")
    message = await visitor.say(chat, "secret")
    requests: list[tuple[str, str, Any]] = [
        ("GET", f"chats/{chat}", None),
        ("PATCH", f"chats/{chat}", {"title": "Mine"}),
        ("DELETE", f"chats/{chat}", None),
        ("POST", f"chats/{chat}/messages", {"id": new_id(), "content": "Hello"}),
        ("GET", f"chats/{chat}/export", None),
        ("POST", f"chats/{chat}/share", None),
        ("DELETE", f"chats/{chat}/share", None),
    ]
    async with visiting(gateway) as other, httpx.AsyncClient(base_url=f"http://{gateway.address}") as nobody:
        for method, path, body in requests:
            assert (await other.call(method, path, json=body, expect=404))["code"] == "unknown_chat"
            assert (await nobody.request(method, f"/api/{path}", json=body)).json()["code"] == "unknown_chat"
        assert await other.titles() == []
        assert await other.titles(query="secret") == []
        assert (await nobody.get("/api/chats")).json() == {"chats": [], "next": None}
        # The same ids are free for others.
        assert (await other.post("chats", {"id": chat, "title": "Mine"}))["title"] == "Mine"
        assert await other.messages(chat) == []
        await other.post(f"chats/{chat}/messages", {"id": message, "content": "Hello"})
        await other.call("DELETE", "chats")
    assert [each["content"] for each in await visitor.messages(chat)] == ["secret"]


async def test_pages_of_other_sites_change_nothing_and_see_nothing(visitor: Visitor) -> None:
    chat = await visitor.new_chat()
    foreign = {"Origin": "https://elsewhere.example"}
    for method, path in [
        ("POST", "chats"),
        ("DELETE", "chats"),
        ("PATCH", f"chats/{chat}"),
        ("DELETE", f"chats/{chat}"),
        ("POST", f"chats/{chat}/messages"),
        ("POST", f"chats/{chat}/share"),
        ("DELETE", f"chats/{chat}/share"),
        ("POST", "chats/import"),
    ]:
        error = await visitor.call(method, path, json={}, headers=foreign, expect=403)
        assert error["code"] == "foreign_origin"
    assert (await visitor.get("chats", headers=foreign))["chats"] == []
    assert (await visitor.get(f"chats/{chat}", headers=foreign, expect=404))["code"] == "unknown_chat"
    response = await visitor.http.get("/api/history", headers=foreign)
    assert "set-cookie" not in response.headers
    assert "access-control-allow-credentials" not in response.headers
    own = {"Origin": f"http://{visitor.gateway.address}"}
    await visitor.call("PATCH", f"chats/{chat}", json={"title": "Mine"}, headers=own)


async def test_a_deleted_chat_is_gone_and_its_answer_stopped(visitor: Visitor) -> None:
    engine = visitor.gateway.engine
    for path in ("chats/{}", "chats"):
        chat = await visitor.new_chat()
        request = answer(chat, new_id(), await visitor.say(chat, "Hello"))
        async with visitor.connect() as client:
            await ask(client, request)
            await visitor.call("DELETE", path.format(chat))
            assert (await receive_rest(client))[-1]["finish_reason"] == "stopped"
        assert (await visitor.get(f"chats/{chat}", expect=404))["code"] == "unknown_chat"
        await until(lambda: not engine.running)
    assert await visitor.titles() == []


async def test_a_snapshot_is_shared_by_link_until_it_is_taken_back(
    visitor: Visitor, gateway: Gateway
) -> None:
    chat = await visitor.new_chat("Cats", model="org/model", settings={"system": "secret"})
    await visitor.say(chat, "another branch")
    await visitor.say(chat, "Hello")
    token = (await visitor.post(f"chats/{chat}/share"))["token"]
    assert len(token) == 43
    assert (await visitor.get(f"chats/{chat}"))["shared"] == token
    await visitor.call("PATCH", f"chats/{chat}", json={"title": "Dogs"})
    async with httpx.AsyncClient(base_url=f"http://{gateway.address}") as nobody:
        shared = (await nobody.get(f"/api/shared/{token}")).json()
        assert (shared["title"], shared["model"]) == ("Cats", "org/model")
        assert [message["content"] for message in shared["messages"]] == ["Hello"]
        assert "secret" not in json.dumps(shared)
        assert (await visitor.post(f"chats/{chat}/share"))["token"] == token
        assert (await nobody.get(f"/api/shared/{token}")).json()["title"] == "Dogs"
        await visitor.call("DELETE", f"chats/{chat}/share")
        gone = await nobody.get(f"/api/shared/{token}")
        assert (gone.status_code, gone.json()["code"]) == (404, "unknown_share")
        again = (await visitor.post(f"chats/{chat}/share"))["token"]
        assert again != token
        await visitor.call("DELETE", f"chats/{chat}")
        assert (await nobody.get(f"/api/shared/{again}")).status_code == 404


async def test_an_answer_in_the_making_is_shared_as_it_is_and_nobody_can_follow_it(visitor: Visitor) -> None:
    chat = await visitor.new_chat()
    request = answer(chat, new_id(), await visitor.say(chat, "Hello"))
    visitor.gateway.engine.may_generate.clear()
    async with visitor.connect() as client:
        await ask(client, request)
        token = (await visitor.post(f"chats/{chat}/share"))["token"]
    (_, message) = (await visitor.get(f"shared/{token}"))["messages"]
    assert (message["state"], message["generation"]) == ("interrupted", None)


async def test_an_exported_chat_can_be_imported(visitor: Visitor, gateway: Gateway) -> None:
    visitor.gateway.engine.tokens = [" Hi", " you", END]
    chat = await visitor.new_chat("Über cats", settings={"system": "Be kind.", "do_sample": False})
    first, message = await visitor.say(chat, "Hello"), new_id()
    await visitor.say(chat, "Hallo")
    async with visitor.connect() as client:
        await ask(client, answer(chat, message, first))
        await receive_rest(client)
    await until_written(visitor, chat)
    response = await visitor.http.get(f"/api/chats/{chat}/export")
    assert response.headers["content-disposition"] == (
        "attachment; filename=\"ber cats.json\"; filename*=UTF-8''%C3%9Cber%20cats.json"
    )
    async with visiting(gateway) as other:
        (imported,) = (await other.call("POST", "chats/import", content=response.content))["chats"]
        copy, original = await other.get(f"chats/{imported['id']}"), await visitor.get(f"chats/{chat}")
    assert imported["id"] != chat
    changing = {"id", "parent", "current", "updated_at", "messages"}
    assert {key: copy[key] for key in copy if key not in changing} == {
        key: original[key] for key in original if key not in changing
    }
    for ours, theirs in zip(original["messages"], copy["messages"], strict=True):
        assert {key: theirs[key] for key in theirs if key not in changing} == {
            key: ours[key] for key in ours if key not in changing
        }
    assert copy["messages"][2]["parent"] == copy["messages"][0]["id"]
    assert copy["current"] == copy["messages"][2]["id"]


async def test_a_chat_is_exported_as_markdown(visitor: Visitor) -> None:
    visitor.gateway.engine.tokens = [" Hi", END]
    chat = await visitor.new_chat("Cats")
    question = await visitor.say(chat, "Hello")
    async with visitor.connect() as client:
        await ask(client, answer(chat, new_id(), question))
        await receive_rest(client)
    await until_written(visitor, chat)
    response = await visitor.http.get(f"/api/chats/{chat}/export", params={"format": "markdown"})
    assert response.headers["content-type"].startswith("text/markdown")
    assert response.text == "# Cats\n\n## You\n\nHello\n\n## org/model\n\nHi\n"


GOOD: dict[str, Any] = {
    "format": "petals-chat",
    "version": 1,
    "chats": [{"title": "Cats", "messages": [{"id": "a", "role": "user", "content": "Hello"}]}],
}


@pytest.mark.parametrize(
    "file",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({**GOOD, "version": 2}),
        json.dumps({**GOOD, "chats": [{"title": 5, "messages": []}]}),
        json.dumps({**GOOD, "chats": [{"title": "x" * 300, "messages": []}]}),
        json.dumps({**GOOD, "chats": [{"title": "", "messages": [], "settings": {"temperature": "hot"}}]}),
        json.dumps(GOOD).replace("Hello", "\\ud800"),
        json.dumps({**GOOD, "chats": [{"title": "", "messages": GOOD["chats"][0]["messages"] * 2}]}),
        json.dumps(GOOD).replace('"role"', '"parent": "b", "role"'),
    ],
)
async def test_another_file_is_not_imported(visitor: Visitor, file: str) -> None:
    error = await visitor.call("POST", "chats/import", content=file, expect=400)
    assert error["code"] == "invalid_parameter"
    assert await visitor.titles() == []


async def test_a_file_with_too_many_messages_in_all_is_not_imported(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "MAX_IMPORT_MESSAGES", 1000)
    messages = [{"id": str(number), "role": "user", "content": ""} for number in range(501)]
    file = {**GOOD, "chats": [{"title": "Cats", "messages": messages}] * 2}
    error = await visitor.post("chats/import", file, expect=400)
    assert "messages: a file may have 1000 of them, and this one has 1002" in error["traceback"]
    assert await visitor.titles() == []


async def test_files_are_read_one_after_the_other_and_not_in_the_event_loop(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, is_alone, threads = threading.Lock(), [], []

    def read(*arguments: Any, **options: Any) -> Any:
        is_alone.append(reading.acquire(blocking=False))
        threads.append(threading.current_thread())
        time.sleep(0.05)
        reading.release()
        return from_json(*arguments, **options)

    monkeypatch.setattr(chats, "from_json", read)
    await asyncio.gather(*(visitor.post("chats/import", GOOD) for _ in range(3)))
    assert is_alone == [True] * 3
    assert threading.current_thread() not in threads


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chats", {}),
        ("chats", {"id": "x", "title": "A"}),
        ("chats", {"id": new_id(), "title": "x" * 201}),
        ("chats", {"id": new_id(), "title": "\0"}),
        ("chats", {"id": new_id(), "title": "\ud800"}),
        ("chats", {"id": new_id(), "title": None}),
        ("chats", {"id": new_id(), "title": "A", "settings": {"temperature": -1}}),
        ("chats", {"id": new_id(), "title": "A", "settings": {"system": "x" * 200_000}}),
        ("chats/{}/messages", {"id": new_id(), "content": ""}),
        ("chats/{}/messages", {"id": new_id(), "content": "\0"}),
        ("chats/{}/messages", {"id": new_id(), "content": 5}),
        ("chats/{}/messages", {"id": new_id(), "parent": 5, "content": "Hello"}),
    ],
)
async def test_what_cannot_be_kept_is_refused_with_its_name(visitor: Visitor, path: str, body: Any) -> None:
    chat = await visitor.new_chat()
    error = await visitor.call("POST", path.format(chat), content=json.dumps(body), expect=400)
    assert error["code"] == "invalid_parameter"
    assert len(error["traceback"]) < 300


async def test_bodies_over_the_limit_are_refused(tmp_path: Path) -> None:
    settings = settings_with(
        limits={"max_message_bytes": 1024},
        history=HistorySettings(),
        engine=EngineSettings(data_dir=tmp_path),
    )
    async with running_gateway(settings) as gateway, visiting(gateway) as visitor:
        chat = await visitor.new_chat()
        error = await visitor.post(f"chats/{chat}/messages", {"content": "x" * 2000}, expect=413)
        assert error["code"] == "message_too_large"


async def test_a_full_history_says_so(tmp_path: Path) -> None:
    settings = with_history(tmp_path, max_chats=2, max_chat_messages=3, max_chat_chars=1000)
    async with running_gateway(settings) as gateway, visiting(gateway) as visitor:
        chat = await visitor.new_chat()
        full = {"id": new_id(), "content": "x" * 1001}
        assert (await visitor.post(f"chats/{chat}/messages", full, expect=409))["code"] == "history_full"
        question = await visitor.say(chat, "A")
        await visitor.say(chat, "x" * 900, question)
        await visitor.say(chat, "B", question)
        one_more = {"id": new_id(), "content": "C"}
        error = await visitor.post(f"chats/{chat}/messages", one_more, expect=409)
        assert "a chat may have 3 messages" in error["traceback"]
        async with visitor.connect() as client:
            assert (await ask(client, answer(chat, new_id(), question)))["code"] == "history_full"
        await visitor.new_chat()
        assert (await visitor.post("chats", {"id": new_id(), "title": ""}, expect=409))[
            "code"
        ] == "history_full"
        assert (await visitor.post("chats/import", GOOD, expect=409))["code"] == "history_full"


async def test_a_full_disk_says_so(tmp_path: Path) -> None:
    async with (
        running_gateway(with_history(tmp_path, max_file_bytes=1024 * 1024)) as gateway,
        visiting(gateway) as visitor,
    ):
        chat = await visitor.new_chat()
        for _ in range(8):
            body = {"id": new_id(), "content": "x" * 200_000}
            response = await visitor.http.post(f"/api/chats/{chat}/messages", json=body)
        assert (response.status_code, response.json()["code"]) == (409, "history_full")
        assert len(await visitor.messages(chat)) > 1


async def test_without_history_there_is_none() -> None:
    async with running_gateway() as gateway:
        response = await gateway.http.get("/api/history")
        assert response.json() == {"enabled": False, "expire_days": None}
        assert "set-cookie" not in response.headers
        for method, path in [("GET", "chats"), ("POST", "chats"), ("GET", "chats/1"), ("GET", "shared/1")]:
            response = await gateway.http.request(method, f"/api/{path}")
            assert (response.status_code, response.json()["code"]) == (404, "history_disabled")


async def test_what_was_written_survives_a_restart_and_a_running_answer_is_interrupted(
    tmp_path: Path,
) -> None:
    settings = with_history(tmp_path)
    async with running_gateway(settings) as gateway, visiting(gateway) as visitor:
        cookies = visitor.http.cookies
        chat = await visitor.new_chat()
        request = answer(chat, new_id(), await visitor.say(chat, "Hello"))
        async with visitor.connect() as client:
            await ask(client, request)
            first = await receive(client)
            gateway.engine.may_generate.clear()
    async with running_gateway(settings) as gateway, visiting(gateway) as visitor:
        visitor.http.cookies = cookies
        (_, message) = await visitor.messages(chat)
        assert (message["state"], message["generation"]) == ("interrupted", None)
        assert message["content"].startswith(first["outputs"])


async def test_the_file_is_for_this_user_alone_and_has_no_cookie(tmp_path: Path) -> None:
    file = tmp_path / "data" / "history.sqlite3"
    async with running_gateway(with_history(tmp_path / "data")) as gateway, visiting(gateway) as visitor:
        await visitor.new_chat()
        files = list(file.parent.iterdir())
        assert {path.name for path in files} == {file.name, f"{file.name}-wal", f"{file.name}-shm"}
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        cookie = visitor.http.cookies[COOKIE]
    assert cookie.encode() not in file.read_bytes()
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


async def test_nothing_of_a_chat_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    settings = settings_with(
        server={"log_level": "debug"}, history=HistorySettings(), engine=EngineSettings(data_dir=tmp_path)
    )
    engine = FakeEngine("org/model", "org/private", tokens=[" secret", END])
    async with running_gateway(settings, engine) as gateway, visiting(gateway) as visitor:
        chat = await visitor.new_chat("secret")
        question = await visitor.say(chat, "secret")
        async with visitor.connect() as client:
            await ask(client, answer(chat, new_id(), question, "secret"))
            await receive_rest(client)
        await visitor.titles(query="secret")
        await visitor.post(f"chats/{chat}/messages", {"id": question, "content": "secret 2"}, expect=409)
    ours = [
        record.getMessage()
        for record in caplog.records
        if not record.name.startswith(("websockets.client", "httpx", "httpcore"))
    ]
    assert not [line for line in ours if "secret" in line]


async def test_the_endpoints_are_documented(gateway: Gateway) -> None:
    paths = (await gateway.http.get("/openapi.json")).json()["paths"]
    body = paths["/api/chats"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"id", "title", "model", "settings"} == set(body["properties"])
    ours = [path for path in paths if path.startswith(("/api/chats", "/api/history", "/api/shared"))]
    assert len(ours) == 8
