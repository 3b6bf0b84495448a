"""What a swarm says of itself, where anybody can say anything."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from petals_chat.swarm.join_token import JoinToken, encode_token
from petals_chat.swarm.naming import is_peer_id
from tests.swarm.announcer import HONEST_SERVERS, NUM_BLOCKS, peer_id

MAX_SERVERS, MAX_TEXT_CHARS, MAX_ADAPTERS = 512, 100, 16
START_TIMEOUT_SECONDS = 120


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the announcer is reached."""
    announcer = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.swarm.announcer", "model-hf"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert announcer.stdin is not None
    assert announcer.stdout is not None
    try:
        assert select.select([announcer.stdout], [], [], START_TIMEOUT_SECONDS)[0]
        yield announcer.stdout.readline().strip()
        announcer.stdin.close()
        assert announcer.wait(30) == 0
    finally:
        announcer.kill()
        announcer.wait()
        announcer.stdin.close()
        announcer.stdout.close()


def swarm_status(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "petals_chat", "swarm", "status", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "80"},
    )


def test_lies_are_left_out_and_all_sizes_are_bounded(address: str) -> None:
    printed = swarm_status("--peers", address, "--json")
    assert printed.returncode == 0, printed.stderr
    state: dict[str, Any] = json.loads(printed.stdout)
    assert state["bootstrap_states"] == ["online"]
    (report,) = state["model_reports"]
    assert (report["name"], report["dht_prefix"]) == ("org/model", "model-hf")
    assert report["num_blocks"] == NUM_BLOCKS
    rows = report["server_rows"]
    assert len(rows) == MAX_SERVERS < HONEST_SERVERS
    assert report["rarest_block_servers"] >= HONEST_SERVERS - 2
    for row in rows:
        assert is_peer_id(row["peer_id"])
        assert 0 <= row["span"]["start"] < row["span"]["end"] <= NUM_BLOCKS
        assert len(row["public_name"] or "") <= MAX_TEXT_CHARS
        assert len(row["adapters"]) <= MAX_ADAPTERS
        assert all(len(name) <= MAX_TEXT_CHARS for name in row["adapters"])
        assert row["ping_seconds"] is None  # none of them exists
    assert max(Counter(row["peer_id"] for row in rows).values()) == 1
    assert not {peer_id(10_000 + number) for number in (1, 3, 4, 5, 6, 7, 8, 11)} & {
        row["peer_id"] for row in rows
    }


def test_what_strangers_write_does_not_reach_the_terminal_as_it_is(address: str) -> None:
    printed = swarm_status("--peers", address)
    assert printed.returncode == 0, printed.stderr
    assert "\x1b" not in printed.stdout
    assert max(map(len, printed.stdout.splitlines())) <= 80
    assert "org/model" in printed.stdout


def test_a_swarm_that_does_not_answer_is_named() -> None:
    address = f"/ip4/127.0.0.1/tcp/9/p2p/{peer_id(0)}"
    printed = swarm_status("--peers", address)
    assert printed.returncode == 1
    assert printed.stderr == f"petals-chat: no member of the swarm answers at {address}\n"


def test_a_token_of_another_swarm_is_not_believed(address: str) -> None:
    token = encode_token(JoinToken("model-hf", b"12345678", (address,)))
    printed = swarm_status("--join", token)
    assert printed.returncode == 1
    assert "does not serve what the join token was made for" in printed.stderr
