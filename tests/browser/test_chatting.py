"""What people do on the page. These tests use the page alone, so they hold on any server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, expect

from tests.browser.chat_page import ChatPage, open_chat
from tests.fakes import FakeEngine


@pytest.fixture(autouse=True)
async def unhurried(engine: FakeEngine) -> AsyncIterator[None]:
    """Let the fake engine take its time, as a real one does, so that there is something to stop."""

    async def pace() -> None:
        while True:
            engine.may_generate.set()
            await asyncio.sleep(0)
            engine.may_generate.clear()
            await asyncio.sleep(0.01)

    pacing = asyncio.create_task(pace())
    yield
    pacing.cancel()
    await asyncio.gather(pacing, return_exceptions=True)
    engine.may_generate.set()


async def test_an_answer_appears_and_can_be_stopped_and_the_next_message_works(chat: ChatPage) -> None:
    await chat.ask("Hello!")
    await expect(chat.questions).to_have_text(["Hello!"])
    await expect(chat.answers.first).not_to_be_empty()
    await chat.stop.click()
    await expect(chat.stop).to_be_hidden()
    await chat.ask("And now?")
    await expect(chat.questions).to_have_text(["Hello!", "And now?"])
    await expect(chat.answers.last).not_to_be_empty()


async def test_enter_sends_and_shift_enter_starts_a_new_line(chat: ChatPage) -> None:
    await expect(chat.model).to_be_enabled()
    await chat.message.press_sequentially("One")
    await chat.message.press("Shift+Enter")
    await chat.message.press_sequentially("two")
    await expect(chat.message).to_have_value("One\ntwo")
    await chat.message.press("Enter")
    await expect(chat.questions).to_have_text("One\ntwo", use_inner_text=True)
    await expect(chat.message).to_have_value("")


async def test_an_empty_message_is_not_sent(chat: ChatPage) -> None:
    await chat.ask("  \n ")
    await expect(chat.send).to_be_visible()
    await expect(chat.questions).to_have_count(0)


async def test_a_new_chat_forgets_the_old_one(chat: ChatPage) -> None:
    await chat.ask("Hello!")
    await chat.new_chat.click()
    await expect(chat.questions).to_have_count(0)
    await expect(chat.send).to_be_visible()
    await expect(chat.page.get_by_role("heading", name="What would you like")).to_be_visible()


async def test_people_are_told_not_to_enter_sensitive_data(chat: ChatPage) -> None:
    await expect(chat.page.get_by_text("Do not enter sensitive data")).to_be_in_viewport()
    await expect(chat.message).to_have_accessible_description(re.compile("sensitive data"))


async def test_everything_can_be_reached_with_the_keyboard(chat: ChatPage) -> None:
    await expect(chat.model).to_be_enabled()
    await expect(chat.message).to_be_focused()
    await chat.page.keyboard.press("Tab")
    await expect(chat.send).to_be_focused()
    await chat.message.focus()
    await chat.page.keyboard.press("Shift+Tab")
    await expect(chat.model).to_be_focused()  # "New chat" can do nothing yet


async def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, page_url: str) -> None:
    phone = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
    async with open_chat(browser, page_url, **phone) as chat:
        assert await chat.hidden_width() == 0
        await chat.ask("A_very_long_word_without_a_space" * 20)
        await expect(chat.answers).not_to_be_empty()
        assert await chat.hidden_width() == 0
        await expect(chat.model).to_be_in_viewport(ratio=1)
        await expect(chat.stop.or_(chat.send)).to_be_in_viewport(ratio=1)


async def test_the_page_is_dark_where_the_system_is(browser: Browser, page_url: str) -> None:
    lightness = {}
    for scheme in ("light", "dark"):
        async with open_chat(browser, page_url, color_scheme=scheme) as chat:
            color = await chat.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            lightness[scheme] = sum(map(int, re.findall(r"\d+", color)))
    assert lightness["dark"] < 150 < 600 < lightness["light"]
