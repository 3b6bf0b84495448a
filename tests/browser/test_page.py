"""What the page does with what an engine may do: any text, any order of events, any error."""

from __future__ import annotations

import asyncio

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
from tests.browser.chat_page import ChatPage, open_chat
from tests.browser.conftest import Gateway, running_gateway
from tests.fakes import FakeEngine
from tests.gateway.gateways import until

INTRODUCTION = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


async def let_pass(engine: FakeEngine, tokens: int) -> None:
    """Let the engine generate at least so many tokens more, and stand still then."""
    enough = engine.tokens_pulled + tokens
    engine.may_generate.set()
    while engine.tokens_pulled < enough:
        await asyncio.sleep(0)
    engine.may_generate.clear()


async def test_an_answer_is_streamed_without_its_stop_text(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = [" Hel", "lo", " #", "1", "##", "#"]
    engine.may_generate.clear()
    await chat.ask("Hi")
    await let_pass(engine, 2)
    await expect(chat.stop).to_be_visible()
    await expect(chat.answers).to_contain_text("Hello")
    engine.may_generate.set()
    await expect(chat.answers).to_have_text("Hello #1")
    await expect(chat.send).to_be_visible()


async def test_a_session_is_opened_once_and_told_only_what_is_new(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = [" First.", "###", " Second.", "</s>", " Third.", "###"]
    for question, answer in (("One?", "First."), ("Two?", "Second."), ("Three?", "Third.")):
        await chat.ask(question)
        await expect(chat.answers.last).to_have_text(answer)
        await expect(chat.send).to_be_visible()
    assert engine.opened == [("swarm/beluga", 2048)]
    assert [request.inputs for request in engine.requests] == [
        f"{INTRODUCTION}###Human: One?###Assistant:",
        "Human: Two?###Assistant:",
        "###Human: Three?###Assistant:",
    ]
    [request] = {(request.stop_sequences, request.chunk_tokens) for request in engine.requests}
    assert request == (("###", "</s>"), 1)
    assert engine.requests[0].sampling.do_sample
    assert engine.requests[0].sampling.temperature == 0.6


async def test_stop_ends_the_generation_and_the_next_message_tells_the_chat_again(
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

    engine.tokens = [" As you wish.", "###"]
    engine.may_generate.set()
    await chat.ask("Enough")
    await expect(chat.answers.last).to_have_text("As you wish.")
    assert engine.requests[-1].inputs == (
        f"{INTRODUCTION}###Human: Count!###Assistant: {so_far}###Human: Enough###Assistant:"
    )


async def test_a_new_chat_ends_the_generation(chat: ChatPage, engine: FakeEngine) -> None:
    engine.may_generate.clear()
    await chat.ask("Count!")
    await let_pass(engine, 1)
    await chat.new_chat.click()
    await until(lambda: engine.running == 0 and not engine.sessions)
    await expect(chat.questions).to_have_count(0)


async def test_markup_and_scripts_of_a_model_are_only_text(chat: ChatPage, engine: FakeEngine) -> None:
    hostile = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script><b>bold</b> &amp; more'
    engine.tokens = [hostile, "###"]
    await chat.ask("<i onclick='window.harmed=1'>me</i>")
    await expect(chat.answers).to_have_text(hostile)
    await expect(chat.send).to_be_visible()
    assert await chat.page.locator("#turns :is(img, script, b, i)").count() == 0
    assert await chat.page.evaluate("window.harmed") is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AttentionCacheFullError(), "no room for another chat"),
        (TooManyRequestsError("a limit"), "Too many people"),
        (MissingBlocksError([3]), "Nobody is running some of the parts"),
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
    engine.tokens = [" Hello.", "###"]
    await chat.try_again.click()
    await expect(chat.answers).to_have_text("Hello.")
    await expect(chat.outcomes).to_be_hidden()


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
    engine.tokens = [" The end.", "###"]
    await chat.try_again.click()
    await expect(chat.answers).to_have_text(f"{so_far} The end.")
    assert engine.requests[-1].inputs == f"{INTRODUCTION}###Human: A tale?###Assistant: {so_far}"


async def test_trying_again_waits_for_what_is_being_started(chat: ChatPage, engine: FakeEngine) -> None:
    engine.open_error = WorkerLostError("swarm/beluga")
    await chat.ask("Hello?")
    await chat.try_again.click()
    await expect(chat.outcomes).to_contain_text("The answer comes as soon as it is ready")
    engine.open_error = None
    engine.tokens = [" Hello.", "###"]
    await expect(chat.answers).to_have_text("Hello.")


async def test_a_question_without_an_answer_is_not_told_again(chat: ChatPage, engine: FakeEngine) -> None:
    engine.generate_error = AttentionCacheFullError()
    await chat.ask("Lost?")
    await expect(chat.try_again).to_be_visible()
    engine.generate_error = None
    engine.tokens = [" Hello.", "###"]
    await chat.ask("Hello?")
    await expect(chat.answers.last).to_have_text("Hello.")
    await expect(chat.try_again).to_be_hidden()
    assert engine.requests[-1].inputs == f"{INTRODUCTION}###Human: Hello?###Assistant:"


async def test_a_chat_that_is_too_long_can_only_be_begun_anew(chat: ChatPage, engine: FakeEngine) -> None:
    engine.generate_error = MaximumLengthExceededError("2048 tokens are used up", limit=2048)
    await chat.ask("Hello?")
    await expect(chat.outcomes).to_contain_text("longer than the model can remember")
    await chat.page.get_by_role("button", name="Start a new chat").click()
    await expect(chat.questions).to_have_count(0)
    await expect(chat.message).to_be_focused()


async def test_a_message_that_is_too_large_is_given_back_for_editing(
    browser: Browser, built_page: None
) -> None:
    async with (
        running_gateway(limits=LimitSettings(max_message_bytes=2048)) as gateway,
        open_chat(browser, gateway.page_url) as chat,
    ):
        await chat.ask("x" * 4096)
        await expect(chat.outcomes).to_contain_text("too long")
        await chat.page.get_by_role("button", name="Edit the message").click()
        await expect(chat.message).to_have_value("x" * 4096)
        await expect(chat.questions).to_have_count(0)


async def test_a_message_to_a_loading_model_waits_for_it(chat: ChatPage, engine: FakeEngine) -> None:
    engine.open_error = ModelLoadingError("swarm/beluga")
    engine.tokens = [" Awake.", "###"]
    await chat.ask("Awake?")
    await expect(chat.outcomes).to_contain_text("still loading")
    await expect(chat.stop).to_be_visible()
    engine.open_error = None
    await expect(chat.answers).to_have_text("Awake.")
    await expect(chat.outcomes).to_be_hidden()


async def test_a_message_that_waits_can_be_stopped(chat: ChatPage, engine: FakeEngine) -> None:
    engine.open_error = ModelLoadingError("swarm/beluga")
    await chat.ask("Awake?")
    await expect(chat.outcomes).to_contain_text("still loading")
    await chat.stop.click()
    await expect(chat.outcomes).to_have_text("You stopped this answer.")
    await expect(chat.send).to_be_visible()


async def test_a_lost_connection_is_made_anew_and_the_answer_goes_on(
    chat: ChatPage, gateway: Gateway
) -> None:
    engine = gateway.engine
    engine.tokens = [" Once", " upon", " a", " time"] * 100
    engine.may_generate.clear()
    await chat.ask("A tale?")
    await let_pass(engine, 2)
    await expect(chat.answers).to_contain_text("Once upon")
    with chat.expected_complaints("net::ERR_CONNECTION"):
        await gateway.line.cut()
        await expect(chat.outcomes).to_contain_text("connection to the server was lost")
        await until(lambda: not engine.sessions)
        engine.tokens = [" The end.", "###"]
        engine.may_generate.set()
        await gateway.line.mend()
        await expect(chat.answers).to_contain_text("The end.")
        await expect(chat.send).to_be_visible()
    await expect(chat.outcomes).to_be_hidden()


async def test_a_chat_goes_on_after_its_idle_connection_was_closed(chat: ChatPage, gateway: Gateway) -> None:
    gateway.engine.tokens = [" First.", "###"]
    await chat.ask("One?")
    await expect(chat.answers.last).to_have_text("First.")
    await expect(chat.send).to_be_visible()  # its stop text has come too
    await gateway.line.cut()
    await until(lambda: not gateway.engine.sessions)
    gateway.engine.tokens = [" Second.", "###"]
    await gateway.line.mend()
    await chat.ask("Two?")
    await expect(chat.answers.last).to_have_text("Second.")
    assert gateway.engine.requests[-1].inputs == (
        f"{INTRODUCTION}###Human: One?###Assistant: First.###Human: Two?###Assistant:"
    )


async def test_models_are_listed_by_family_with_their_cards_and_licences(chat: ChatPage) -> None:
    await expect(chat.model.locator("optgroup")).to_have_count(2)
    await expect(chat.model).to_have_value("swarm/beluga")
    card = chat.page.get_by_role("link", name="Model card")
    await expect(card).to_have_attribute("href", "https://example.org/beluga")
    licence = chat.page.get_by_role("link", name="Licence")
    await expect(licence).to_have_attribute("href", "https://example.org/beluga/licence")
    await chat.model.select_option("Falcon (180B)")
    await expect(card).to_be_hidden()


async def test_another_model_goes_on_with_the_chat(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = [" First.", "###"]
    await chat.ask("One?")
    await expect(chat.answers.last).to_have_text("First.")
    await chat.model.select_option("Falcon (180B)")
    engine.tokens = [" Second.", "</s>"]
    await chat.ask("Two?")
    await expect(chat.answers).to_have_text(["First.", "Second."])
    assert [key for key, _ in engine.opened] == ["swarm/beluga", "swarm/falcon"]
    assert engine.requests[-1].inputs == (
        f"{INTRODUCTION}\nHuman: One?\nAssistant: First.\nHuman: Two?\nAssistant:"
    )


@pytest.mark.parametrize(
    ("status", "words", "remark"),
    [
        (ModelStatus(ModelState.LOADING), "is still loading", "(loading)"),
        (ModelStatus(ModelState.BROKEN, missing_blocks=(1, 2)), "nobody runs 2 of its parts", "(incomplete)"),
        (ModelStatus(ModelState.UNAVAILABLE), "could not be started", "(not running)"),
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
        await expect(chat.model.locator("option:checked")).to_have_text(f"Beluga (70B) {remark}")
        gateway.engine.statuses["swarm/beluga"] = ready
        await expect(sentence).to_be_hidden()
        await expect(chat.model.locator("option:checked")).to_have_text("Beluga (70B)")


async def test_the_page_follows_an_answer_unless_people_scroll_up(chat: ChatPage, engine: FakeEngine) -> None:
    latest = chat.page.get_by_role("button", name="Latest message")
    engine.tokens = [" word\n"] * 1000
    engine.may_generate.clear()
    await chat.ask("Many lines, please")
    await let_pass(engine, 100)
    await expect(chat.answers).to_contain_text("word\n" * 99)
    position = "document.documentElement.scrollHeight - innerHeight - scrollY"
    await chat.page.wait_for_function(f"{position} < 2 && scrollY > 0")

    await chat.page.mouse.move(600, 300)
    await chat.page.mouse.wheel(0, -400)
    await expect(latest).to_be_visible()
    before = await chat.page.evaluate("scrollY")
    await let_pass(engine, 100)
    await expect(chat.answers).to_contain_text("word\n" * 199)
    assert await chat.page.evaluate("scrollY") == before

    await latest.click()
    await chat.page.wait_for_function(f"{position} < 2")
    await expect(latest).to_be_hidden()


async def test_a_finished_answer_is_announced_to_screen_readers(chat: ChatPage, engine: FakeEngine) -> None:
    engine.tokens = [" Hello", " there.", "###"]
    await chat.ask("Hi")
    await expect(chat.page.locator("#announcer[role=status]")).to_have_text("Hello there.")


async def test_the_page_works_under_a_sub_path(browser: Browser, built_page: None) -> None:
    async with (
        running_gateway(root_path="/some/chat") as gateway,
        open_chat(browser, gateway.page_url) as chat,
    ):
        gateway.engine.tokens = [" Hello.", "###"]
        await chat.ask("Hi")
        await expect(chat.answers).to_have_text("Hello.")
