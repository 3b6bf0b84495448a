"""The page against the real server and its model: what people live through when something breaks in mid-answer.

Nothing here depends on what the model says. A greedy answer that may not repeat a word goes on for long, and is the
same each time.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, expect
from websockets.asyncio.client import connect

from petals_chat.models.bundled import DIRECTORY, KEY, bundled_settings
from tests.browser.chat_page import ChatPage, open_tab, open_window
from tests.browser.line import Line
from tests.browser.real_server import RealServer, free_port
from tests.browser.test_accessibility import PHONE
from tests.swarm_processes import HostProcess

QUESTION = "What is a swarm?"
LONG: dict[str, Any] = {"do_sample": False, "repetition_penalty": 5.0, "max_new_tokens": 200}
ENDLESS = LONG | {"max_new_tokens": 1500}
PATIENCE_MILLISECONDS = 240_000
"""A busy machine may need so long for an answer, and for starting the model again."""
RESTARTED = "The server was restarted while it wrote this answer."


class RealChat:
    """A visitor's window, and the chat in it."""

    def __init__(self, window: BrowserContext, server: RealServer, url: str) -> None:
        self.window = window
        self.server = server
        self.url = url
        self.id = str(uuid.uuid4())

    @property
    def address(self) -> str:
        """Of the chat on the page."""
        return f"{self.url}#/chat/{self.id}"

    async def make(self, settings: dict[str, Any]) -> None:
        """Make the chat, as the page does with its first message, with settings that its sheet has no room for."""
        await self.call("GET", "history")
        chat = {"id": self.id, "title": QUESTION, "model": KEY, "settings": settings}
        assert (await self.call("POST", "chats", chat)).ok

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """A request to the server with the visitor's cookie."""
        return await self.window.request.fetch(
            f"{self.url}api/{path}", method=method, **({} if body is None else {"data": body})
        )

    async def messages(self) -> list[dict[str, Any]]:
        """What the history has."""
        reply = await (await self.call("GET", f"chats/{self.id}")).json()
        messages: list[dict[str, Any]] = reply["messages"]
        return messages


@asynccontextmanager
async def visiting(
    browser: Browser, server: RealServer, url: str = "", **options: Any
) -> AsyncIterator[RealChat]:
    """A visitor whom the server does not know yet."""
    permissions = ["clipboard-read", "clipboard-write"]
    async with open_window(browser, permissions=permissions, **options) as window:
        yield RealChat(window, server, url or server.url)


async def begin(chat: ChatPage) -> None:
    """Ask, and wait until the answer is being written."""
    await chat.ask(QUESTION)
    await expect(chat.answers.last).to_have_text(re.compile(r".{20}"), timeout=PATIENCE_MILLISECONDS)
    await expect(chat.stop).to_be_visible()


async def copied(chat: ChatPage) -> str:
    """The last answer as the page has it, before it is drawn."""
    await expect(chat.send).to_be_visible(timeout=PATIENCE_MILLISECONDS)
    await chat.page.evaluate("navigator.clipboard.writeText('')")
    await chat.page.locator(".answer").last.get_by_role("button", name="Copy", exact=True).click()
    text = ""
    async with asyncio.timeout(PATIENCE_MILLISECONDS / 1000):
        while not text:
            text = await chat.page.evaluate("navigator.clipboard.readText()")
    return text


async def expect_whole(chat: ChatPage, real: RealChat, whole: str) -> None:
    """The answer is complete, and the page and the history have each token of it once."""
    assert await copied(chat) == whole
    answer = (await real.messages())[-1]
    assert (answer["content"], answer["tokens"]) == (whole, LONG["max_new_tokens"])
    await expect(chat.page.locator(".figures").last).to_contain_text(f"{answer['tokens']} tokens")


async def running_generations(real: RealChat) -> int:
    """As the worker last said."""
    return int((await (await real.call("GET", "status")).json())["running_generations"])


@pytest.fixture(scope="module")
def server(built_page: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    server = RealServer(tmp_path_factory.mktemp("real"))
    server.start()
    yield server
    server.close()


@pytest.fixture(scope="module")
async def whole(server: RealServer) -> str:
    """What the model answers if nothing disturbs it."""
    pieces: list[str] = []
    async with connect(f"ws://{server.address}/api/v2/generate") as client:
        await client.send(
            json.dumps({"type": "answer", "messages": [{"role": "user", "content": QUESTION}], **LONG})
        )
        reason = None
        while reason is None:
            frame = json.loads(await client.recv())
            pieces.append(frame.get("outputs", ""))
            reason = frame.get("finish_reason")
    assert reason == "length"
    return "".join(pieces)


@pytest.mark.parametrize("window", [{}, PHONE], ids=["desktop", "phone"])
async def test_the_first_chat(browser: Browser, server: RealServer, window: dict[str, Any]) -> None:
    question = bundled_settings().chat.sample_questions[0]
    async with visiting(browser, server, **window) as real, open_tab(real.window, server.url) as chat:
        await chat.page.get_by_role("button", name=question).click()
        await expect(chat.questions).to_have_text(question)
        text = await copied(chat)
        assert text.strip()
        await expect(chat.page.locator(".figures")).to_contain_text("tokens/s")
        await expect(chat.outcomes).to_have_count(0)
        await expect(chat.send).to_be_in_viewport()
        assert await chat.hidden_width() == 0
        real.id = chat.page.url.rpartition("/")[2]
        assert [message["content"] for message in await real.messages()] == [question, text]
        if window:
            await chat.page.get_by_role("button", name="Show chats").click()
        await expect(chat.entry(question)).to_be_in_viewport()


async def test_what_can_be_done_with_an_answer(browser: Browser, server: RealServer) -> None:
    versions = "Version {} of 2"
    async with visiting(browser, server) as real:
        await real.make(ENDLESS)
        async with open_tab(real.window, real.address) as chat:
            await begin(chat)
            await chat.stop.click()
            await expect(chat.outcomes).to_have_text("You stopped this answer.")
            while await running_generations(real):
                await chat.page.wait_for_timeout(100)
            begun = await copied(chat)

            await set_longest(chat, 12)
            await chat.go_on.click()
            await expect(chat.outcomes).to_have_text("The answer reached its longest length.")
            continued = await copied(chat)
            assert continued.startswith(begun)
            assert len(continued) > len(begun)
            figures = await chat.page.locator(".figures").inner_text()
            await chat.page.reload()
            assert await copied(chat) == continued
            await expect(chat.page.locator(".figures")).to_contain_text(figures.splitlines()[-1])

            await chat.regenerate.click()
            await expect(chat.page.get_by_role("group", name=versions.format(2))).to_be_visible()
            again = await copied(chat)
            assert begun.startswith(again) or again.startswith(begun)
            await chat.page.locator(".answer").get_by_role("button", name="Previous version").click()
            assert await copied(chat) == continued

            await chat.questions.hover()
            await chat.page.get_by_role("button", name="Edit", exact=True).click()
            await chat.page.get_by_label("Edit your message").fill("How do I add a model?")
            await chat.page.get_by_label("Edit your message").press("Enter")
            await expect(
                chat.page.locator(".question").get_by_role("group", name=versions.format(2))
            ).to_be_visible()
            assert await copied(chat)
            await chat.questions.hover()
            await chat.page.locator(".question").get_by_role("button", name="Previous version").click()
            await expect(chat.questions).to_have_text(QUESTION)

            await chat.page.reload()
            await chat.page.get_by_role("button", name="Chat settings").click()
            await expect(chat.sheet.get_by_label("Longest answer, in tokens")).to_have_value("12")
        states = [message["state"] for message in await real.messages()]
        assert states == ["complete"] * 5


async def set_longest(chat: ChatPage, tokens: int) -> None:
    """Change the settings of the chat."""
    await chat.page.get_by_role("button", name="Chat settings").click()
    await chat.sheet.get_by_label("Longest answer, in tokens").fill(str(tokens))
    await chat.sheet.get_by_role("button", name="Save").click()
    await expect(chat.sheet).to_be_hidden()


async def test_an_answer_goes_on_while_its_tab_is_closed(
    browser: Browser, server: RealServer, whole: str
) -> None:
    async with visiting(browser, server) as real:
        await real.make(LONG)
        async with open_tab(real.window, real.address) as chat:
            await begin(chat)
        async with open_tab(real.window, real.address) as chat:
            await expect_whole(chat, real, whole)
            await chat.page.reload()
            await expect_whole(chat, real, whole)


async def test_an_answer_goes_on_over_a_lost_connection(
    browser: Browser, server: RealServer, whole: str
) -> None:
    async with Line.to(server.address) as line, visiting(browser, server, f"http://{line.address}/") as real:
        await real.make(LONG)
        async with open_tab(real.window, real.address) as chat:
            with chat.expected_complaints("net::ERR_"):
                await begin(chat)
                await line.cut()
                await expect(chat.outcomes).to_contain_text("connection to the server was lost")
                await line.mend()
                await expect_whole(chat, real, whole)
            await expect(chat.outcomes).to_have_text("The answer reached its longest length.")


async def test_a_killed_worker_is_told_and_waited_for(
    browser: Browser, server: RealServer, whole: str
) -> None:
    async with visiting(browser, server) as real:
        await real.make(LONG)
        async with open_tab(real.window, real.address) as chat:
            await begin(chat)
            server.kill_worker()
            await expect(chat.outcomes).to_contain_text("broke off and is being started again")
            broken = await copied(chat)
            assert whole.startswith(broken)
            await expect(chat.go_on).to_be_visible()
            await chat.try_again.click()
            await expect(chat.outcomes).to_contain_text("still loading")
            await expect(chat.outcomes).to_have_count(0, timeout=PATIENCE_MILLISECONDS)
            await expect_whole(chat, real, whole)
        states = [(message["state"], message["error"]) for message in await real.messages()]
        assert states == [("complete", None), ("failed", "worker_lost"), ("complete", None)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
async def test_a_server_that_ends_in_mid_answer_and_is_started_again(
    browser: Browser, server: RealServer, number: signal.Signals
) -> None:
    async with visiting(browser, server) as real:
        await real.make(ENDLESS)
        async with open_tab(real.window, real.address) as chat:
            with chat.expected_complaints("net::ERR_", "WebSocket"):
                await begin(chat)
                exported = f"chats/{real.id}/export"
                while not (
                    kept := (await (await real.call("GET", exported)).json())["chats"][0]["messages"][1][
                        "content"
                    ]
                ):
                    await chat.page.wait_for_timeout(100)
                server.end(number)
                await expect(chat.page.get_by_text("The server cannot be reached")).to_be_visible(
                    timeout=PATIENCE_MILLISECONDS
                )
                async with server.starting():  # the page is back before the model is
                    await expect(chat.outcomes).to_have_text(RESTARTED, timeout=PATIENCE_MILLISECONDS)
                    cut = await copied(chat)
                    assert cut.startswith(kept)
                    (question, answer) = await real.messages()
                    assert (question["content"], answer["content"]) == (QUESTION, cut)
                    assert (answer["state"], answer["generation"]) == ("interrupted", None)
                    await set_longest(chat, 12)
                    await chat.go_on.click()
            await expect(chat.outcomes).to_have_text(
                "The answer reached its longest length.", timeout=PATIENCE_MILLISECONDS
            )
            assert (await copied(chat)).startswith(cut)


async def test_another_visitor_gets_at_nothing(browser: Browser, server: RealServer) -> None:
    async with visiting(browser, server) as real, visiting(browser, server) as other:
        await real.make(ENDLESS)
        async with open_tab(real.window, real.address) as chat:
            await begin(chat)
            (_, answer) = await real.messages()
            async with open_tab(other.window, real.address) as page:
                with page.expected_complaints("404"):
                    await expect(page.page.get_by_text("This chat is not there any more.")).to_be_visible()
                    await expect(page.page.get_by_text("Your chats appear here.")).to_be_visible()
                    await expect(page.page.get_by_text(QUESTION)).to_have_count(0)
            for method, path, body in (
                ("GET", "", None),
                ("GET", "/export", None),
                ("PATCH", "", {"title": "Mine"}),
                ("DELETE", "", None),
                ("POST", "/messages", {"id": str(uuid.uuid4()), "content": "Mine"}),
                ("POST", "/share", None),
            ):
                assert (await other.call(method, f"chats/{real.id}{path}", body)).status == 404
            listed = await (await other.call("GET", f"chats?query={QUESTION}")).json()
            assert listed["chats"] == []
            cookies = {cookie["name"]: cookie["value"] for cookie in await other.window.cookies()}
            headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
            for kind in ("attach", "stop"):
                async with connect(
                    f"ws://{server.address}/api/v2/generate", additional_headers=headers
                ) as client:
                    await client.send(json.dumps({"type": kind, "generation": answer["generation"]}))
                    assert json.loads(await client.recv())["code"] == "unknown_generation"
            await expect(chat.stop).to_be_visible()
            await chat.stop.click()
            await expect(chat.outcomes).to_have_text("You stopped this answer.")
        assert len(await real.messages()) == 2


SMALL_CACHE_TOKENS = 256
"""Room for one long answer."""
RECORD_WAITS = """
window.waits = [];
new MutationObserver(() => {
  for (const notice of document.querySelectorAll(".outcome.waiting")) window.waits.push(notice.textContent);
}).observe(document, { childList: true, subtree: true, characterData: true });
"""


class SmallHost:
    """A machine that serves the model's blocks, and can go away and come back at the same address."""

    def __init__(self, directory: Path) -> None:
        self._arguments = [
            f"--cache-tokens={SMALL_CACHE_TOKENS}",
            f"--port={free_port()}",
            f"--identity={directory / 'host.id'}",
        ]
        self.start()

    def start(self) -> None:
        """Return when it serves."""
        self._host = HostProcess(DIRECTORY, *self._arguments)
        self.ready = self._host.wait_until_ready()
        self._host.family()

    def kill(self) -> None:
        """End it at once."""
        self._host.release()
        assert self._host.survivors() == []


@pytest.fixture(scope="module")
def small_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallHost]:
    host = SmallHost(tmp_path_factory.mktemp("host"))
    yield host
    host.kill()


@pytest.fixture(scope="module")
def small_server(
    small_host: SmallHost, built_page: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """Its swarm is one small machine."""
    peers, prefix = small_host.ready.peers, small_host.ready.dht_prefix
    server = RealServer(
        tmp_path_factory.mktemp("small"),
        f"[swarm]\ninitial_peers = {json.dumps(peers)}\ndht_prefix = {json.dumps(prefix)}\n"
        "update_period_seconds = 1\nshow_join_command = true\n",
    )
    server.start()
    yield server
    server.close()


async def test_visitors_of_a_full_machine_see_their_places_and_all_get_their_answers(
    browser: Browser, small_server: RealServer
) -> None:
    async with AsyncExitStack() as stack:
        visits = [await stack.enter_async_context(visiting(browser, small_server)) for _ in range(3)]
        chats = []
        for real in visits:
            await real.window.add_init_script(RECORD_WAITS)
            await real.make(LONG | {"max_new_tokens": 150})
            chats.append(await stack.enter_async_context(open_tab(real.window, real.address)))
        await asyncio.gather(*(chat.ask(QUESTION) for chat in chats))
        texts = [await copied(chat) for chat in chats]
        assert len({*texts}) == 1
        for real, text in zip(visits, texts, strict=True):
            assert (await real.messages())[-1]["content"] == text
        waits = [text for chat in chats for text in await chat.page.evaluate("window.waits")]
        assert any("no room for more chats" in text and "You are next." in text for text in waits), waits
        assert any("petals-chat host" in text for text in waits), waits


async def test_the_page_says_that_the_machine_is_gone_and_that_it_is_back(
    browser: Browser, small_server: RealServer, small_host: SmallHost
) -> None:
    async with (
        visiting(browser, small_server) as real,
        open_tab(real.window, f"{small_server.url}#/swarm") as swarm,
        open_tab(real.window, small_server.url) as chat,
    ):
        report = swarm.page.get_by_role("region", name="Petals Guide")
        await expect(report).to_contain_text("Ready")
        await expect(chat.model).to_be_enabled()
        small_host.kill()
        await expect(report).to_contain_text("Incomplete", timeout=PATIENCE_MILLISECONDS)
        await expect(report).to_contain_text("Nobody runs blocks 0–5.")
        note = chat.page.get_by_text("cannot answer right now: nobody runs 6 of its parts")
        await expect(note).to_be_visible(timeout=PATIENCE_MILLISECONDS)
        await chat.ask(QUESTION)
        await expect(chat.outcomes).to_contain_text(
            "Nobody is running some of the parts", timeout=PATIENCE_MILLISECONDS
        )
        await asyncio.to_thread(small_host.start)
        await expect(report).to_contain_text("Ready", timeout=PATIENCE_MILLISECONDS)
        await expect(note).to_be_hidden(timeout=PATIENCE_MILLISECONDS)
        await chat.try_again.click()
        assert await copied(chat)
        await expect(chat.outcomes).to_have_count(0)
