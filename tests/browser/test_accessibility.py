"""The page for everybody: by keyboard, by screen reader, on a phone, in the dark, from right to left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from petals_chat.errors import MissingBlocksError
from tests.browser.chat_page import ChatPage, let_pass, open_chat, open_tab, open_window
from tests.browser.conftest import Gateway
from tests.fakes import FakeEngine

AXE = Path(__file__).parents[2] / "frontend" / "node_modules" / "axe-core" / "axe.min.js"
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
RICH = (
    "# Heading\n\nSome **bold** text, [a link](https://example.org) and `code`.\n\n```python\nprint('a very long "
    "line of code that has to scroll because it is wider than any phone')\n```\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n"
    "$$x^2$$\n\n- [x] done\n\n> quoted"
)


async def check(page: Page, state: str) -> None:
    """No violation of axe's rules may be found; prints how many rules held."""
    await page.evaluate(AXE.read_text())
    found = await page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    print(f"axe: {state}: {len(found['passes'])} rules hold, {len(found['violations'])} do not")
    problems = [
        f"{violation['id']}: {violation['help']}: {[node['html'][:200] for node in violation['nodes']][:4]}"
        for violation in found["violations"]
    ]
    assert problems == [], state


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [{}, PHONE], ids=["desktop", "phone"])
async def test_no_state_of_the_page_violates_a_rule_of_accessibility(
    browser: Browser, gateway: Gateway, scheme: str, window: dict[str, Any]
) -> None:
    engine = gateway.engine
    async with open_chat(browser, gateway.page_url, color_scheme=scheme, **window) as chat:
        await expect(chat.model).to_be_enabled()
        await check(chat.page, "new chat")
        engine.tokens = [*re.findall(r"\s*\S+", RICH), " end"]
        engine.may_generate.clear()
        await chat.ask("Everything, please")
        await let_pass(engine, 12)
        await expect(chat.answers).to_contain_text("bold")
        await check(chat.page, "answering")
        engine.may_generate.set()
        await expect(chat.answers.locator("math")).to_be_visible()
        await expect(chat.answers.locator("[class^=hljs]").first).to_be_visible()
        await expect(chat.send).to_be_visible()
        await chat.regenerate.click()
        await expect(chat.page.get_by_role("group", name="Version 2 of 2")).to_be_visible()
        await expect(chat.send).to_be_visible()
        await check(chat.page, "answered")
        engine.may_generate.clear()
        engine.queue_place = 2
        await chat.ask("Room?")
        await expect(chat.outcomes).to_contain_text("no room for more chats")
        await check(chat.page, "queue")
        engine.queue_place = None
        await chat.stop.click()
        await expect(chat.outcomes).to_have_text("You stopped this answer.")
        engine.may_generate.set()
        engine.generate_error = MissingBlocksError([3])
        await chat.ask("And?")
        await expect(chat.try_again).to_be_visible()
        await check(chat.page, "failed")
        for label, name in (("Chat settings", "settings"), ("Model:", "models")):
            await chat.page.get_by_role("button", name=label).click()
            await expect(chat.sheet).to_be_visible()
            await check(chat.page, name)
            await chat.page.keyboard.press("Escape")
        if window:
            await chat.page.get_by_role("button", name="Show chats").click()
            await check(chat.page, "drawer")
        await chat.page.get_by_role("button", name="Shortcuts and help").click()
        await check(chat.page, "help")
        await chat.page.keyboard.press("Escape")
        await chat.page.get_by_role("link", name="Swarm", exact=True).click()
        await expect(chat.page.get_by_role("table").first).to_be_visible()
        await check(chat.page, "swarm")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [{}, PHONE], ids=["desktop", "phone"])
async def test_no_sheet_of_a_chat_violates_a_rule_of_accessibility(
    browser: Browser, gateway: Gateway, scheme: str, window: dict[str, Any]
) -> None:
    gateway.engine.tokens = [RICH]
    async with open_chat(browser, gateway.page_url, color_scheme=scheme, **window) as chat:
        await chat.ask("Question?")
        await expect(chat.answers.locator("math")).to_be_visible()
        await expect(chat.send).to_be_visible()
        if window:
            await chat.page.get_by_role("button", name="Show chats").click()
        for action in ("Rename", "Delete", "Share by link"):
            await chat.act_on_chat("Question?", action)
            await expect(chat.sheet).to_be_visible()
            await check(chat.page, action)
            if action != "Share by link":
                await chat.page.keyboard.press("Escape")
                await expect(chat.sheet).to_be_hidden()
        await chat.sheet.get_by_role("button", name="Make a link").click()
        link = await chat.sheet.get_by_label("Link").input_value()
        await check(chat.page, "shared")
        async with open_chat(browser, link, color_scheme=scheme, **window) as reader:
            await expect(reader.answers.locator("math")).to_be_visible()
            await check(reader.page, "shared chat")


async def test_a_list_that_cannot_be_loaded_violates_no_rule_of_accessibility(
    browser: Browser, gateway: Gateway
) -> None:
    async with open_window(browser) as window:
        await window.route("**/api/chats?*", lambda route: route.fulfill(status=503))
        async with open_tab(window, gateway.page_url) as chat:
            with chat.expected_complaints("503"):
                failed = chat.page.get_by_text("The list of chats could not be loaded. Trying again…")
                await expect(failed).to_be_visible()
                await check(chat.page, "failed list")
                await window.unroute("**/api/chats?*")
                await expect(failed).to_be_hidden()


async def test_everything_can_be_done_with_the_keyboard(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = ["Yes."]
    page = chat.page
    await expect(chat.message).to_be_focused()
    await expect(chat.model).to_be_enabled()
    await page.keyboard.type("One?")
    await page.keyboard.press("Enter")
    await chat.expect_answer("Yes.")
    await expect(chat.message).to_be_focused()
    await page.keyboard.press("ArrowUp")
    editor = page.get_by_label("Edit your message")
    await expect(editor).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(editor).to_have_count(0)
    await expect(chat.message).to_be_focused()
    await page.keyboard.press("Control+Shift+O")
    await expect(chat.questions).to_have_count(0)
    await page.keyboard.press("Control+k")
    search = page.get_by_label("Search chats")
    await expect(search).to_be_focused()
    await page.keyboard.press("Tab")
    await expect(chat.entry("One?")).to_be_focused()
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("menuitem", name="Pin")).to_be_focused()
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("Title")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="Actions for “One?”")).to_be_focused()
    await page.keyboard.press("?")
    await expect(chat.sheet.get_by_role("heading", name="Shortcuts and help")).to_be_visible()
    await page.keyboard.press("Escape")
    await page.keyboard.press("Control+b")
    await expect(chat.entry("One?")).to_be_hidden()


async def test_the_first_tab_stop_leads_to_the_message_field(chat: ChatPage) -> None:
    await expect(chat.message).to_be_focused()
    await chat.page.evaluate("document.body.tabIndex = -1; document.body.focus()")  # as before the first Tab
    await chat.page.keyboard.press("Tab")
    skip = chat.page.get_by_role("button", name="Skip to the message field")
    await expect(skip).to_be_focused()
    await chat.page.keyboard.press("Enter")
    await expect(chat.message).to_be_focused()


async def test_a_screen_reader_is_not_told_each_token(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = [" One", " two", " three."]
    engine.may_generate.clear()
    await chat.ask("Count!")
    await let_pass(engine, 2)
    await expect(chat.answers).to_contain_text("One two")
    await expect(chat.announcer).to_have_text("The answer is being written.")
    await expect(chat.page.locator(".messages [aria-live], .messages [role=status]")).to_have_count(0)
    engine.may_generate.set()
    await expect(chat.announcer).to_have_text("The answer is complete. One two three.")


async def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, gateway: Gateway) -> None:
    gateway.engine.tokens = [RICH, " ", "x" * 300]
    async with open_chat(browser, gateway.page_url, **PHONE) as chat:
        await expect(chat.page.get_by_text("Do not enter sensitive data")).to_be_in_viewport()
        await chat.ask("A" * 300)
        await expect(chat.answers).to_contain_text("xxx")
        await expect(chat.send).to_be_in_viewport()
        assert await chat.hidden_width() == 0
        await chat.page.get_by_role("button", name="Show chats").click()
        await expect(chat.entry("A" * 60)).to_be_in_viewport()
        await chat.new_chat.click()
        await expect(chat.questions).to_have_count(0)
        await expect(chat.entry("A" * 60)).to_be_hidden()


async def test_the_page_is_dark_where_the_system_is_or_where_it_is_chosen(
    browser: Browser, gateway: Gateway
) -> None:
    shade = (
        "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    )
    lightness = {}
    for scheme in ("light", "dark"):
        async with open_chat(browser, gateway.page_url, color_scheme=scheme) as chat:
            lightness[scheme] = sum(await chat.page.evaluate(shade))
            if scheme == "light":
                await chat.page.get_by_role("button", name="Chat settings").click()
                await chat.sheet.get_by_label("Dark").check()
                await chat.page.keyboard.press("Escape")
                assert sum(await chat.page.evaluate(shade)) < 150
                await chat.page.reload()
                await expect(chat.message).to_be_visible()
                assert sum(await chat.page.evaluate(shade)) < 150
    assert lightness["dark"] < 150 < 600 < lightness["light"]


async def test_text_from_right_to_left_stands_on_the_right(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = ["שלום", " עולם\n\nHello"]
    await chat.ask("مرحبا")
    await expect(chat.answers.locator(".block")).to_have_text(["שלום עולם", "Hello"])
    await expect(chat.send).to_be_visible()
    direction = "(element) => getComputedStyle(element).direction"
    assert await chat.questions.locator("[dir=auto]").evaluate(direction) == "rtl"
    assert await chat.answers.locator(".block").first.evaluate(direction) == "rtl"
    assert await chat.answers.locator(".block").last.evaluate(direction) == "ltr"


async def test_people_are_told_not_to_enter_sensitive_data_and_what_is_kept(chat: ChatPage) -> None:
    await expect(chat.page.get_by_text("Do not enter sensitive data")).to_be_in_viewport()
    await expect(chat.message).to_have_accessible_description(re.compile("sensitive data.*keeps your chats"))


async def test_copying_works_without_a_secure_context(browser: Browser, gateway: Gateway) -> None:
    gateway.engine.tokens = ["Some **text**.\n\n```js\nlet a = 1;\n```"]
    async with open_chat(browser, gateway.page_url) as chat:
        await chat.page.evaluate("delete Navigator.prototype.clipboard; delete Crypto.prototype.randomUUID")
        await chat.ask("Something?")
        await expect(chat.send).to_be_visible()
        await chat.page.get_by_role("button", name="Copy code").click()
        await chat.message.press("Control+v")
        await expect(chat.message).to_have_value("let a = 1;")


async def test_a_big_paste_stays_handy(browser: Browser, gateway: Gateway) -> None:
    gateway.engine.tokens = ["Long."]
    paste = "\n".join(f"line-{number}-of-a-long-file" for number in range(1500))
    async with open_chat(
        browser, gateway.page_url, permissions=["clipboard-read", "clipboard-write"]
    ) as chat:
        await expect(chat.message).to_be_focused()
        await chat.page.evaluate("(text) => navigator.clipboard.writeText(text)", paste)
        await chat.page.keyboard.press("Control+v")
        await expect(chat.send).to_be_enabled()
        await chat.page.keyboard.press("Enter")
        await chat.expect_answer("Long.")
        box = await chat.questions.bounding_box()
        assert box is not None
        assert box["height"] < 500
        await chat.page.get_by_role("button", name="Show all of it").click()
        await expect(chat.questions).to_contain_text("line-1499-of")
