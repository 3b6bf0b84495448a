"""The map of blocks and servers in a terminal."""

from __future__ import annotations

import re
import time
import unicodedata

import pytest

from petals_chat.protocol.messages import SwarmPeer, SwarmStatus
from petals_chat.swarm.block_map import draw
from petals_chat.swarm.state import ModelReport, SwarmState, model_report, swarm_state

PEER_ID = "12D3KooWHQ73vpdGi26dkTMyf3zarCVW5iN7We6XvyDfDDGk"


def server(number: int, start: int, end: int, state: str = "online", **values: object) -> SwarmPeer:
    return SwarmPeer(f"{PEER_ID}{number:04}", start, end, state, **values)  # type: ignore[arg-type]


def report_of(num_blocks: int, *servers: SwarmPeer, status: str = "ready", **names: str) -> ModelReport:
    online = [each for each in servers if each.state == "online"]
    counts = tuple(sum(each.start <= block < each.end for each in online) for block in range(num_blocks))
    now = time.time()
    names = {"key": "org/model", "display_name": "Model", **names}
    return model_report(SwarmStatus(servers, counts, seen_at=now - 3.2), status, now, **names)


def state_of(*reports: ModelReport) -> SwarmState:
    return swarm_state([], reports)


def columns(line: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in line)


def test_a_small_model_is_drawn_block_by_block() -> None:
    alpha = server(
        1,
        0,
        2,
        public_name="alpha",
        ping_seconds=0.0012,
        cache_tokens_left=16384,
        torch_dtype="bfloat16",
        quant_type="nf4",
        using_relay=False,
    )
    beta = server(2, 1, 4, "joining", torch_dtype="float32", quant_type="none", using_relay=True)
    gamma = server(3, 2, 3, "offline")
    drawn = draw(state_of(report_of(4, alpha, beta, gamma, status="broken")), 80, has_colors=False)
    assert (
        drawn
        == """\
Model (org/model)
broken, nobody holds blocks 2-3
4 blocks, 1 server online, seen 3 s ago

  server           blocks  0  3  state    ping   room  precision     link
  ...Gk0001 alpha  0:2     ##..  online   1 ms  16384  bfloat16/nf4  direct
  ...Gk0002        1:4     .+++  joining     -      -  float32       relay
  ...Gk0003        2:3     ..-.  offline     -      -
        servers per block  1100

# online   + loads its blocks   - does not answer, or has left"""
    )


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("num_blocks", [1, 2, 11, 33, 80, 126])
def test_nothing_is_wider_than_the_terminal(width: int, num_blocks: int) -> None:
    servers = [
        server(
            number,
            max(0, number * num_blocks // 12 - 1),
            (number + 1) * num_blocks // 12 + 1,
            ["online", "online", "offline"][number % 3],
            public_name="Ünïcode 服务器 with many words" if number % 2 else None,
            ping_seconds=4.999,
            cache_tokens_left=10**9,
            throughput=12345.678,
            torch_dtype="bfloat16",
            quant_type="int8",
            adapters=("org/adapter",) * 9,
        )
        for number in range(12)
    ]
    report = report_of(num_blocks, *servers, display_name="A model with a long name")
    lines = draw(state_of(report), width, has_colors=False).splitlines()
    assert max(map(columns, lines)) <= width
    table = [line for line in lines if line.startswith("  ")]
    assert len(table) == 1 + len(servers) + 1
    maps = [re.search(r"\d+:\d+ +([#+.-]+)", line) for line in table[1:-1]]
    cells = {len(match[1]) for match in maps if match}
    counts = table[-1].split()[-1]
    assert cells == {len(counts)}
    assert len(counts) == num_blocks or 16 <= len(counts) <= num_blocks


def test_where_many_blocks_share_a_cell_the_rarest_counts() -> None:
    report = report_of(160, server(1, 0, 160), server(2, 0, 159))
    counts = draw(state_of(report), 80, has_colors=False).splitlines()[-3].split()[-1]
    assert counts == "2" * (len(counts) - 1) + "1"


def test_what_strangers_call_themselves_cannot_take_over_the_terminal() -> None:
    evil = "a\x1b[31m\nb\r\u202ec\x07"
    row = server(1, 0, 1, public_name=evil, version=evil, torch_dtype=evil, adapters=(evil,))
    drawn = draw(state_of(report_of(1, row, display_name=evil)), 200, has_colors=False)
    assert not set(drawn) & set("\x1b\r\u202e\x07")
    assert "a[31mbc" in drawn
    assert len(drawn.splitlines()) == 9


def test_colours_change_nothing_but_colours() -> None:
    state = state_of(report_of(3, server(1, 0, 2), server(2, 0, 1, "offline"), status="broken"))
    colored = draw(state, 80, has_colors=True)
    assert "\x1b[31mbroken" in colored
    assert re.sub(r"\x1b\[\d*m", "", colored) == draw(state, 80, has_colors=False)


def test_a_model_of_which_nothing_is_known_has_a_state_alone() -> None:
    report = model_report(SwarmStatus(), "loading", 0.0, key="model", display_name="model")
    assert draw(state_of(report), 80, has_colors=False) == "model\nloading"


def test_a_swarm_without_models_says_so() -> None:
    assert draw(state_of(), 80, has_colors=False) == "The swarm serves no model."
