"""The page as people use it: what they find by its words, and what they do with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, expect

from tests.fakes import FakeEngine

TIMEOUT_MILLISECONDS = 20_000
expect.set_options(timeout=TIMEOUT_MILLISECONDS)


class ChatPage:
    """An open page. Its console may say nothing against it; a breach of the security policy is said there."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.message = page.get_by_label("Your message", exact=True)
        self.model = page.get_by_role("button", name="Model:")
        self.send = page.locator(".composer").get_by_role("button", name="Send")
        self.stop = page.get_by_role("button", name="Stop", exact=True)
        self.new_chat = page.get_by_role("button", name="New chat", exact=True).first
        self.try_again = page.get_by_role("button", name="Try again")
        self.go_on = page.get_by_role("button", name="Continue")
        self.regenerate = page.get_by_role("button", name="Regenerate")
        self.sheet = page.get_by_role("dialog")
        self.questions = page.locator(".question .bubble")
        self.answers = page.locator(".answer .prose")
        self.outcomes = page.locator(".answer .outcome > p")
        self.announcer = page.locator("#announcer[role=status]")
        self.notice = page.locator(".notice")

    async def ask(self, text: str) -> None:
        """Write a message and send it with Enter, once the answer before is complete."""
        await expect(self.model).to_be_enabled()
        await expect(self.send).to_be_visible()
        await self.message.fill(text)
        await self.message.press("Enter")

    async def expect_answer(self, text: str) -> None:
        """Wait until the last answer is complete, and is this."""
        await expect(self.answers.last).to_have_text(text)
        await expect(self.send).to_be_visible()

    async def choose_model(self, name: str) -> None:
        """Choose a model in the sheet of models."""
        await self.model.click()
        await self.sheet.get_by_role("radio", name=name).check()
        await self.page.keyboard.press("Escape")
        await expect(self.sheet).to_be_hidden()

    def entry(self, title: str) -> Locator:
        """A chat in the list."""
        return self.page.get_by_role("navigation").get_by_role("link", name=title)

    async def act_on_chat(self, title: str, action: str) -> None:
        """Choose an action from a chat's menu."""
        await self.page.get_by_role("button", name=f"Actions for “{title}”").click()
        await self.page.get_by_role("menuitem", name=action, exact=True).click()

    @contextmanager
    def expected_complaints(self, *parts: str) -> Iterator[None]:
        """Complaints with one of these parts tell of what the test does in this block."""
        yield
        self.complaints = [text for text in self.complaints if not any(part in text for part in parts)]

    async def hidden_width(self) -> int:
        """Pixels by which the page is wider than the window."""
        width = await self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert isinstance(width, int)
        return width

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


@asynccontextmanager
async def open_window(browser: Browser, **options: Any) -> AsyncIterator[BrowserContext]:
    """A window with cookies and storage of its own; ``options`` are those of playwright's ``new_context``."""
    window: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}, "reduced_motion": "reduce"}
    context = await browser.new_context(**{**window, **options})
    context.set_default_timeout(TIMEOUT_MILLISECONDS)
    try:
        yield context
    finally:
        await context.close()


@asynccontextmanager
async def open_tab(window: BrowserContext, url: str) -> AsyncIterator[ChatPage]:
    """The page in a tab. The block must end without complaints in the browser's console."""
    chat = ChatPage(await window.new_page())
    await chat.page.goto(url)
    yield chat
    await chat.page.close()
    assert chat.complaints == [], chat.complaints


@asynccontextmanager
async def open_chat(browser: Browser, url: str, **options: Any) -> AsyncIterator[ChatPage]:
    """The page in a window of its own."""
    async with open_window(browser, **options) as window, open_tab(window, url) as chat:
        yield chat


async def let_pass(engine: FakeEngine, tokens: int) -> None:
    """Let the engine generate at least so many tokens more, and stand still then."""
    enough = engine.tokens_pulled + tokens
    engine.may_generate.set()
    while engine.tokens_pulled < enough:
        await asyncio.sleep(0)
    engine.may_generate.clear()


def told(engine: FakeEngine) -> list[tuple[str, str]]:
    """Roles and texts of the last chat that the engine was told."""
    from petals_chat.protocol.messages import ChatPrompt

    inputs = engine.requests[-1].inputs
    assert isinstance(inputs, ChatPrompt)
    return [(message.role, message.content) for message in inputs.messages]
