"""Measures the page in a real Chromium: python -m tests.browser.measure [NAME OF A TEXT...]

Prints the main thread's CPU time until the page can be used. Then, for an answer of 10,000 tokens that streams in
within 2.5, 10 and 40 seconds, and for its chat when it is opened again: from the browser's trace the longest task, and
the most that was done from one frame to the next; and in another run, which nothing traces, the time on the wall
between frames. CPU times hold on a busy machine too; times on the wall mean something only on an idle one.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from playwright.async_api import Browser, async_playwright

from tests.browser.build import build_page
from tests.browser.chat_page import ChatPage, let_pass, open_chat, open_window
from tests.browser.conftest import CHROMIUM, CHROMIUM_OPTIONS, MODELS, Gateway, running_gateway
from tests.browser.trace import Trace, together, traced
from tests.fakes import FakeEngine
from tests.gateway.gateways import until

STARTS = 5
TOKENS = 10_000
RATES_SECONDS = (2.5, 10, 40)
"""How long an answer takes. Markdown comes at all of these rates, other texts at the first."""
GROUP_SECONDS = 0.01
"""Tokens come in groups, so far apart."""
AFTERWARDS_SECONDS = 2
"""What is done when an answer has ended counts too."""
LONG_FRAME_MILLISECONDS = 100
TEXTS = {
    "Markdown": [
        " word",
        " **bold**",
        " and `code`,",
        " more",
        " words",
        ".\n\n- item",
        " text\n- item\n\n",
        "Text",
    ],
    "one paragraph": [" word", " and", " another", " word"],
    "one code block": ["    x", " =", " f(", "y)", "\n"],
    "one list": ["- item", " **bold**", " and `code`,", " more", " words", "\n"],
    "one table": ["| cell", " **bold**", " | and `code`", " |\n"],
    "one paragraph with markup": [
        " word",
        " **bold**",
        " and `code`,",
        " [link](https://example.org)",
        " $x^2$",
    ],
    "formulas": ["$$\n\\sum_i", " \\frac{x_i}{y_i}", " + x^2\n$$\n\n", "Text $a_i$\n\n"],
}
BEGINNINGS = {"one code block": ["```python\n"], "one table": ["| a | b |\n| - | - |\n"]}
# Marks the time when the message field was there and painted.
WATCH_FIELD = """
new MutationObserver((_, observer) => {
  if (!document.getElementById("message")) return;
  observer.disconnect();
  requestAnimationFrame(() => setTimeout(() => performance.mark("usable")));
}).observe(document, { childList: true, subtree: true });
"""
WATCH_FRAMES = """
window.frames_seen = [];
let last = performance.now();
requestAnimationFrame(function watch(now) {
  window.frames_seen.push(now - last);
  last = now;
  requestAnimationFrame(watch);
});
performance.mark("watched");
"""
UNTIL = """
() => new Promise((resolve) => {
  const timer = setInterval(() => { if (%s) { clearInterval(timer); resolve(); } }, 100);
})
"""
UNTIL_USABLE = UNTIL % "performance.getEntriesByName('usable').length"
# Looking for roles, as tests do, would take longer than what is measured.
UNTIL_ANSWERED = UNTIL % "document.querySelector('.prose > *') && !document.querySelector('.answer.growing')"


async def measure_start(browser: Browser, url: str) -> None:
    """From nothing to a message field that can be written in, and is seen."""
    async with open_window(browser) as window:
        page = await window.new_page()
        await page.add_init_script(WATCH_FIELD)
        async with traced(browser, page) as traces:
            await page.goto(url)
            await page.evaluate(UNTIL_USABLE)
        trace = Trace(traces[0], "usable")
        begin, end = trace.navigation, trace.mark
        start = together(task for task in trace.tasks if begin <= task.begin < end)
        requests, layouts = (trace.count(name, begin, end) for name in ("ResourceSendRequest", "Layout"))
        print(f"start: {start}; {requests} requests, {layouts} layouts", flush=True)


async def measure_answer(browser: Browser, gateway: Gateway, name: str, seconds: float) -> None:
    """What the main thread does for an answer, and the frames that people see."""
    gateway.engine.tokens = (BEGINNINGS.get(name, []) + TEXTS[name] * TOKENS)[:TOKENS]
    print(f"{name}, {TOKENS} tokens in {seconds:g} s", flush=True)
    async with open_chat(browser, gateway.page_url) as chat:
        async with traced(browser, chat.page) as traces:
            await watch_answer(chat, gateway.engine, seconds)
        show("written", Trace(traces[0], "watched"))
        async with traced(browser, chat.page) as traces:
            await watch_opening(chat)
        show("opened", Trace(traces[0], "watched"))
    async with open_chat(browser, gateway.page_url) as chat:
        show_frames("written", await watch_answer(chat, gateway.engine, seconds))
        show_frames("opened", await watch_opening(chat))


async def watch_answer(chat: ChatPage, engine: FakeEngine, seconds: float) -> list[float]:
    """Milliseconds between the frames while an answer streams in within these seconds."""
    engine.may_generate.clear()
    await chat.page.evaluate(WATCH_FRAMES)
    await chat.message.fill("Everything")
    await chat.page.keyboard.press("Enter")
    await until(lambda: engine.running == 1)
    begin = time.monotonic()
    first = engine.tokens_pulled
    while (made := engine.tokens_pulled - first) < TOKENS:
        due = TOKENS * (time.monotonic() - begin) / seconds
        await let_pass(engine, max(0, min(TOKENS, int(due)) - made))
        await asyncio.sleep(GROUP_SECONDS)
    engine.may_generate.set()
    return await frames_until_answered(chat)


async def watch_opening(chat: ChatPage) -> list[float]:
    """Milliseconds between the frames while the chat is opened."""
    await chat.page.add_init_script(WATCH_FRAMES)
    await chat.page.reload()
    return await frames_until_answered(chat)


async def frames_until_answered(chat: ChatPage) -> list[float]:
    await chat.page.evaluate(UNTIL_ANSWERED)
    await asyncio.sleep(AFTERWARDS_SECONDS)
    frames: list[float] = await chat.page.evaluate("window.frames_seen")
    return frames


def show(what: str, trace: Trace) -> None:
    """Print the longest tasks, the longest time between two frames, and all together."""
    tasks = sorted(trace.tasks, key=lambda task: -task.milliseconds)
    print(f"  {what}: CPU: longest tasks {tasks[0]}; {tasks[1]}")
    print(
        f"  {what}: CPU: most between two frames {max(trace.frames(), key=lambda frame: frame.milliseconds)}"
    )
    print(f"  {what}: CPU: all {together(tasks)}", flush=True)


def show_frames(what: str, frames: list[float]) -> None:
    """Print the longest frame, and how many were long."""
    long = sum(frame > LONG_FRAME_MILLISECONDS for frame in frames)
    print(
        f"  {what}: wall: {len(frames)} frames, {long} of more than {LONG_FRAME_MILLISECONDS} ms, "
        f"the longest {max(frames):.0f} ms",
        flush=True,
    )


async def main() -> None:
    """Measure everything."""
    build_page()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        with tempfile.TemporaryDirectory() as data_dir:
            engine = FakeEngine(*(model.key for model in MODELS), max_session_length=2 * TOKENS)
            async with running_gateway(data_dir=Path(data_dir), engine=engine) as gateway:
                for _ in range(STARTS):
                    await measure_start(browser, gateway.page_url)
                for name in sys.argv[1:] or TEXTS:
                    for seconds in RATES_SECONDS if name == "Markdown" else RATES_SECONDS[:1]:
                        await measure_answer(browser, gateway, name, seconds)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
