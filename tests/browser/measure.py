"""Measures the page in a real Chromium: python -m tests.browser.measure [NAME OF A TEXT...]

Prints the main thread's CPU time until the page can be used; and its longest tasks, and the most it did from one frame
to the next, while an answer of 10,000 tokens streams in as fast as it can, and when its chat is opened again. CPU times
hold on a busy machine too; the longest time between two frames means something only on an idle one.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from playwright.async_api import Browser, Page, async_playwright

from tests.browser.build import build_page
from tests.browser.chat_page import open_chat, open_window
from tests.browser.conftest import CHROMIUM, CHROMIUM_OPTIONS, MODELS, running_gateway
from tests.browser.trace import Trace, together, traced
from tests.fakes import FakeEngine

STARTS = 5
TOKENS = 10_000
AFTERWARDS_SECONDS = 2
"""What is done when an answer has ended counts too."""
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
window.longest = 0;
window.frames_seen = 0;
let last = performance.now();
requestAnimationFrame(function watch(now) {
  window.longest = Math.max(window.longest, now - last);
  window.frames_seen++;
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
UNTIL_ANSWERED = UNTIL % "document.querySelector('.prose > *') && !document.querySelector('.growing')"


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


async def measure_stream(browser: Browser, page: Page, name: str) -> None:
    """The longest task and the longest frame of one answer that streams in now, and is opened again then."""
    print(f"{name}, {TOKENS} tokens", flush=True)
    async with traced(browser, page) as traces:
        await page.evaluate(WATCH_FRAMES)
        await page.get_by_label("Your message").fill("Everything")
        await page.keyboard.press("Enter")
        await page.evaluate(UNTIL_ANSWERED)
        await asyncio.sleep(AFTERWARDS_SECONDS)
        longest, frames = await page.evaluate("[window.longest, window.frames_seen]")
    show("written", Trace(traces[0], "watched"))
    print(f"  {frames} frames, the longest {longest:.0f} ms of wall time", flush=True)
    async with traced(browser, page) as traces:
        await page.reload()
        await page.evaluate(UNTIL_ANSWERED)
        await page.evaluate(WATCH_FRAMES)
        await asyncio.sleep(AFTERWARDS_SECONDS)
    show("opened", Trace(traces[0], "watched"))


def show(what: str, trace: Trace) -> None:
    """Print the longest tasks, the longest time between two frames, and all together."""
    tasks = sorted(trace.tasks, key=lambda task: -task.milliseconds)
    print(f"  {what}: longest tasks {tasks[0]}; {tasks[1]}")
    print(f"  {what}: most between two frames {max(trace.frames(), key=lambda frame: frame.milliseconds)}")
    print(f"  {what}: all {together(tasks)}", flush=True)


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
                    gateway.engine.tokens = (BEGINNINGS.get(name, []) + TEXTS[name] * TOKENS)[:TOKENS]
                    async with open_chat(browser, gateway.page_url) as chat:
                        await measure_stream(browser, chat.page, name)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
