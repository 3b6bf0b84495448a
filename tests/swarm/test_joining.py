"""Hosts that join a private swarm with a token: real hosts on loopback."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from petals_chat.swarm.host_options import HostReady
from petals_chat.swarm.join_token import JoinToken, decode_token, encode_token
from tests.models.fake_hub import FakeHub, running_hub
from tests.swarm.conftest import AskClient
from tests.swarm_processes import HostProcess, running_host
from tests.tiny_models import greedy_tokens, load_reference

END_TIMEOUT_SECONDS = 60
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def hub(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_model("qwen3"), root / "owner" / "tiny")
    with running_hub(root) as hub:
        yield hub


@pytest.fixture(scope="module")
def starter(
    hub: FakeHub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[HostProcess, HostReady]]:
    """A host of the first half of a model of the hub."""
    environment = hub.environment(tmp_path_factory.mktemp("cache"))
    host = HostProcess("owner/tiny", "--blocks=0:2", environment=environment)
    try:
        yield host, host.wait_until_ready()
    finally:
        host.release()


def test_the_swarm_says_which_model_it_serves(
    tiny_model: Callable[[str], Path],
    hub: FakeHub,
    starter: tuple[HostProcess, HostReady],
    tmp_path: Path,
    ask: AskClient,
) -> None:
    _, started = starter
    joining = HostProcess(
        None, "--num-blocks=2", join=started.join_token, environment=hub.environment(tmp_path)
    )
    try:
        joined = joining.wait_until_ready()
        assert (joined.start, joined.end, joined.num_blocks) == (2, 4, 4)
        assert joined.dht_prefix == started.dht_prefix == "tiny"
        model = tiny_model("qwen3")
        expected = greedy_tokens(load_reference(model), PROMPT, 24)
        assert ask(model, joined, [PROMPT]) == [expected]
        # The token of the second host names both, so that it is good for as long as one of them is there.
        assert joined.join_token is not None
        assert decode_token(joined.join_token).peers == (*joined.peers, *started.peers)
        joining.send(signal.SIGTERM)
        assert joining.process.wait(END_TIMEOUT_SECONDS) == 0
        assert joining.stderr() == ""
        assert joining.survivors() == []
    finally:
        joining.release()


def test_a_token_of_another_swarm_at_this_address_is_refused(
    starter: tuple[HostProcess, HostReady], hub: FakeHub, tmp_path: Path
) -> None:
    _, started = starter
    assert started.join_token is not None
    token = decode_token(started.join_token)
    other = encode_token(JoinToken(token.name, bytes(8), token.peers))
    error = _refusal(None, other, hub, tmp_path)
    assert error["code"] == "swarm_unreachable"
    assert "does not serve what the join token was made for" in error["message"]


def test_another_model_than_the_swarms_is_refused(
    tiny_model: Callable[[str], Path],
    starter: tuple[HostProcess, HostReady],
    hub: FakeHub,
    tmp_path: Path,
) -> None:
    _, started = starter
    error = _refusal(tiny_model("llama"), str(started.join_token), hub, tmp_path)
    assert error["message"].endswith(
        "is not the model of this swarm: its model_type is 'llama', that of the swarm 'qwen3'"
    )


def test_a_directory_is_not_taken_for_the_swarms_model(
    starter: tuple[HostProcess, HostReady], hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, started = starter
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    error = _refusal(None, str(started.join_token), hub, tmp_path)
    assert "there is a file or directory of this name here" in error["message"]


def test_the_directory_that_a_swarm_was_started_with_must_be_named(
    tiny_model: Callable[[str], Path], hub: FakeHub, tmp_path: Path
) -> None:
    with running_host(tiny_model("llama"), "--blocks=0:1") as started:
        error = _refusal(None, str(started.join_token), hub, tmp_path)
        assert error["message"].startswith(
            "the model of this swarm is a directory on the machine that started it"
        )


def test_a_token_of_hosts_that_are_gone_says_so(hub: FakeHub, tmp_path: Path) -> None:
    peer = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDf3X6jWcvvVjk4FmRsxxjNdjVzKbZBtkpph67men6VX4"
    error = _refusal(None, encode_token(JoinToken("tiny", bytes(8), (peer,))), hub, tmp_path)
    assert error["code"] == "swarm_unreachable"
    assert error["message"].startswith(f"none of the hosts that the join token names can be reached: {peer}")


def _refusal(model: Path | None, token: str, hub: FakeHub, cache: Path) -> dict[str, str]:
    """The error with which a host ends."""
    host = HostProcess(model, join=token, environment=hub.environment(cache))
    try:
        line = host.read_ready_line()
        assert line is not None
        assert host.process.wait(END_TIMEOUT_SECONDS) != 0
        assert host.stderr() == ""  # the parent tells the error
        assert host.survivors() == []
        error: dict[str, str] = line["error"]
        return error
    finally:
        host.release()


def test_a_machine_with_little_memory_serves_what_fits(tiny_model: Callable[[str], Path]) -> None:
    with running_host(tiny_model("llama"), "--memory=1700kB", "--cache-tokens=128") as ready:
        assert (ready.start, ready.end) == (0, 2)


def test_a_host_behind_a_router_names_the_routers_address(
    tiny_model: Callable[[str], Path], ask: AskClient
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    model = tiny_model("llama")
    with running_host(model, "--address=0.0.0.0", f"--port={port}", "--public-ip=127.0.0.2") as ready:
        (address,) = ready.peers
        assert address.startswith(f"/ip4/127.0.0.2/tcp/{port}/p2p/")
        assert decode_token(str(ready.join_token)).peers == (address,)
        assert ask(model, ready, [PROMPT]) == [greedy_tokens(load_reference(model), PROMPT, 24)]


def test_a_killed_host_comes_back_to_the_blocks_that_are_missing(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Although the swarm still has the records of its last life, and of another host that was killed."""
    arguments = ("--num-blocks=2", f"--identity={tmp_path}/host.id")
    first = HostProcess(tiny_model("llama"), *arguments)
    others: list[HostProcess] = []
    try:
        token = first.wait_until_ready().join_token
        for blocks in ("2:4", "0:2"):
            others.append(HostProcess(tiny_model("llama"), f"--blocks={blocks}", join=token))
        second, third = (other.wait_until_ready() for other in others)
        first.send(signal.SIGKILL)
        others[1].send(signal.SIGKILL)
        first.release()
        first = HostProcess(tiny_model("llama"), *arguments, join=second.join_token)
        back = first.wait_until_ready()
        assert (third.start, third.end) == (back.start, back.end) == (0, 2)
    finally:
        for host in (first, *others):
            host.release()


def test_on_a_terminal_the_last_line_says_what_the_host_does(tiny_model: Callable[[str], Path]) -> None:
    ours, theirs = pty.openpty()
    with (
        os.fdopen(ours, "rb", buffering=0) as terminal,
        subprocess.Popen(
            [
                *(sys.executable, "-m", "petals_chat", "host", str(tiny_model("llama"))),
                *("--blocks=0:3", "--address=127.0.0.1", "--dtype=float32"),
            ],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as host,
    ):
        os.close(theirs)
        shown = b""
        while b"cache 0%" not in shown:
            shown += terminal.read(1024)
        host.send_signal(signal.SIGINT)
        assert host.communicate(timeout=END_TIMEOUT_SECONDS)[1] == b""
    lines = shown.decode().split("\r\n")
    assert lines[0].endswith("Loading blocks 0:3 of " + str(tiny_model("llama")) + " (float32 on CPU)")
    assert "Nobody serves blocks 3:4 yet: more machines are needed." in lines
    assert lines[-1].startswith(
        "\r\x1b[Kblocks 0:3 of 4  0 sessions  cache 0%  0.0 tokens/s  nobody serves 3:4"
    )


def test_with_json_there_is_one_line(tiny_model: Callable[[str], Path]) -> None:
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "petals_chat", "host", str(tiny_model("llama"))),
            *("--json", "--address=127.0.0.1", "--dtype=float32"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as host:
        assert host.stdout is not None
        ready = json.loads(host.stdout.readline())
        host.send_signal(signal.SIGINT)
        output, errors = host.communicate(timeout=END_TIMEOUT_SECONDS)
    assert (output, errors, host.returncode) == ("", "", 0)
    assert ready["num_blocks"] == 4
    (address,) = decode_token(ready["join_token"]).peers
    with socket.create_server(("127.0.0.1", int(address.split("/tcp/")[1].split("/")[0]))):
        pass  # the port is free again
