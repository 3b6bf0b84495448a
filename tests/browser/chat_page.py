"""The page as people use it: what they find by its words, and what they do with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from playwright.async_api import Browser, ConsoleMessage, Page, expect

TIMEOUT_MILLISECONDS = 20_000
expect.set_options(timeout=TIMEOUT_MILLISECONDS)


class ChatPage:
    """An open page. Its console may say nothing against it; a breach of the security policy is said there."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.message = page.get_by_label("Your message")
        self.model = page.get_by_label("Model", exact=True)
        self.send = page.get_by_role("button", name="Send")
        self.stop = page.get_by_role("button", name="Stop")
        self.new_chat = page.get_by_role("button", name="New chat")
        self.try_again = page.get_by_role("button", name="Try again")
        self.questions = page.locator(".question")
        self.answers = page.locator(".answer")
        self.outcomes = page.locator(".outcome p")

    async def ask(self, text: str) -> None:
        """Write a message and send it with Enter, once the answer before is complete."""
        await expect(self.model).to_be_enabled()
        await expect(self.send).to_be_visible()
        await self.message.fill(text)
        await self.message.press("Enter")

    @contextmanager
    def expected_complaints(self, part: str) -> Iterator[None]:
        """Complaints with this part tell of what the test does in this block."""
        yield
        self.complaints = [text for text in self.complaints if part not in text]

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
async def open_chat(browser: Browser, url: str, **options: Any) -> AsyncIterator[ChatPage]:
    """The page in a window of its own; ``options`` are those of playwright's ``new_context``.

    The block must end without complaints in the browser's console.
    """
    window: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}, "reduced_motion": "reduce"}
    context = await browser.new_context(**{**window, **options})
    context.set_default_timeout(TIMEOUT_MILLISECONDS)
    try:
        chat = ChatPage(await context.new_page())
        await chat.page.goto(url)
        yield chat
    finally:
        await context.close()
    assert chat.complaints == []
