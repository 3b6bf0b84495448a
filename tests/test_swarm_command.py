"""``petals-chat swarm status`` against a running gateway; tests/swarm/test_survey.py has it against a swarm."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from petals_chat import cli
from petals_chat.engine.interface import ModelState, ModelStatus
from tests.fakes import status_reported, worker_started
from tests.gateway.gateways import Gateway, running_gateway, settings_with

TOKEN_OF_NOBODY = "pcj1.AAAA"


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as gateway:
        report = status_reported((0, 2), (0, 1))
        gateway.engine.statuses["org/model"] = ModelStatus(
            ModelState.BROKEN, missing_blocks=(2, 3), worker=worker_started(), report=report
        )
        yield gateway


async def run(*words: str) -> int:
    return await asyncio.to_thread(cli.main, ["swarm", "status", *words])


async def test_a_gateways_map_is_printed(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(gateway.address) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "Model (org/model)\nbroken, nobody holds blocks 2-3\n4 blocks, 2 servers online, seen"
    )
    assert "0:2     ##.." in printed
    assert "servers per block  2100" in printed
    assert "\x1b" not in printed


async def test_the_json_is_that_of_the_gateway(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(f"http://{gateway.address}/", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    direct = (await gateway.http.get("/api/v1/state")).json()
    for state in (printed, direct):
        for report in state["model_reports"]:
            del report["age_seconds"]
    assert printed == direct


async def test_colours_are_for_terminals(gateway: Gateway) -> None:
    leader, follower = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "petals_chat", "swarm", "status", gateway.address),
        stdout=follower,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert await process.wait() == 0
    os.close(follower)
    printed = os.read(leader, 65536).decode()
    os.close(leader)
    assert "\x1b[31mbroken\x1b[0m, nobody holds" in printed


async def test_the_page_may_be_published_under_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    async with running_gateway(settings_with(server={"root_path": "/chat"})) as gateway:
        assert await run(f"{gateway.address}/chat/") == 0
    assert "ready, no spare server" in capsys.readouterr().out


async def test_who_is_no_gateway_is_named(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"127.0.0.1:{server.getsockname()[1]}"
    for url, code, words in [
        (nobody, 1, "cannot be reached: Connection refused"),
        (f"{gateway.address}/nothing", 1, "tells nothing of a swarm (HTTP 404)"),
        ("ftp://localhost", 2, "is not the address of a page"),
    ]:
        assert await run(url) == code
        printed = capsys.readouterr()
        assert words in printed.err
        assert printed.out == ""


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["dance"],
        ["status", "--peers"],
        ["status", "--peers", "/ip4/nowhere"],
        ["status", "--join", "word"],
        ["status", "--join", TOKEN_OF_NOBODY],
        ["status", "--peers", "/ip4/192.0.2.1/tcp/1/p2p/Qm", "--join", TOKEN_OF_NOBODY],
    ],
)
def test_a_line_that_makes_no_sense_is_refused(
    words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["swarm", *words])
    assert "usage: petals-chat swarm" in capsys.readouterr().err


def test_a_gateway_and_a_swarm_cannot_both_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    peer = "/ip4/192.0.2.1/tcp/1/p2p/12D3KooWHQ73vpdGi26dkTMyf3zarCVW5iN7We6XvyDfDDGk9Mbz"
    assert cli.main(["swarm", "status", "localhost", "--peers", peer]) == 2
    assert "either a gateway" in capsys.readouterr().err


def test_a_gateway_is_asked_without_loading_a_model_library() -> None:
    program = (
        "import sys; from petals_chat import cli; cli.main(['swarm', 'status', 'localhost:1']); "
        "print([name for name in ('torch', 'hivemind', 'petals', 'transformers') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == "[]"
