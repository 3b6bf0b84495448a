"""Tiny checkpoints, and Petals in this process, for the tests of the swarm; made once in a session."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from petals_chat.swarm import compat
from petals_chat.swarm.host_options import HostReady
from tests.tiny_models import write_tiny_model

AskClient = Callable[..., list[list[int]]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a checkpoint of a kind of `tests.tiny_models.KINDS`, in several shards."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            directory = tmp_path_factory.mktemp("models") / f"tiny {kind}.v1"
            made[kind] = write_tiny_model(directory, kind, max_shard_size="500KB")
        return made[kind]

    return make


@pytest.fixture(scope="session")
def petals() -> None:
    """Petals' server can be imported."""
    compat.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the libraries, at import
        importlib.import_module("petals.server.server")


@pytest.fixture(scope="session")
def ask() -> Iterator[AskClient]:
    """Greedy tokens for each prompt, from a client process of Petals' own parts."""
    client = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.swarm.greedy_client"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    requests, answers = client.stdin, client.stdout
    assert requests is not None
    assert answers is not None

    def ask_client(
        model: Path,
        host: HostReady,
        prompts: list[list[int]],
        chunk: int = 512,
        adapter: str | None = None,
        new_tokens: int = 24,
        request_timeout: float = 5,
    ) -> list[list[int]]:
        request = {
            "model": str(model),
            "peers": host.peers,
            "dht_prefix": host.dht_prefix,
            "prompts": prompts,
            "new_tokens": new_tokens,
            "chunk": chunk,
            "adapter": adapter,
            "request_timeout": request_timeout,
        }
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        reply = json.loads(answers.readline())
        if "error" in reply:
            raise RuntimeError(reply["error"])
        tokens: list[list[int]] = reply["tokens"]
        return tokens

    yield ask_client
    requests.close()
    assert client.wait(30) == 0
    answers.close()
