"""The files of deploy/ with the programs they are for: nginx, systemd, gunicorn; the gateway has a fake engine."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from websockets.asyncio.client import ClientConnection, connect

from petals_chat.gateway.app import create_app
from petals_chat.settings import HistorySettings, ModelSettings, ServerSettings, Settings, load_settings
from tests.asgi_server import running_server
from tests.browser.build import build_page
from tests.fakes import FakeEngine
from tests.gateway.gateways import until

DEPLOY = Path(__file__).parents[1] / "deploy"
DOCUMENT = (DEPLOY.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
SITE = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
MODELS = (
    ModelSettings(key="org/model", repository="org/model", name="Model"),
    ModelSettings(key="org/private", repository="org/private", name="Private", public_api=False),
)
NGINX_CONF = """
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/site.conf;
}}
"""


def create_fake_app() -> FastAPI:
    """What gunicorn serves here."""
    settings = Settings(models=MODELS, history=HistorySettings(enabled=False))
    return create_app(settings, FakeEngine(*(model.key for model in MODELS)))


def program(name: str, *, always_in_ci: bool = True) -> str:
    """The path of a program that is no Python package; without it, the test is skipped, or fails in CI."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found:
        return found
    if always_in_ci and "CI" in os.environ:
        pytest.fail(f"{name} is missing")
    pytest.skip(f"{name} is missing")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@asynccontextmanager
async def running(*command: str | Path, port: int, directory: Path) -> AsyncIterator[Process]:
    """The command, from when it listens on the port until the block's end."""
    log = directory / "output.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=output, stderr=STDOUT)
    try:
        async with asyncio.timeout(30):
            while not await is_open(port):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.05)
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise


async def is_open(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


def uncommented(site: str, first_line: str) -> str:
    """The site with the comment block that has this line first in force, instead of the lines it names."""
    block = re.search(rf"( +# {re.escape(first_line)}\n(?: +# .*\n)*)", site)
    assert block
    return site.replace(block[1], re.sub(r"(?m)^( +)# ", r"\1", block[1]))


def plain_site() -> str:
    return SITE


def site_under_a_path() -> str:
    at_the_root = "    location / {\n        proxy_pass http://127.0.0.1:5000;\n    }\n"
    assert at_the_root in SITE
    return uncommented(SITE.replace(at_the_root, ""), "location /chat/ {")


def site_with_tls(certificate: Path, key: Path) -> str:
    site = uncommented(SITE.replace("    listen 80;\n    listen [::]:80;\n", ""), "listen 443 ssl;")
    site = re.sub(r"(?<=ssl_certificate )\S+(?=;)", str(certificate), site)
    return re.sub(r"(?<=ssl_certificate_key )\S+(?=;)", str(key), site)


def self_signed_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    options = f"-x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout {key} -out {certificate}"
    name = ("-addext", "subjectAltName=DNS:localhost")
    subprocess.run([program("openssl"), "req", *options.split(), *name], check=True, capture_output=True)
    return certificate, key


@dataclass
class Deployment:
    """A gateway behind nginx."""

    url: str
    engine: FakeEngine
    http: httpx.AsyncClient
    tls: ssl.SSLContext | None

    def connect(self, origin: str | None = None) -> connect:
        url = f"ws{self.url.removeprefix('http')}/api/v2/generate"
        return connect(url, ssl=self.tls, origin=origin, compression=None)  # type: ignore[arg-type]


@asynccontextmanager
async def deployment(
    site: str, directory: Path, *, root_path: str = "", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Deployment]:
    nginx, port = program("nginx"), free_port()
    settings = Settings(
        models=MODELS,
        server=ServerSettings(root_path=root_path),
        history=HistorySettings(enabled=False),
    )
    engine = FakeEngine(*(model.key for model in MODELS))
    async with running_server(create_app(settings, engine), settings) as address:
        site = re.sub(r"listen (\[::\]:)?(80|443)\b", f"listen \\g<1>{port}", site)
        site = site.replace("http://127.0.0.1:5000", f"http://{address}")
        site = site.replace("/var/log/nginx/petals-chat.log", str(directory / "access.log"))
        (directory / "site.conf").write_text(site)
        conf = directory / "nginx.conf"
        conf.write_text(NGINX_CONF.format(directory=directory))
        url = f"{'https' if tls else 'http'}://localhost:{port}{root_path}"
        async with (
            running(nginx, "-p", directory, "-c", conf, port=port, directory=directory),
            httpx.AsyncClient(timeout=20, verify=tls or True) as http,
        ):
            yield Deployment(url, engine, http, tls)
    assert engine.sessions == {}
    assert engine.running == 0


async def exchange(connection: ClientConnection, request: dict[str, object]) -> dict[str, object]:
    await connection.send(msgspec.json.encode(request).decode())
    return await receive(connection)


async def receive(connection: ClientConnection) -> dict[str, object]:
    async with asyncio.timeout(20):
        return msgspec.json.decode(await connection.recv(), type=dict[str, object])


def opening(model: str = "org/model") -> dict[str, object]:
    return {"type": "open_inference_session", "model": model, "max_length": 64}


async def assert_everything_works(deployment: Deployment) -> None:
    build_page()
    page = await deployment.http.get(f"{deployment.url}/")
    assert "<title>Petals Chat</title>" in page.text
    scripts = re.findall(r'src="\./(assets/[^"]+\.js)"', page.text)
    assert scripts
    assert (await deployment.http.get(f"{deployment.url}/{scripts[0]}")).status_code == 200
    assert (await deployment.http.get(f"{deployment.url}/healthz")).json() == {"ok": True}
    form = {"inputs": "Hi", "max_new_tokens": 2}
    reply = await deployment.http.post(f"{deployment.url}/api/v1/generate", data=form)
    assert reply.json() == {"ok": True, "outputs": " t0 t1"}
    await assert_tokens_come_one_by_one(deployment)


async def assert_tokens_come_one_by_one(deployment: Deployment) -> None:
    """Each token is received before the next one is made, so nothing on the way waits for more."""
    engine = deployment.engine
    async with deployment.connect() as connection:
        assert await exchange(connection, opening()) == {"ok": True}
        request = {"type": "generate", "inputs": "Hi", "max_new_tokens": 1}
        for number in range(3):
            reply = await exchange(connection, request)
            assert (reply["outputs"], engine.tokens_pulled) == (f" t{number}", number + 3)
        await connection.send('{"type": "generate", "max_new_tokens": 1, "stop_sequence": "never"}')
        assert (await receive(connection))["stop"] is False
    await until(lambda: engine.running == 0 and not engine.sessions)


async def test_the_nginx_site_serves_everything_unbuffered(tmp_path: Path) -> None:
    async with deployment(plain_site(), tmp_path) as site:
        await assert_everything_works(site)


async def test_the_nginx_site_serves_everything_under_a_path(tmp_path: Path) -> None:
    async with deployment(site_under_a_path(), tmp_path, root_path="/chat") as site:
        await assert_everything_works(site)
        without_slash = await site.http.get(site.url)
        assert without_slash.status_code == 301
        assert without_slash.headers["location"] == f"{site.url}/"


async def test_the_nginx_site_serves_everything_with_tls(tmp_path: Path) -> None:
    certificate, key = self_signed_certificate(tmp_path)
    tls = ssl.create_default_context(cafile=certificate)
    async with deployment(site_with_tls(certificate, key), tmp_path, tls=tls) as site:
        await assert_everything_works(site)
        async with site.connect(origin=site.url) as connection:
            assert await exchange(connection, opening("org/private")) == {"ok": True}


async def test_behind_nginx_the_server_knows_its_own_page_from_others(tmp_path: Path) -> None:
    async with deployment(plain_site(), tmp_path) as site:
        async with site.connect(origin=site.url) as connection:
            assert await exchange(connection, opening("org/private")) == {"ok": True}
        async with site.connect(origin="https://elsewhere.example.org") as connection:
            assert (await exchange(connection, opening("org/private")))["code"] == "model_not_public"


async def test_nginx_takes_a_message_of_the_largest_size_allowed_and_no_more(tmp_path: Path) -> None:
    limit = Settings().limits.max_message_bytes
    async with deployment(plain_site(), tmp_path) as site:
        generate = f"{site.url}/api/v1/generate"
        parameters = {"max_new_tokens": "1", "inputs": ""}
        room = limit - len(str(httpx.QueryParams(parameters)))
        largest = await site.http.post(generate, data={**parameters, "inputs": "x" * room})
        assert largest.json()["ok"] is True
        larger = await site.http.post(generate, data={**parameters, "inputs": "x" * (2 * limit)})
        assert larger.status_code == 413


async def test_nginx_does_not_log_what_people_ask(tmp_path: Path) -> None:
    async with deployment(plain_site(), tmp_path) as site:
        query = {"inputs": "a secret", "max_new_tokens": "1"}
        assert (await site.http.post(f"{site.url}/api/v1/generate", params=query)).json()["ok"]
    log = (tmp_path / "access.log").read_text()
    assert '"POST /api/v1/generate" 200' in log
    assert "secret" not in log


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    analyze = program("systemd-analyze", always_in_ci=False)
    unit = tmp_path / "petals-chat.service"
    text = (DEPLOY / "petals-chat.service").read_text(encoding="utf-8")
    assert "/opt/petals-chat/.venv/bin/petals-chat" in text
    unit.write_text(text.replace("/opt/petals-chat/.venv/bin/petals-chat", sys.executable))
    result = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn"])
async def test_the_documented_command_of_the_asgi_server_works(server: str, tmp_path: Path) -> None:
    pytest.importorskip(server, reason=f"{server} is not installed")
    port = free_port()
    line = re.search(rf"^{server} --.*$", DOCUMENT, re.MULTILINE)
    assert line
    command = shlex.split(line[0].replace("petals_chat.asgi:create_app", "tests.test_deploy:create_fake_app"))
    command = [word.replace("5000", str(port)) for word in command]
    async with (
        running(sys.executable, "-m", *command, port=port, directory=tmp_path) as process,
        connect(f"ws://127.0.0.1:{port}/api/v2/generate") as connection,
    ):
        assert connection.protocol.extensions == []  # compressing single tokens would only cost time
        assert await exchange(connection, opening()) == {"ok": True}
        reply = await exchange(connection, {"type": "generate", "inputs": "Hi", "max_new_tokens": 2})
        assert reply["outputs"] == " t0 t1"
        process.terminate()
        async with asyncio.timeout(20):
            await connection.wait_closed()
            assert await process.wait() in (0, -signal.SIGTERM)


async def test_gunicorn_is_told_that_one_worker_is_right() -> None:
    pytest.importorskip("gunicorn", reason="the extra gunicorn is not installed")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--workers", "2"),
        *("-k", "petals_chat.gunicorn_worker.Worker", "tests.test_deploy:create_fake_app()"),
        stdout=PIPE,
        stderr=STDOUT,
    )
    async with asyncio.timeout(30):
        output, _ = await process.communicate()
    assert b"--workers 1" in output
    assert process.returncode != 0


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL))
def test_every_documented_configuration_is_valid(text: str, tmp_path: Path) -> None:
    file = tmp_path / "petals-chat.toml"
    file.write_text(text, encoding="utf-8")
    load_settings(file, environment={})


def test_every_file_of_the_folder_is_documented() -> None:
    for file in DEPLOY.iterdir():
        assert f"deploy/{file.name}" in DOCUMENT or file.suffix == ".dockerignore"


def test_the_image_has_the_same_petals_as_every_installation() -> None:
    makefile = (DEPLOY.parent / "Makefile").read_text(encoding="utf-8")
    pins = {*re.findall(r"petals==\S+", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))}
    assert pins == {*re.findall(r"petals==\S+", makefile)} != set()
