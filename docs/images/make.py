"""Makes the pictures of the page in this folder, with a real Chromium and a running server.

python docs/images/make.py [URL] [PATH OF CHROMIUM]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

FOLDER = Path(__file__).parent
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
SIZES: dict[str, ViewportSize] = {
    "page": {"width": 1200, "height": 800},
    "phone": {"width": 390, "height": 780},
}
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
QUESTION = "What is Petals Chat?"
TIMEOUT_MILLISECONDS = 120_000
SETTLE_MILLISECONDS = 600
"""For what comes a moment later: colours, formulas, the end of a movement."""


def take(browser: Browser, url: str, size: str, scheme: Scheme) -> None:
    """Pictures of a new chat, a chat with its answer, the settings, the models and the swarm."""
    context = browser.new_context(
        viewport=SIZES[size], color_scheme=scheme, device_scale_factor=1, has_touch=size == "phone"
    )
    context.set_default_timeout(TIMEOUT_MILLISECONDS)
    page = context.new_page()

    def shoot(state: str) -> None:
        page.wait_for_timeout(SETTLE_MILLISECONDS)
        name = "-".join(part for part in (size, state, scheme) if part)
        page.screenshot(path=FOLDER / f"{name}.png")

    page.goto(url)
    page.get_by_role("button", name="Model:").and_(page.locator(":enabled")).wait_for()
    shoot("new")
    _ask(page)
    shoot("")
    for label, state in (("Chat settings", "settings"), ("Model:", "models")):
        page.get_by_role("button", name=label).click()
        shoot(state)
        page.keyboard.press("Escape")
    page.goto(f"{url.rstrip('/')}/#/swarm")
    page.get_by_role("table").first.wait_for()
    shoot("swarm")
    context.close()


def _ask(page: Page) -> None:
    page.get_by_label("Your message").fill(QUESTION)
    page.get_by_role("button", name="Send").click()
    page.get_by_role("button", name="Regenerate").wait_for()  # the answer is complete


def main() -> None:
    """Take all pictures."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:5000"
    chromium = sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        for size in SIZES:
            for scheme in SCHEMES:
                take(browser, url, size, scheme)
        browser.close()


if __name__ == "__main__":
    main()
