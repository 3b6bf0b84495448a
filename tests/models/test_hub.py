"""Checkpoints on the hub, with the real client of the hub against a hub on loopback.

Each test runs a process of its own, because the client reads its environment once, when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models.checkpoints import write_checkpoint, write_sharded_checkpoint
from tests.models.fake_hub import FakeHub, running_hub

SHARDED, SINGLE = "team/sharded", "team/single"

# Opens a checkpoint, prints what its headers say, and fetches what the client needs if told to.
SCRIPT = """
import json, sys
from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import client_tensors, open_checkpoint
try:
    checkpoint = open_checkpoint(sys.argv[1], sys.argv[2] or None)
    names = client_tensors(checkpoint.config, checkpoint.tensors).names()
    shapes = {name: checkpoint.tensors[name].shape for name in names}
    files = {name: str(path) for name, path in checkpoint.fetch(names).items()} if sys.argv[3] else {}
    print(json.dumps({"shapes": shapes, "files": files}))
except ConfigurationError as error:
    print(json.dumps({"problem": error.message}))
"""

Open = Callable[..., dict[str, Any]]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    write_sharded_checkpoint(tmp_path / "hub" / SHARDED)
    write_checkpoint(tmp_path / "hub" / SINGLE)
    with running_hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def open_on_hub(hub: FakeHub, tmp_path: Path) -> Open:
    def run(name: str, revision: str = "", *, fetch: bool = False, **environment: str) -> dict[str, Any]:
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, name, revision, "fetch" if fetch else ""],
            env={**os.environ, **hub.environment(tmp_path / "cache"), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        result: dict[str, Any] = json.loads(process.stdout)
        return result

    return run


@pytest.mark.parametrize("name", [SHARDED, SINGLE])
def test_headers_are_read_without_downloading_weights(name: str, hub: FakeHub, open_on_hub: Open) -> None:
    shapes = open_on_hub(name)["shapes"]
    assert shapes["lm_head.weight"] == [32, 8]
    assert not any(file.endswith(".safetensors") for file in hub.downloads)


def test_only_the_shards_that_are_needed_are_downloaded(hub: FakeHub, open_on_hub: Open) -> None:
    files = open_on_hub(SHARDED, fetch=True)["files"]
    assert all(Path(file).is_file() for file in files.values())
    assert sorted(file for file in hub.downloads if file.endswith(".safetensors")) == [
        f"{SHARDED}/model-00001-of-00003.safetensors",
        f"{SHARDED}/model-00003-of-00003.safetensors",
    ]


def test_a_downloaded_model_opens_while_the_hub_is_out_of_reach(hub: FakeHub, open_on_hub: Open) -> None:
    downloaded = open_on_hub(SHARDED, fetch=True)
    assert open_on_hub(SHARDED, fetch=True, HF_ENDPOINT="http://127.0.0.1:9") == downloaded
    assert open_on_hub(SHARDED, fetch=True, HF_HUB_OFFLINE="1") == downloaded


def test_an_unreachable_hub_is_reported(open_on_hub: Open) -> None:
    problem = open_on_hub(SINGLE, HF_ENDPOINT="http://127.0.0.1:9")["problem"]
    assert problem.startswith(f"the hub cannot be reached to read {SINGLE}")


def test_offline_mode_is_reported_like_an_unreachable_hub(open_on_hub: Open) -> None:
    assert "the hub cannot be reached" in open_on_hub(SINGLE, HF_HUB_OFFLINE="1")["problem"]


def test_a_hub_in_trouble_is_reported(hub: FakeHub, open_on_hub: Open) -> None:
    hub.failures[SINGLE] = (503, {})
    assert "HTTP status 503" in open_on_hub(SINGLE)["problem"]


def test_a_gated_model_without_a_token_says_what_to_do(hub: FakeHub, open_on_hub: Open) -> None:
    hub.failures[SINGLE] = (401, {"X-Error-Code": "GatedRepo"})
    problem = open_on_hub(SINGLE)["problem"]
    assert f"accept the licence of {SINGLE} at https://huggingface.co/{SINGLE}" in problem
    assert "huggingface-cli login" in problem
    assert "HF_TOKEN" in problem


def test_a_gated_model_with_a_token_asks_for_the_licence_only(hub: FakeHub, open_on_hub: Open) -> None:
    hub.failures[SINGLE] = (403, {"X-Error-Code": "GatedRepo"})
    problem = open_on_hub(SINGLE, HF_TOKEN="hf_secret")["problem"]
    assert "accept the licence" in problem
    assert "login" not in problem
    assert "hf_secret" not in problem


def test_the_token_of_the_environment_is_used(hub: FakeHub, open_on_hub: Open) -> None:
    open_on_hub(SINGLE, fetch=True, HF_TOKEN="hf_secret")
    assert "Bearer hf_secret" in hub.tokens


def test_the_token_that_a_login_has_left_is_used(hub: FakeHub, open_on_hub: Open, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "token").write_text("hf_left_by_login")
    open_on_hub(SINGLE, fetch=True)
    assert "Bearer hf_left_by_login" in hub.tokens


def test_a_refused_token_is_reported(hub: FakeHub, open_on_hub: Open) -> None:
    hub.failures[SINGLE] = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    assert "refuses" in open_on_hub(SINGLE, HF_TOKEN="hf_wrong")["problem"]


def test_an_unknown_repository_is_reported(open_on_hub: Open) -> None:
    assert "the hub has no repository team/nothing" in open_on_hub("team/nothing")["problem"]


def test_an_unknown_revision_is_reported(open_on_hub: Open) -> None:
    assert f"{SINGLE} has no revision 'v9'" in open_on_hub(SINGLE, "v9")["problem"]


def test_an_impossible_name_is_reported(open_on_hub: Open) -> None:
    assert "neither a directory nor a possible name" in open_on_hub("team//single?")["problem"]


def test_a_shard_that_is_not_on_the_hub_is_reported(hub: FakeHub, open_on_hub: Open) -> None:
    (hub.root / SHARDED / "model-00001-of-00003.safetensors").unlink()
    assert "is not there" in open_on_hub(SHARDED)["problem"]


def test_a_damaged_file_on_the_hub_is_reported(hub: FakeHub, open_on_hub: Open) -> None:
    (hub.root / SINGLE / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"no json!")
    assert SINGLE in open_on_hub(SINGLE)["problem"]
