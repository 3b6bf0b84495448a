"""Tiny checkpoints, and Petals in this process, for the tests of the swarm; made once in a session."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from petals_chat.swarm import compat
from tests.tiny_models import write_tiny_model


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
