"""Chats that are kept: nothing is lost when tabs, connections and servers go, and everything can be found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from petals_chat.settings import LimitSettings
from tests.browser.chat_page import ChatPage, let_pass, open_chat, open_tab, open_window, told
from tests.browser.conftest import Gateway, running_gateway
from tests.browser.line import Line
from tests.fakes import FakeEngine
from tests.gateway.gateways import until

TALE = [" Once", " upon", " a", " time", *(f" {number}" for number in range(40))]
WHOLE_TALE = "".join(TALE).strip()


async def test_an_answer_goes_on_when_its_tab_is_closed_and_is_there_when_it_is_opened_again(
    browser: Browser, gateway: Gateway
) -> None:
    engine = gateway.engine
    engine.tokens = TALE
    engine.may_generate.clear()
    async with open_window(browser) as window:
        async with open_tab(window, gateway.page_url) as chat:
            await chat.ask("A tale?")
            await let_pass(engine, 2)
            await expect(chat.answers).to_contain_text("Once upon")
            address = chat.page.url
        await let_pass(engine, 2)
        assert engine.running == 1
        async with open_tab(window, address) as chat:
            await expect(chat.answers).to_contain_text("Once upon a time")
            await expect(chat.stop).to_be_visible()
            engine.may_generate.set()
            await chat.expect_answer(WHOLE_TALE)
    assert len(engine.requests) == 1


async def test_two_tabs_follow_the_same_answer(browser: Browser, gateway: Gateway) -> None:
    engine = gateway.engine
    engine.tokens = TALE
    engine.may_generate.clear()
    async with open_window(browser) as window, open_tab(window, gateway.page_url) as first:
        await first.ask("A tale?")
        await let_pass(engine, 2)
        await expect(first.answers).to_contain_text("Once upon")
        async with open_tab(window, first.page.url) as second:
            await expect(second.answers).to_contain_text("Once upon")
            engine.may_generate.set()
            for tab in (first, second):
                await tab.expect_answer(WHOLE_TALE)


async def test_a_lost_connection_is_made_anew_and_the_answer_goes_on(
    chat: ChatPage, gateway: Gateway
) -> None:
    engine = gateway.engine
    engine.tokens = TALE
    engine.may_generate.clear()
    await chat.ask("A tale?")
    await let_pass(engine, 2)
    await expect(chat.answers).to_contain_text("Once upon")
    with chat.expected_complaints("net::ERR_"):
        await gateway.line.cut()
        await expect(chat.outcomes).to_contain_text("connection to the server was lost")
        await let_pass(engine, 2)
        engine.may_generate.set()
        await gateway.line.mend()
        await chat.expect_answer(WHOLE_TALE)
    await expect(chat.outcomes).to_have_count(0)
    assert len(engine.requests) == 1


NO_WAITING = """
const begin = window.setTimeout;
window.setTimeout = (run, milliseconds, ...rest) => milliseconds > 200 ? 0 : begin(run, milliseconds, ...rest);
"""
"""Attempts that are waited for never come."""


async def test_the_connection_is_made_anew_at_once_where_there_is_reason_to_hope(
    browser: Browser, gateway: Gateway
) -> None:
    engine = gateway.engine
    engine.may_generate.clear()
    async with open_window(browser) as window:
        await window.add_init_script(NO_WAITING)
        async with open_tab(window, gateway.page_url) as chat:
            await chat.ask("Count!")
            await let_pass(engine, 1)
            await expect(chat.answers).to_contain_text("t0")
            with chat.expected_complaints("net::ERR_"):
                for count, hope in enumerate(("click", "focus", "online"), start=1):
                    await gateway.line.cut()
                    await expect(chat.outcomes).to_contain_text("connection to the server was lost")
                    await let_pass(engine, 1)
                    await gateway.line.mend()
                    if hope == "click":
                        await chat.page.get_by_role("button", name="Try now").click()
                    else:
                        await chat.page.evaluate(f"dispatchEvent(new Event('{hope}'))")
                    await expect(chat.answers).to_contain_text(f"t{count}")
                    await expect(chat.outcomes).to_have_count(0)
            await chat.stop.click()
            await expect(chat.outcomes).to_have_text("You stopped this answer.")


async def test_a_chat_that_is_opened_while_the_server_is_away_comes_with_it(
    chat: ChatPage, gateway: Gateway
) -> None:
    gateway.engine.tokens = ["Yes."]
    await chat.ask("One?")
    await chat.expect_answer("Yes.")
    await chat.new_chat.click()
    with chat.expected_complaints("net::ERR_"):
        await gateway.line.cut()
        await chat.entry("One?").click()
        await expect(chat.page.get_by_text("opened as soon as it is back")).to_be_visible()
        await gateway.line.mend()
        await chat.expect_answer("Yes.")


async def test_an_answer_that_a_restart_of_the_gateway_cut_can_be_continued(
    browser: Browser, built_page: None, tmp_path: Path
) -> None:
    line = Line("127.0.0.1:9")
    await line.mend()
    async with open_window(browser) as window:
        async with running_gateway(data_dir=tmp_path, line=line) as gateway:
            gateway.engine.tokens = TALE
            gateway.engine.may_generate.clear()
            tab = open_tab(window, gateway.page_url)
            chat = await tab.__aenter__()
            await chat.ask("A tale?")
            await let_pass(gateway.engine, 2)
            await expect(chat.answers).to_contain_text("Once upon")
        async with running_gateway(data_dir=tmp_path, line=line) as gateway:
            gateway.engine.tokens = [" The end."]
            with chat.expected_complaints("net::ERR_", "WebSocket", "50"):
                await expect(chat.outcomes).to_have_text(
                    "The server was restarted while it wrote this answer."
                )
            await chat.page.reload()
            await expect(chat.outcomes).to_have_text("The server was restarted while it wrote this answer.")
            so_far = await chat.answers.inner_text()
            assert WHOLE_TALE.startswith(so_far)
            await chat.go_on.click()
            await chat.expect_answer(f"{so_far} The end.")
            assert told(gateway.engine) == [("user", "A tale?"), ("assistant", so_far)]
            await tab.__aexit__(None, None, None)
    await line.cut()


async def test_chats_are_listed_renamed_pinned_and_deleted(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = ["Yes."]
    for title in ("First", "Second"):
        await chat.new_chat.click()
        await chat.ask(title)
        await chat.expect_answer("Yes.")
    links = chat.page.get_by_role("navigation").locator(".chat-list").get_by_role("link")
    await expect(links).to_have_text(["Second", "First"])
    await chat.act_on_chat("First", "Pin")
    await expect(links).to_have_text(["First", "Second"])
    await chat.act_on_chat("First", "Rename")
    await chat.page.get_by_label("Title").fill("Renamed")
    await chat.page.get_by_role("button", name="Save").click()
    await expect(links).to_have_text(["Renamed", "Second"])
    await chat.page.reload()
    await expect(links).to_have_text(["Renamed", "Second"])
    await chat.act_on_chat("Second", "Delete")
    await chat.sheet.get_by_role("button", name="Delete chat").click()
    await expect(links).to_have_text(["Renamed"])
    await expect(chat.questions).to_have_count(0)


async def test_chats_are_found_by_their_words(chat: ChatPage, engine: FakeEngine) -> None:
    for title, answer in (("First", "About apples."), ("Second", "About pears.")):
        engine.tokens = [answer]
        await chat.new_chat.click()
        await chat.ask(title)
        await chat.expect_answer(answer)
    await chat.page.keyboard.press("Control+k")
    search = chat.page.get_by_label("Search chats")
    await expect(search).to_be_focused()
    await search.fill("apples")
    links = chat.page.get_by_role("navigation").locator(".chat-list").get_by_role("link")
    await expect(links).to_have_text(["First"])
    await search.fill("plums")
    await expect(chat.page.get_by_text("No chat has these words.")).to_be_visible()


@pytest.mark.parametrize("is_kept", [True, False], ids=["server", "browser"])
async def test_a_chat_is_exported_and_imported(
    browser: Browser, built_page: None, tmp_path: Path, is_kept: bool
) -> None:
    async with (
        running_gateway(data_dir=tmp_path if is_kept else None) as gateway,
        open_chat(browser, gateway.page_url) as chat,
    ):
        gateway.engine.tokens = ["**Bold** answer."]
        await chat.ask("Question?")
        await chat.expect_answer("Bold answer.")
        async with chat.page.expect_download() as download:
            await chat.act_on_chat("Question?", "Export as Markdown")
        written = tmp_path / "chat.md"
        await (await download.value).save_as(written)
        assert "**Bold** answer." in written.read_text()
        async with chat.page.expect_download() as download:
            await chat.act_on_chat("Question?", "Export as JSON")
        exported = tmp_path / "chat.json"
        await (await download.value).save_as(exported)
        assert "**Bold** answer." in json.dumps(json.loads(exported.read_text()))
        await chat.act_on_chat("Question?", "Delete")
        await chat.sheet.get_by_role("button", name="Delete chat").click()
        await expect(chat.entry("Question?")).to_have_count(0)
        async with chat.page.expect_file_chooser() as chooser:
            await chat.page.get_by_role("button", name="More").click()
            await chat.page.get_by_role("menuitem", name="Import chats").click()
        await (await chooser.value).set_files(exported)
        await expect(chat.notice).to_contain_text("One chat was imported.")
        await chat.expect_answer("Bold answer.")


WATCH_CHANGES = """
window.elsewhere = 0;
window.mostBlocks = 0;
new MutationObserver((changes) => {
  const growing = [...document.querySelectorAll(".answer")].at(-1);
  const blocks = new Set();
  for (const { target } of changes) {
    if (!growing.contains(target)) window.elsewhere++;
    const element = target instanceof Element ? target : target.parentElement;
    const block = element?.closest(".block, .code");
    if (block) blocks.add(block);
  }
  window.mostBlocks = Math.max(window.mostBlocks, blocks.size);
}).observe(document.querySelector(".messages"), {
  childList: true, subtree: true, characterData: true, attributes: true,
});
"""
LAID_OUT = """
[...document.querySelectorAll(".messages article > .prose, .messages article > .bubble")]
  .filter((element) => element.checkVisibility({ contentVisibilityAuto: true })).length
"""


async def test_in_a_chat_of_500_messages_a_token_changes_the_end_of_its_answer_only(
    chat: ChatPage, engine: FakeEngine, tmp_path: Path
) -> None:
    texts = ["Question{}?", "Answer{}.\n\n- list"]
    messages = [
        {
            "id": str(number),
            "parent": str(number - 1) if number else None,
            "role": ["user", "assistant"][number % 2],
            "content": texts[number % 2].format(number),
        }
        for number in range(500)
    ]
    exported = {"title": "Long", "model": "swarm/beluga", "current": "499", "messages": messages}
    file = tmp_path / "long.json"
    file.write_text(json.dumps({"format": "petals-chat", "version": 1, "chats": [exported]}))
    async with chat.page.expect_file_chooser() as chooser:
        await chat.page.get_by_role("button", name="More", exact=True).click()
        await chat.page.get_by_role("menuitem", name="Import chats").click()
    await (await chooser.value).set_files(file)
    await expect(chat.page.locator(".messages article")).to_have_count(500)
    await expect(chat.answers.last).to_contain_text("Answer499.")
    assert 12 <= await chat.page.evaluate(LAID_OUT) < 40

    engine.tokens = [f" word{number}" + "\n\n" * (number % 3 == 2) for number in range(200)]
    engine.may_generate.clear()
    await chat.ask("And?")
    await let_pass(engine, 1)
    await expect(chat.answers.last).to_contain_text("word0")
    await chat.page.evaluate(WATCH_CHANGES)
    for _ in range(30):
        await let_pass(engine, 1)
        await expect(chat.answers.last).to_contain_text(f"word{engine.tokens_pulled - 1}")
    assert await chat.page.evaluate("[window.elsewhere, window.mostBlocks <= 4]") == [0, True]
    engine.may_generate.set()
    await expect(chat.answers.last.locator(".block")).to_have_count(67)
    await expect(chat.send).to_be_visible()


async def test_a_shared_chat_can_be_read_by_others_until_it_is_taken_back(
    browser: Browser, gateway: Gateway
) -> None:
    gateway.engine.tokens = ["**Bold** answer."]
    async with open_chat(browser, gateway.page_url) as chat:
        await chat.ask("Question?")
        await chat.expect_answer("Bold answer.")
        await chat.page.get_by_role("button", name="Share by link").click()
        await chat.sheet.get_by_role("button", name="Make a link").click()
        link = await chat.sheet.get_by_label("Link").input_value()
        async with open_chat(browser, link) as reader:
            await expect(reader.page.get_by_role("heading", name="Question?")).to_be_visible()
            await expect(reader.questions).to_have_text("Question?")
            await expect(reader.answers).to_have_text("Bold answer.")
            await expect(reader.message).to_have_count(0)
        await chat.sheet.get_by_role("button", name="Take the link back").click()
        await expect(chat.sheet).to_contain_text("no longer works")
        async with open_chat(browser, link) as reader:
            with reader.expected_complaints("404"):
                await expect(reader.page.get_by_text("This link does not work")).to_be_visible()


async def test_other_visitors_see_nothing_of_it(browser: Browser, gateway: Gateway) -> None:
    gateway.engine.tokens = ["Secret."]
    async with open_chat(browser, gateway.page_url) as chat:
        await chat.ask("Question?")
        await chat.expect_answer("Secret.")
        async with open_chat(browser, chat.page.url) as other:
            with other.expected_complaints("404"):
                await expect(other.page.get_by_text("This chat is not there any more.")).to_be_visible()
                await expect(other.page.get_by_text("Your chats appear here.")).to_be_visible()


async def test_settings_belong_to_their_chat(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = ["Yes."]
    await chat.page.get_by_role("button", name="Chat settings").click()
    await chat.sheet.get_by_label("System prompt").fill("Be brief.")
    await chat.sheet.get_by_role("spinbutton", name="Temperature").fill("0.2")
    await chat.sheet.get_by_role("button", name="Save").click()
    await chat.ask("One?")
    await chat.expect_answer("Yes.")
    assert told(engine) == [("system", "Be brief."), ("user", "One?")]
    assert engine.requests[-1].sampling.temperature == 0.2
    assert engine.requests[-1].sampling.top_p == 0.9
    await chat.page.reload()
    await chat.page.get_by_role("button", name="Chat settings").click()
    await expect(chat.sheet.get_by_label("System prompt")).to_have_value("Be brief.")
    await chat.page.keyboard.press("Escape")
    await chat.new_chat.click()
    await chat.ask("Two?")
    await chat.expect_answer("Yes.")
    assert told(engine) == [("user", "Two?")]


IS_KEPT = """
() => new Promise((resolve) => {
  const opening = indexedDB.open("petals-chat");
  opening.onsuccess = () => {
    const count = opening.result.transaction("messages").objectStore("messages").count();
    count.onsuccess = () => { opening.result.close(); resolve(count.result === 2); };
  };
})
"""
"""Whether the browser has written question and answer down."""


async def test_without_a_history_the_browser_keeps_the_chats(
    browser: Browser, forgetful_gateway: Gateway
) -> None:
    engine = forgetful_gateway.engine
    engine.tokens = TALE
    engine.may_generate.clear()
    async with open_window(browser) as window:
        async with open_tab(window, forgetful_gateway.page_url) as chat:
            await expect(chat.page.get_by_text("kept in this browser only")).to_be_visible()
            await chat.ask("A tale?")
            await let_pass(engine, 2)
            await expect(chat.answers).to_contain_text("Once upon")
            await chat.page.wait_for_function(IS_KEPT)
            address = chat.page.url
        await let_pass(engine, 2)
        async with open_tab(window, address) as chat:
            engine.may_generate.set()
            await chat.expect_answer(WHOLE_TALE)
            await expect(chat.entry("A tale?")).to_be_visible()
    await until(lambda: engine.running == 0)


async def test_too_many_answers_at_once_are_refused_in_words(
    browser: Browser, built_page: None, tmp_path: Path
) -> None:
    limits = LimitSettings(max_answers_of_client=1)
    async with (
        running_gateway(data_dir=tmp_path, limits=limits) as gateway,
        open_chat(browser, gateway.page_url) as chat,
    ):
        gateway.engine.may_generate.clear()
        await chat.ask("One?")
        await until(lambda: gateway.engine.running == 1)
        await chat.new_chat.click()
        await chat.ask("Two?")
        await expect(chat.outcomes).to_contain_text("Too many")
        gateway.engine.tokens = ["Yes."]
        await chat.entry("One?").click()
        await chat.stop.click()
        await until(lambda: gateway.engine.running == 0)
        gateway.engine.may_generate.set()
        await chat.entry("Two?").click()
        await chat.page.get_by_role("button", name="Get an answer").click()
        await chat.expect_answer("Yes.")
