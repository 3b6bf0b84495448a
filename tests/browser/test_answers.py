"""What the page does with what an engine may do: any text, any order of events, any error."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from petals_chat.engine.interface import ModelState, ModelStatus
from petals_chat.errors import (
    AttentionCacheFullError,
    InternalError,
    MaximumLengthExceededError,
    MissingBlocksError,
    ModelLoadingError,
    PetalsChatError,
    SwarmUnreachableError,
    TooManyRequestsError,
    WorkerLostError,
)
from petals_chat.settings import LimitSettings
from tests.browser.chat_page import ChatPage, let_pass, open_chat, open_tab, open_window, told
from tests.browser.conftest import Gateway, running_gateway
from tests.fakes import FakeEngine
from tests.gateway.gateways import until


async def test_an_answer_is_streamed_without_its_stop_text(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = [" Hel", "lo", " #", "1", "##", "#"]
    engine.may_generate.clear()
    await chat.ask("Hi")
    await let_pass(engine, 2)
    await expect(chat.stop).to_be_visible()
    await expect(chat.answers).to_contain_text("Hello")
    engine.may_generate.set()
    await chat.expect_answer("Hello #1")


async def test_a_chat_is_told_with_what_was_said(chat: ChatPage, engine: FakeEngine) -> None:
    for question, answer in (("One?", "First."), ("Two?", "Second.")):
        engine.tokens = [answer]
        await chat.ask(question)
        await chat.expect_answer(answer)
    assert told(engine) == [("user", "One?"), ("assistant", "First."), ("user", "Two?")]
    assert engine.requests[0].sampling.do_sample
    assert engine.requests[0].sampling.temperature == 0.6


async def test_stop_ends_the_generation_and_the_answer_can_be_continued(
    chat: ChatPage, engine: FakeEngine
) -> None:
    engine.may_generate.clear()
    await chat.ask("Count!")
    await let_pass(engine, 3)
    await expect(chat.answers).to_contain_text("t0 t1")
    await chat.stop.click()
    await until(lambda: engine.running == 0 and not engine.sessions)
    await expect(chat.outcomes).to_have_text("You stopped this answer.")
    so_far = await chat.answers.inner_text()

    engine.tokens = [" and so on."]
    engine.may_generate.set()
    await chat.go_on.click()
    await chat.expect_answer(f"{so_far} and so on.")
    assert told(engine) == [("user", "Count!"), ("assistant", so_far)]
    await expect(chat.outcomes).to_have_count(0)


async def test_escape_stops_the_answer(chat: ChatPage, engine: FakeEngine) -> None:
    engine.may_generate.clear()
    await chat.ask("Count!")
    await let_pass(engine, 1)
    await chat.page.keyboard.press("Escape")
    await until(lambda: engine.running == 0)
    await expect(chat.outcomes).to_have_text("You stopped this answer.")


async def test_a_new_chat_lets_the_answer_of_the_old_one_go_on(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = [" Once", " upon", " a", " time."]
    engine.may_generate.clear()
    await chat.ask("A tale?")
    await let_pass(engine, 1)
    await chat.new_chat.click()
    await expect(chat.questions).to_have_count(0)
    engine.may_generate.set()
    await until(lambda: engine.running == 0)
    await chat.entry("A tale?").click()
    await chat.expect_answer("Once upon a time.")


async def test_an_answer_is_regenerated_and_its_versions_are_kept(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = ["First."]
    await chat.ask("One?")
    await chat.expect_answer("First.")
    engine.tokens = ["Second."]
    await chat.regenerate.click()
    await chat.expect_answer("Second.")
    await expect(chat.page.get_by_role("group", name="Version 2 of 2")).to_be_visible()
    await chat.page.get_by_role("button", name="Previous version").click()
    await chat.expect_answer("First.")
    await chat.page.reload()
    await chat.expect_answer("First.")
    await chat.page.get_by_role("button", name="Next version").click()
    await chat.expect_answer("Second.")


async def test_an_edited_question_begins_a_branch(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = ["First."]
    await chat.ask("One?")
    await chat.expect_answer("First.")
    engine.tokens = ["Second."]
    await chat.questions.hover()
    await chat.page.get_by_role("button", name="Edit", exact=True).click()
    editor = chat.page.get_by_label("Edit your message")
    await expect(editor).to_be_focused()
    await editor.fill("Uno?")
    await editor.press("Enter")
    await chat.expect_answer("Second.")
    assert told(engine) == [("user", "Uno?")]
    await chat.questions.hover()
    await chat.page.get_by_role("button", name="Previous version").click()
    await expect(chat.questions).to_have_text("One?")
    await chat.expect_answer("First.")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AttentionCacheFullError(), "no room for another chat"),
        (TooManyRequestsError("a limit"), "Too many people"),
        (MissingBlocksError([3]), "Nobody is running some of the parts of Beluga (70B)"),
        (WorkerLostError("x"), "is being started again"),
        (SwarmUnreachableError("gone"), "do not answer"),
        (InternalError(), "Something went wrong"),
    ],
    ids=lambda value: value.code if isinstance(value, PetalsChatError) else "",
)
async def test_a_failed_answer_says_why_in_words_and_can_be_tried_again(
    chat: ChatPage, engine: FakeEngine, error: PetalsChatError, words: str
) -> None:
    engine.generate_error = error
    await chat.ask("Hello?")
    await expect(chat.outcomes).to_contain_text(words)
    assert error.code not in await chat.page.inner_text("body")
    assert type(error).__name__ not in await chat.page.inner_text("body")
    engine.generate_error = None
    engine.tokens = ["Hello."]
    await chat.try_again.click()
    await chat.expect_answer("Hello.")
    await expect(chat.outcomes).to_have_count(0)
    await expect(chat.page.get_by_role("group", name="Version")).to_have_count(0)


async def test_missing_blocks_show_the_ways_out(chat: ChatPage, engine: FakeEngine) -> None:
    engine.generate_error = MissingBlocksError([3])
    await chat.ask("Hello?")
    await chat.page.get_by_role("button", name="Choose another model").click()
    await expect(chat.sheet).to_be_visible()
    await chat.page.keyboard.press("Escape")
    await chat.page.get_by_role("link", name="See the swarm").click()
    await expect(chat.page.get_by_role("heading", name="Swarm").first).to_be_visible()


async def test_an_answer_that_broke_off_is_continued_where_it_was(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = [" Once", " upon", " a", " time"] * 100
    engine.may_generate.clear()
    await chat.ask("A tale?")
    await let_pass(engine, 2)
    engine.generate_error = WorkerLostError("swarm/beluga")
    engine.may_generate.set()
    await expect(chat.outcomes).to_contain_text("broke off")
    so_far = await chat.answers.inner_text()
    assert so_far.startswith("Once upon")

    engine.generate_error = None
    engine.tokens = [" The end."]
    await chat.go_on.click()
    await chat.expect_answer(f"{so_far} The end.")


async def test_a_question_without_an_answer_is_not_told_again(chat: ChatPage, engine: FakeEngine) -> None:
    engine.generate_error = AttentionCacheFullError()
    await chat.ask("Lost?")
    await expect(chat.try_again).to_be_visible()
    engine.generate_error = None
    engine.tokens = ["Hello."]
    await chat.ask("Hello?")
    await chat.expect_answer("Hello.")
    await expect(chat.try_again).to_be_hidden()
    assert told(engine) == [("user", "Hello?")]


async def test_a_chat_that_is_too_long_goes_on_without_its_oldest_messages(
    chat: ChatPage, engine: FakeEngine
) -> None:
    engine.tokens = ["First."]
    await chat.ask("One?")
    await chat.expect_answer("First.")
    engine.generate_error = MaximumLengthExceededError("2048 tokens are used up", limit=2048)
    await chat.ask("Two?")
    await expect(chat.outcomes).to_contain_text("longer than the model can remember")
    engine.generate_error = None
    engine.tokens = ["Second."]
    await chat.page.get_by_role("button", name="Leave out the oldest messages").click()
    await chat.expect_answer("Second.")
    assert told(engine) == [("user", "Two?")]
    await expect(chat.page.get_by_text("no longer told what stands above")).to_be_visible()


async def test_a_chat_that_is_too_long_can_be_begun_anew(chat: ChatPage, engine: FakeEngine) -> None:
    engine.generate_error = MaximumLengthExceededError("2048 tokens are used up", limit=2048)
    await chat.ask("Hello?")
    await chat.page.get_by_role("button", name="Start a new chat").click()
    await expect(chat.questions).to_have_count(0)
    await expect(chat.message).to_be_focused()


async def test_a_message_that_is_too_large_is_given_back_for_editing(
    browser: Browser, built_page: None, tmp_path: Path
) -> None:
    async with (
        running_gateway(data_dir=tmp_path, limits=LimitSettings(max_message_bytes=2048)) as gateway,
        open_chat(browser, gateway.page_url) as chat,
    ):
        with chat.expected_complaints("413"):
            await chat.ask("x" * 4096)
            await expect(chat.notice).to_contain_text("too long")
            await expect(chat.message).to_have_value("x" * 4096)
            await expect(chat.questions).to_have_count(0)


async def test_a_message_to_a_loading_model_waits_for_it(chat: ChatPage, engine: FakeEngine) -> None:
    engine.open_error = ModelLoadingError("swarm/beluga")
    engine.tokens = ["Awake."]
    await chat.ask("Awake?")
    await expect(chat.outcomes).to_contain_text("still loading")
    await expect(chat.stop).to_be_visible()
    engine.open_error = None
    await chat.expect_answer("Awake.")
    await expect(chat.outcomes).to_have_count(0)


async def test_a_message_that_waits_can_be_stopped(chat: ChatPage, engine: FakeEngine) -> None:
    engine.open_error = ModelLoadingError("swarm/beluga")
    await chat.ask("Awake?")
    await expect(chat.outcomes).to_contain_text("still loading")
    await chat.stop.click()
    await expect(chat.outcomes).to_have_text("You stopped this answer.")
    await expect(chat.send).to_be_visible()


async def test_another_model_goes_on_with_the_chat(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = ["First."]
    await chat.ask("One?")
    await chat.expect_answer("First.")
    await chat.choose_model("Falcon (180B)")
    engine.tokens = ["Second."]
    await chat.ask("Two?")
    await expect(chat.answers).to_have_text(["First.", "Second."])
    assert [key for key, _ in engine.opened] == ["swarm/beluga", "swarm/falcon"]
    assert told(engine) == [("user", "One?"), ("assistant", "First."), ("user", "Two?")]


async def test_models_are_listed_by_family_with_their_cards_and_licences(chat: ChatPage) -> None:
    await chat.model.click()
    families = chat.sheet.get_by_role("group")
    await expect(families).to_have_count(2)
    await expect(chat.sheet.get_by_role("radio", name="Beluga (70B)")).to_be_checked()
    beluga = families.filter(has_text="Beluga")
    card = beluga.get_by_role("link", name="Model card")
    await expect(card).to_have_attribute("href", "https://example.org/beluga")
    await expect(card).to_have_attribute("rel", "noopener")
    licence = beluga.get_by_role("link", name="Licence")
    await expect(licence).to_have_attribute("href", "https://example.org/beluga/licence")
    await expect(families.filter(has_text="Falcon").get_by_role("link")).to_have_count(0)


@pytest.mark.parametrize(
    ("status", "words", "remark"),
    [
        (ModelStatus(ModelState.LOADING), "is still loading", "loading"),
        (ModelStatus(ModelState.BROKEN, missing_blocks=(1, 2)), "nobody runs 2 of its parts", "incomplete"),
        (ModelStatus(ModelState.FULL), "are full: answers wait in a queue", "full"),
        (ModelStatus(ModelState.UNAVAILABLE), "could not be started", "not running"),
    ],
    ids=lambda value: value.state if isinstance(value, ModelStatus) else "",
)
async def test_the_state_of_a_model_is_told_in_words_until_it_is_ready(
    browser: Browser, gateway: Gateway, status: ModelStatus, words: str, remark: str
) -> None:
    ready = gateway.engine.statuses["swarm/beluga"]
    gateway.engine.statuses["swarm/beluga"] = status
    async with open_chat(browser, gateway.page_url) as chat:
        sentence = chat.page.get_by_text(words)
        await expect(sentence).to_be_visible()
        await expect(chat.model).to_contain_text(f"Beluga (70B){remark}")
        gateway.engine.statuses["swarm/beluga"] = ready
        await expect(sentence).to_be_hidden()
        await expect(chat.model).not_to_contain_text(remark)


async def test_the_page_follows_an_answer_unless_people_scroll_up(chat: ChatPage, engine: FakeEngine) -> None:
    latest = chat.page.get_by_role("button", name="Latest message")
    engine.tokens = ["- word\n"] * 1000
    engine.may_generate.clear()
    await chat.ask("Many lines, please")
    await let_pass(engine, 100)
    await expect(chat.answers.locator("li").nth(99)).to_be_attached()
    area = "document.querySelector('.scroll-area')"
    position = f"{area}.scrollHeight - {area}.clientHeight - {area}.scrollTop"
    await chat.page.wait_for_function(f"{position} < 2 && {area}.scrollTop > 0")

    await chat.page.mouse.move(600, 300)
    await chat.page.mouse.wheel(0, -400)
    await expect(latest).to_be_visible()
    before = await chat.page.evaluate(f"{area}.scrollTop")
    await let_pass(engine, 100)
    await expect(chat.answers.locator("li").nth(199)).to_be_attached()
    assert await chat.page.evaluate(f"{area}.scrollTop") == before

    await latest.click()
    await chat.page.wait_for_function(f"{position} < 2")
    await expect(latest).to_be_hidden()


HOLD_FRAMES = """
window.held = [];
window.requestAnimationFrame = (callback) => window.held.push(callback);
window.letFrame = () => window.held.splice(0).forEach((callback) => callback(performance.now()));
"""
SEE_BLOCK = """
(() => {
  const area = document.querySelector(".scroll-area");
  area.scrollTop = area.scrollHeight / 2;
  const { top, height, left } = area.getBoundingClientRect();
  window.seen = document.elementFromPoint(left + 200, top + height / 2).closest(".block");
  return window.seen.getBoundingClientRect().top;
})()
"""


async def test_a_long_answer_is_drawn_in_steps_while_what_is_read_stays_in_its_place(
    browser: Browser, gateway: Gateway
) -> None:
    table = "| a | b |\n| - | - |\n" + "| cell | **cell** |\n" * 250
    paragraphs = "".join(f"Paragraph {number}.\n\n" for number in range(400))
    gateway.engine.tokens = [paragraphs, "- item\n" * 220, "\n", table, f"\n{paragraphs}The end."]
    async with open_window(browser) as window:
        async with open_tab(window, gateway.page_url) as chat:
            await chat.ask("Everything, please")
            await expect(chat.answers).to_contain_text("The end.")
            await expect(chat.send).to_be_visible()
            await expect(chat.answers.locator("p")).to_have_count(801)
            await expect(chat.answers.locator("li")).to_have_count(220)
            await expect(chat.answers.locator("tr")).to_have_count(251)
            address = chat.page.url
        await window.add_init_script(HOLD_FRAMES)
        async with open_tab(window, address) as chat:
            await expect(chat.answers.locator("p").last).to_have_text("The end.")
            assert 10 < await chat.answers.locator("p").count() < 400
            top = await chat.page.evaluate(SEE_BLOCK)
            await expect(chat.page.get_by_role("button", name="Latest message")).to_be_visible()
            frames = 0
            while await chat.answers.locator("p").count() < 801 or await chat.page.evaluate("held.length"):
                await chat.page.evaluate("letFrame()")
                assert abs(await chat.page.evaluate("seen.getBoundingClientRect().top") - top) < 2
                frames += 1
            assert frames > 2
            assert await chat.page.evaluate("seen.isConnected")
            await expect(chat.answers.locator("li")).to_have_count(220)
            await expect(chat.answers.locator("tr")).to_have_count(251)


async def test_a_finished_answer_is_announced_to_screen_readers(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = [" Hello", " there."]
    await chat.ask("Hi")
    await expect(chat.announcer).to_have_text("The answer is complete. Hello there.")


async def test_the_page_works_under_a_sub_path(browser: Browser, built_page: None, tmp_path: Path) -> None:
    async with (
        running_gateway(data_dir=tmp_path, root_path="/some/chat") as gateway,
        open_chat(browser, gateway.page_url) as chat,
    ):
        gateway.engine.tokens = ["Hello."]
        await chat.ask("Hi")
        await chat.expect_answer("Hello.")
        await chat.page.reload()
        await chat.expect_answer("Hello.")
