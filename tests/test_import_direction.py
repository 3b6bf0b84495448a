"""Which part of the program may import what, held by reading every module's imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import petals_chat

SOURCE = Path(petals_chat.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
SWARM_LIBRARIES = {"petals", "hivemind"}
MODEL_LIBRARIES = {"torch", "transformers", "safetensors", "tokenizers", "accelerate", "peft", "bitsandbytes"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that the module imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_in(*parts: str) -> list[Path]:
    return [path for path in MODULES if path.is_relative_to(SOURCE.joinpath(*parts))]


def offences(paths: list[Path], forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(SOURCE)} imports {name}"
        for path in paths
        for name in imports(path)
        if any(name == root or name.startswith(f"{root}.") for root in forbidden)
    ]


def test_the_gateway_and_what_it_shares_import_no_model_or_swarm_library() -> None:
    shared = [SOURCE / "errors.py", SOURCE / "engine" / "interface.py"]
    packages = ("gateway", "history", "protocol", "settings")
    paths = [path for package in packages for path in modules_in(package)] + shared
    assert offences(paths, MODEL_LIBRARIES | SWARM_LIBRARIES) == []


def test_the_gateway_loads_no_model_or_swarm_library_by_way_of_others() -> None:
    names = sorted(MODEL_LIBRARIES | SWARM_LIBRARIES)
    assert loaded_of(names, by="petals_chat.gateway.app, petals_chat.history.history") == "[]"


def test_a_gateway_without_history_loads_no_library_of_databases() -> None:
    names = ["sqlalchemy", "alembic", "aiosqlite", "asyncpg"]
    assert loaded_of(names, by="petals_chat.gateway.app") == "[]"
    assert loaded_of(["alembic", "asyncpg"], by="petals_chat.history.history") == "[]"


def loaded_of(names: list[str], by: str) -> str:
    check = f"import sys, {by}; print([n for n in {names} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_only_the_swarm_package_imports_petals_and_hivemind() -> None:
    others = [path for path in MODULES if path not in modules_in("swarm")]
    assert offences(others, SWARM_LIBRARIES) == []


def test_only_the_settings_read_the_environment() -> None:
    others = [path for path in MODULES if path not in modules_in("settings")]
    assert [str(path.relative_to(SOURCE)) for path in others if reads_the_environment(path)] == []


def reads_the_environment(path: Path) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    set_variables = [
        node.value for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    ]
    return any(
        isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and node not in set_variables
        for node in nodes
    )


@pytest.mark.parametrize(
    "package", ["generation", "protocol", "engine", "head", "history", "swarm", "models", "settings"]
)
def test_nothing_below_the_gateway_imports_it(package: str) -> None:
    assert offences(modules_in(package), {"petals_chat.gateway"}) == []


@pytest.mark.parametrize("path", [*modules_in("generation"), SOURCE / "protocol" / "framing.py"], ids=str)
def test_the_pure_parts_do_no_io(path: Path) -> None:
    assert offences([path], {"asyncio", "time", "socket", "threading"}) == []


@pytest.mark.parametrize("name", ["session_v2.py", "answer_log.py"])
def test_the_v2_protocol_neither_awaits_nor_reads_a_clock(name: str) -> None:
    path = SOURCE / "gateway" / name
    assert offences([path], {"asyncio", "time", "socket", "threading", "starlette", "fastapi"}) == []
    assert not [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.AsyncFunctionDef)
    ]
