from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.swarm.record import SwarmRecord, _decode, record_of

RECORD = SwarmRecord("Qwen/Qwen3-8B", "main", "qwen3", 36, 4096)


def test_the_digest_depends_on_everything() -> None:
    changes: list[dict[str, Any]] = [
        {"model": None},
        {"revision": None},
        {"model_type": "llama"},
        {"num_blocks": 35},
        {"hidden_size": 4097},
    ]
    digests = {msgspec.structs.replace(RECORD, **change).digest for change in changes}
    assert len(digests | {RECORD.digest}) == 6
    assert {len(digest) for digest in digests} == {8}


@pytest.mark.parametrize(
    "hostile",
    [
        {"model": "/etc"},
        {"model": "../../home"},
        {"model": "a/b/c"},
        {"model": "owner/.."},
        {"model": "owner/name\n"},
        {"model": "x" * 300},
        {"model": 7},
        {"revision": "../main"},
        {"revision": ""},
        {"model_type": "llama; rm"},
        {"num_blocks": 0},
        {"num_blocks": 1 << 40},
        {"num_blocks": True},
        {"hidden_size": "4096"},
        {"code": "import os"},
    ],
    ids=str,
)
def test_hostile_values_are_refused(hostile: dict[str, Any]) -> None:
    content = {**msgspec.to_builtins(RECORD), **hostile}
    with pytest.raises(ConfigurationError, match="what the swarm says of its model cannot be used"):
        _decode(msgspec.json.encode(content))


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b"null"])
def test_what_is_no_record_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used"):
        _decode(content)


def test_the_path_of_a_directory_is_not_published(tiny_model: Any) -> None:
    directory: Path = tiny_model("llama")
    record = record_of(open_checkpoint(str(directory)), str(directory), "main")
    assert record == SwarmRecord(None, None, "llama", 4, 128)
    assert str(directory).encode() not in record.encode()


def test_another_model_than_the_swarms_is_refused() -> None:
    RECORD.require_same(msgspec.structs.replace(RECORD, model=None), "./copy")
    with pytest.raises(
        ConfigurationError, match=r"\./copy is not the model of this swarm: its num_blocks is 35"
    ):
        RECORD.require_same(msgspec.structs.replace(RECORD, num_blocks=35), "./copy")
