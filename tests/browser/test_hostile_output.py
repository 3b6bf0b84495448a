"""What models write is hostile: whatever it is, it is shown, and does nothing."""

from __future__ import annotations

import re

from playwright.async_api import Request, expect

from tests.browser.chat_page import ChatPage
from tests.fakes import FakeEngine

HARM = "window.harmed=1"
PAYLOADS = [
    f"<script>{HARM}</script>",
    f'<img src=x onerror="{HARM}">',
    f"<img src='http://127.0.0.1:9/x.png' onload={HARM}>",
    f"<svg onload={HARM}><circle r=9></svg>",
    f"<svg><script>{HARM}</script></svg>",
    f'<svg><animate onbegin="{HARM}" attributeName=x dur=1s>',
    f"<math><mtext><table><mglyph><style><img src=x onerror={HARM}></style></mglyph></table></mtext></math>",
    f'<iframe src="javascript:{HARM}"></iframe>',
    f'<iframe srcdoc="<script>parent.{HARM}</script>"></iframe>',
    f"<details open ontoggle={HARM}><summary>x</summary></details>",
    f"<body onload={HARM}>",
    f'<a href="javascript:{HARM}">click</a>',
    f"<form action=javascript:{HARM}><button>go</button></form>",
    f"<input autofocus onfocus={HARM}>",
    f"<style>@import 'javascript:{HARM}'; body {{ display: none }}</style>",
    '<div style="position:fixed;inset:0;background:red">over all</div>',
    f'<object data="javascript:{HARM}"></object>',
    f'<meta http-equiv=refresh content="0;url=javascript:{HARM}">',
    '<base href="http://127.0.0.1:9/">',
    '<link rel=stylesheet href="http://127.0.0.1:9/x.css">',
    f"[click](javascript:{HARM})",
    f"[click](JaVaScRiPt:{HARM})",
    f"[click](java&#115;cript:{HARM})",
    f"[click](&#x6A;avascript:{HARM})",
    f"[click](\\x01javascript:{HARM})",
    f"[click](data:text/html,<script>{HARM}</script>)",
    f"[click](vbscript:{HARM})",
    f"<javascript:{HARM}>",
    f'![x](javascript:{HARM} "t")',
    "![x](http://127.0.0.1:9/pixel.png)",
    f'![x" onerror="{HARM}](y)',
    f'[a](https://example.org "\\" onmouseover=\\"{HARM}")',
    f"[a][1]\n\n[1]: javascript:{HARM}",
    f"```<img src=x onerror={HARM}>\n<script>{HARM}</script>\n```",
    f'```"><img src=x onerror={HARM}>\nx\n```',
    f"`<img src=x onerror={HARM}>`",
    f"| <img src=x onerror={HARM}> | b |\n| - | - |\n| [c](javascript:{HARM}) | d |",
    f"- [ ] <img src=x onerror={HARM}>",
    f"$\\href{{javascript:{HARM}}}{{x}}$",
    f"$\\htmlData{{x=y}}{{<img src=x onerror={HARM}>}}$",
    "$\\includegraphics{http://127.0.0.1:9/x.png}$",
    f"$\\text{{<img src=x onerror={HARM}>}}$",
    "$\\htmlStyle{position:fixed}{x}$ and $\\color{red}{x}$ and $\\rule{9999em}{9999em}$",
    "$$\\def\\a{\\a\\a}\\a$$",
    f"# <img src=x onerror={HARM}>",
    f"> <script>{HARM}</script>",
    f"<!-- --><img src=x onerror={HARM}> -->",
    f"<![CDATA[<img src=x onerror={HARM}>]]>",
    f'<noscript><p title="</noscript><img src=x onerror={HARM}>">',
    f"<a id=x tabindex=1 onfocus={HARM}></a>",
    "<form id=app><input name=attributes></form><a name=app>clobbered</a>",
    "\u202eesrever \u0000\ufffe\ud83d",
]


async def test_hostile_answers_do_nothing_while_they_are_streamed_nor_later(
    chat: ChatPage, engine: FakeEngine
) -> None:
    foreign: list[str] = []

    def note(request: Request) -> None:
        if "127.0.0.1:9/" in request.url or not request.url.startswith((chat.page.url.split("#")[0], "ws")):
            foreign.append(request.url)

    chat.page.on("request", note)
    for count, payload in enumerate(("\n\n".join(PAYLOADS[:26]), "\n\n".join(PAYLOADS[26:])), start=1):
        text = payload.encode("utf-8", "replace").decode()
        engine.tokens = [*re.findall(r"(?s).{1,3}", text), "\n\nThe end."]
        await chat.ask(f"<img src=x onerror={HARM}>")
        await expect(chat.answers).to_have_count(count)
        await expect(chat.answers.last).to_contain_text("The end.")
        await expect(chat.send).to_be_visible()
    await chat.page.reload()
    await expect(chat.answers).to_have_count(2)
    await expect(chat.answers.last).to_contain_text("The end.")
    for link in await chat.answers.locator("a").all():
        assert re.match("https?:|mailto:", await link.get_attribute("href") or "https:")
        assert "noopener" in (await link.get_attribute("rel") or "")
        assert await link.get_attribute("target") == "_blank"
    harmful = (
        "script, img, svg, iframe, object, embed, form, style, link, meta, base, body, details, audio, video"
    )
    assert await chat.page.locator(".messages .prose").locator(harmful).count() == 0
    assert await chat.page.locator(".bubble").locator("img").count() == 0
    attributes = await chat.page.evaluate(
        "[...document.querySelectorAll('.prose *')].flatMap((element) => element.getAttributeNames())"
    )
    assert not [
        name for name in attributes if name.startswith("on") or name in ("style", "src", "id", "name")
    ]
    assert await chat.page.evaluate("window.harmed") is None
    assert foreign == []


async def test_the_page_asks_no_other_host_for_anything(chat: ChatPage, engine: FakeEngine) -> None:
    hosts: set[str] = set()
    chat.page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    engine.tokens = ["```python\nprint(1)\n```\n\n", "$x^2$ and ![p](https://example.org/p.png)"]
    await chat.page.reload()
    await chat.ask("Everything?")
    await expect(chat.answers.locator("math")).to_be_visible()
    await expect(chat.answers.locator("[class^=hljs]").first).to_be_visible()
    assert len(hosts) == 1
