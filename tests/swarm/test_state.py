"""The words for who holds which blocks."""

from __future__ import annotations

import pytest

from petals_chat.protocol.messages import SwarmStatus
from petals_chat.swarm.state import model_report, name_blocks, spare_sentence, swarm_state


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([3], "block 3"),
        ([3, 4, 5], "blocks 3-5"),
        ([9, 3, 4, 7], "blocks 3-4, 7, 9"),
        ([0, 2], "blocks 0, 2"),
    ],
)
def test_blocks_are_named_by_their_ranges(blocks: list[int], words: str) -> None:
    assert name_blocks(blocks) == words


@pytest.mark.parametrize(
    ("block_servers", "sentence"),
    [
        ((), ""),
        ((0, 0, 1), "nobody holds blocks 0-1"),
        ((1, 1, 1), "no spare server"),
        ((2, 2, 2, 1, 1, 1, 2), "no spare server for blocks 3-5"),
        ((2, 2), "2 servers for each block"),
        ((2, 3), "at least 2 servers for each block"),
    ],
)
def test_people_are_told_where_there_is_no_spare_server(
    block_servers: tuple[int, ...], sentence: str
) -> None:
    swarm = SwarmStatus(block_servers=block_servers, seen_at=5.0)
    assert spare_sentence(model_report(swarm, "ready", 7.5, key="model", display_name="Model")) == sentence


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("ready", "healthy"),
        ("full", "healthy"),
        ("broken", "broken"),
        ("loading", "broken"),
        ("unavailable", "broken"),
    ],
)
def test_the_monitors_two_words_are_made_from_ours(status: str, state: str) -> None:
    assert model_report(SwarmStatus(), status, 0.0, key="model", display_name="Model").state == state


def test_an_initial_peer_that_answers_any_model_is_online() -> None:
    swarms = [
        SwarmStatus(initial_peers={"a": False, "b": True}, seen_at=5.0),
        SwarmStatus(initial_peers={"a": True, "c": False}, seen_at=8.0),
        SwarmStatus(),
    ]
    state = swarm_state(swarms, [])
    assert state.bootstrap_states == ["online", "online", "unreachable"]
    assert state.last_updated == 8.0


def test_a_clock_that_was_set_back_gives_no_negative_age() -> None:
    report = model_report(SwarmStatus(seen_at=50.0), "ready", 40.0, key="model", display_name="Model")
    assert report.age_seconds == 0
