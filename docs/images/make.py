"""Makes the pictures of the page in this folder, with a real Chromium and a running server.

python docs/images/make.py [URL] [PATH OF CHROMIUM]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, ViewportSize, sync_playwright

FOLDER = Path(__file__).parent
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
SIZES: dict[str, ViewportSize] = {
    "page": {"width": 1100, "height": 760},
    "phone": {"width": 390, "height": 760},
}
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
QUESTION = "How does a swarm run a model?"


def take(browser: Browser, url: str, name: str, scheme: Scheme) -> None:
    """One question, its answer, and a picture of both."""
    page = browser.new_page(viewport=SIZES[name], color_scheme=scheme, device_scale_factor=1)
    page.goto(url)
    message = page.get_by_label("Your message")
    message.fill(QUESTION)
    page.get_by_role("button", name="Send").click()
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="Send").wait_for()  # it has finished
    page.screenshot(path=FOLDER / f"{name}-{scheme}.png")
    page.close()


def main() -> None:
    """Take all pictures."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:5000"
    chromium = sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        for name in SIZES:
            for scheme in SCHEMES:
                take(browser, url, name, scheme)
        browser.close()


if __name__ == "__main__":
    main()
