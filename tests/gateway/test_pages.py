"""How the web page's files are served."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from petals_chat.gateway.app import create_app
from petals_chat.gateway.pages import Pages
from tests.asgi_server import running_server
from tests.fakes import FakeEngine
from tests.gateway.gateways import MODEL, settings_with


@pytest.fixture
async def client(tmp_path: Path, root_path: str) -> AsyncIterator[httpx.AsyncClient]:
    (tmp_path / "web" / "assets").mkdir(parents=True)
    (tmp_path / "web" / "index.html").write_text("<!doctype html>")
    (tmp_path / "web" / "assets" / "app.js").write_text("start()")
    (tmp_path / "secret.txt").write_text("secret")
    settings = settings_with(server={"root_path": root_path}, models=(MODEL,))
    app = create_app(settings, FakeEngine(MODEL.key))
    app.router.default = Pages(tmp_path / "web")
    async with (
        running_server(app, settings) as address,
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        yield client


@pytest.fixture
def root_path() -> str:
    return ""


async def test_the_page_and_its_files_are_served_with_strict_headers(client: httpx.AsyncClient) -> None:
    for path, text in (("/", "<!doctype html>"), ("/assets/app.js", "start()")):
        response = await client.get(path)
        assert (response.status_code, response.text) == (200, text)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-cache"


async def test_a_file_that_has_not_changed_is_not_sent_again(client: httpx.AsyncClient) -> None:
    etag = (await client.get("/")).headers["etag"]
    response = await client.get("/", headers={"If-None-Match": etag})
    assert (response.status_code, response.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/no.js", "/../secret.txt", "/%2e%2e/secret.txt", "/assets/..%2f..%2fsecret.txt", "/%00"]
)
async def test_nothing_else_is_served(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert response.json()["code"] == "not_found"


async def test_a_post_to_nowhere_is_not_found(client: httpx.AsyncClient) -> None:
    assert (await client.post("/api/v1/no-such")).status_code == 404


async def test_without_a_built_page_it_is_said_how_to_build_it(tmp_path: Path) -> None:
    settings = settings_with(models=(MODEL,))
    app = create_app(settings, FakeEngine(MODEL.key))
    app.router.default = Pages(tmp_path / "web")
    async with (
        running_server(app, settings) as address,
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        response = await client.get("/")
        assert response.status_code == 503
        assert "make web" in response.text
        assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize("root_path", ["/chat"])
@pytest.mark.parametrize("prefix", ["", "/chat"])
async def test_a_proxy_may_keep_or_remove_the_path_under_which_it_publishes_the_server(
    client: httpx.AsyncClient, prefix: str
) -> None:
    assert (await client.get(f"{prefix}/")).text == "<!doctype html>"
    assert (await client.get(f"{prefix}/assets/app.js")).text == "start()"
    assert (await client.get(f"{prefix}/healthz")).json() == {"ok": True}
    assert "'/chat/openapi.json'" in (await client.get(f"{prefix}/docs")).text


@pytest.mark.parametrize("root_path", ["/chat"])
async def test_the_published_path_without_its_slash_leads_to_the_page(client: httpx.AsyncClient) -> None:
    response = await client.get("/chat", follow_redirects=True)
    assert response.text == "<!doctype html>"
    assert response.url.path == "/chat/"
