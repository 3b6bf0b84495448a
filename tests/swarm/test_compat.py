import ast
import importlib
import importlib.metadata
import logging
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from petals_chat.errors import ConfigurationError
from petals_chat.swarm import compat

pytestmark = pytest.mark.usefixtures("petals")


def names_that_petals_imports(package: str) -> Iterator[tuple[str, str]]:
    """(file, name) for each ``from package import name`` in Petals, without its models and commands."""
    directory = Path(sys.modules["petals"].__path__[0])
    for path in sorted(directory.rglob("*.py")):
        file = path.relative_to(directory)
        if file.parts[0] in ("models", "cli") or file.name == "__init__.py":
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in Petals' strings
            tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == package:
                yield from ((str(file), alias.name) for alias in node.names)


@pytest.mark.parametrize("package", compat.BARE_PACKAGES)
def test_a_bare_package_has_every_name_that_petals_imports_from_it(package: str) -> None:
    names = list(names_that_petals_imports(package))
    assert [name for name in names if not hasattr(sys.modules[package], name[1])] == []


def test_the_names_for_bare_packages_are_those_that_petals_uses() -> None:
    used = {name for package in compat.BARE_PACKAGES for _, name in names_that_petals_imports(package)}
    used |= {"TimedStorage"}  # written as hivemind.TimedStorage, in petals/utils/ping.py
    assert {name for names in compat.PACKAGE_NAMES.values() for name in names} == used


def test_the_libraries_are_those_that_the_overrides_were_written_for() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("petals", "hivemind", "tensor-parallel")}
    assert versions == {"petals": "2.2.0.post1", "hivemind": "1.1.12", "tensor-parallel": "1.0.23"}


@pytest.mark.parametrize(
    ("package", "name"), [("hivemind", "PeerID"), ("transformers.utils", "get_file_from_repo")]
)
def test_what_is_restored_is_still_missing_upstream(package: str, name: str) -> None:
    code = f"import {package}; raise SystemExit(hasattr({package}, {name!r}))"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_petals_imports_neither_transformers_models_nor_bitsandbytes_nor_peft() -> None:
    code = (
        "import sys; from petals_chat.swarm import compat; compat.install(); compat.install(); "
        "import petals.client.inference_session, petals.client.routing.sequence_manager; "
        "print([name for name in ('bitsandbytes', 'peft', 'scipy', 'transformers.modeling_utils')"
        " if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


@pytest.mark.parametrize("version", [None, "2.3.0"])
def test_another_petals_or_none_is_refused_with_the_command_that_helps(
    monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    def find_version(_: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(compat, "_installed", False)
    monkeypatch.setattr(importlib.metadata, "version", find_version)
    with pytest.raises(ConfigurationError, match=r"pip install --no-deps petals==2\.2\.0\.post1"):
        compat.install()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, dtype=torch.bfloat16),
        torch.randn(4, 6).T[1:, ::2],
        torch.tensor(7),
        torch.empty(0, dtype=torch.int64),
        torch.randn(3, requires_grad=True),
    ],
    ids=["bfloat16", "a strided view", "a scalar", "nothing", "with gradient"],
)
def test_a_tensor_crosses_to_another_process_as_it_is(tensor: torch.Tensor) -> None:
    copy = pickle.loads(ForkingPickler.dumps(tensor))
    torch.testing.assert_close(copy, tensor, rtol=0, atol=0)
    assert copy.requires_grad == tensor.requires_grad
    assert not copy.is_shared()


def test_of_what_the_libraries_log_the_warnings_are_let_through() -> None:
    enabled = [
        logging.getLogger(name).getEffectiveLevel() for name in ("petals.server.server", "hivemind.dht")
    ]
    assert enabled == [logging.WARNING, logging.WARNING]


def test_a_logged_exception_is_one_line_without_traceback() -> None:
    record = logging.makeLogRecord({"msg": "%s failed", "args": ("step",), "levelname": "WARNING"})
    try:
        raise ValueError("no room")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert compat.CalmFormatter().format(record) == "warning: step failed ValueError: no room"


def test_what_strangers_write_is_one_plain_line_of_a_log_and_not_long() -> None:
    words = "no \x1b]0;title\x07 such\nerror: block" + "k" * 1000
    record = logging.LogRecord("petals", logging.WARNING, "", 1, "step failed: %s", (words,), None)
    line = compat.CalmFormatter().format(record)
    assert line.startswith("warning: step failed: no  ]0;title  such error: block")
    assert line.isprintable()
    assert len(line) == compat.MAX_LINE_CHARS


def test_what_stops_readers_of_the_dht_is_a_wrong_value() -> None:
    from hivemind.p2p import PeerID
    from petals.data_structures import ServerInfo

    with pytest.raises(ValueError, match="a peer id is a text"):
        PeerID.from_base58(5)
    with pytest.raises(ValueError, match="clients divide"):
        ServerInfo.from_tuple((2, 1.0, {"inference_rps": 0.0}))
    assert ServerInfo.from_tuple((2, 1.0, {"inference_rps": 10.0})).inference_rps == 10.0
