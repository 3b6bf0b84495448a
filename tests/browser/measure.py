"""Measures the page in a real Chromium: python -m tests.browser.measure

Prints the main thread's time until the page can be used, and the longest time between two frames while 10,000 tokens
stream in as fast as they can: Markdown, one long paragraph, and one long code block.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from playwright.async_api import Browser, Page, async_playwright

from tests.browser.build import build_page
from tests.browser.chat_page import open_chat, open_window
from tests.browser.conftest import CHROMIUM, CHROMIUM_OPTIONS, MODELS, running_gateway
from tests.fakes import FakeEngine

TOKENS = 10_000
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
}
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
"""


async def measure_start(browser: Browser, url: str) -> None:
    """From nothing to a message field that can be written in."""
    async with open_window(browser) as window:
        page = await window.new_page()
        client = await window.new_cdp_session(page)
        await client.send("Performance.enable")
        await page.goto(url)
        await page.get_by_label("Your message").fill("x")
        metrics = await client.send("Performance.getMetrics")
        seconds = {metric["name"]: metric["value"] for metric in metrics["metrics"]}
        paint = await page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
        print(
            f"start: {1000 * seconds['TaskDuration']:.0f} ms of the main thread, of which scripts "
            f"{1000 * seconds['ScriptDuration']:.0f} ms; first paint after {paint:.0f} ms"
        )


async def measure_stream(page: Page, name: str) -> None:
    """The longest frame of one answer that streams in now."""
    await page.evaluate(WATCH_FRAMES)
    await page.get_by_label("Your message").fill("Everything")
    await page.keyboard.press("Enter")
    await page.get_by_role("button", name="Stop", exact=True).wait_for()
    await page.get_by_role("button", name="Regenerate").last.wait_for(timeout=600_000)
    longest, frames = await page.evaluate("[window.longest, window.frames_seen]")
    print(f"{name}: {TOKENS} tokens, {frames} frames, the longest {longest:.0f} ms")


async def main() -> None:
    """Measure everything."""
    build_page()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        with tempfile.TemporaryDirectory() as data_dir:
            engine = FakeEngine(*(model.key for model in MODELS), max_session_length=2 * TOKENS)
            async with running_gateway(data_dir=Path(data_dir), engine=engine) as gateway:
                for _ in range(3):
                    await measure_start(browser, gateway.page_url)
                for name, texts in TEXTS.items():
                    beginning = ["```python\n"] if "code" in name else []
                    gateway.engine.tokens = (beginning + texts * TOKENS)[:TOKENS]
                    async with open_chat(browser, gateway.page_url) as chat:
                        await measure_stream(chat.page, name)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
