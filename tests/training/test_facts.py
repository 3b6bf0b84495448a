"""What the answers of the corpus name exists: commands, options, addresses, files, settings, words of the APIs."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from petals_chat.cli import COMMANDS, _parser
from petals_chat.gateway.app import create_app
from petals_chat.models.bundled import bundled_settings
from petals_chat.settings import EngineSettings, Settings
from petals_chat.settings.wording import schema_of
from tests.fakes import FakeEngine
from training.corpus import load_corpus

ROOT = Path(__file__).parents[2]
SECTIONS = ("server", "limits", "swarm", "engine", "history")
PROJECT_PATH = re.compile(r"(docs|examples|deploy|frontend)/\S*|[A-Z]+\.md|Makefile|LICENSE")
ADDRESS = re.compile(
    r"(?:(?:GET|POST) )?(?:(?:http|ws)://localhost:5000)?(/(?:api|v1|docs|openapi|readyz|healthz|metrics)\S*)"
)


def facts() -> Iterator[tuple[str, str]]:
    """What stands in code marks, and the files that are named without, each with its topic."""
    for entry in load_corpus():
        for code in re.findall(r"`([^`]+)`", entry.answer):
            yield entry.topic, code
        for file in re.findall(r"(?<![`\w/])(?:docs|examples|deploy)/[\w./-]*\w", entry.answer):
            yield entry.topic, file


FACTS = sorted({fact: topic for topic, fact in facts()}.items())


@pytest.mark.parametrize(("fact", "topic"), FACTS, ids=[fact[:40] for fact, _ in FACTS])
def test_what_an_answer_names_exists(fact: str, topic: str) -> None:
    assert exists(fact), f"{fact!r} in the answer to [{topic}]"


@pytest.fixture(autouse=True)
def usual_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)


def test_there_are_facts_of_every_kind() -> None:
    kinds = {exists(fact) for fact, _ in FACTS}
    assert kinds == {"command", "make", "file", "setting", "address", "documented"}


def test_what_does_not_exist_is_noticed() -> None:
    for fact in (
        "petals-chat train", "petals-chat host MODEL --no-such-option", "make coffee", "docs/no-such-file.md",
        "server.no_such_setting", "[no_such_section]", "/api/v1/no_such_address", "no_such_word_at_all",
    ):  # fmt: skip
        assert exists(fact) == "", fact


def exists(fact: str) -> str:
    """What kind of thing it is; empty if there is no such thing."""
    if fact.startswith("petals-chat ") or "| petals-chat " in fact:
        return "command" if is_command(fact[fact.index("petals-chat ") :]) else ""
    if fact.startswith("~"):
        data_dir = EngineSettings().data_dir
        return "setting" if Path(fact).expanduser() in (data_dir, data_dir.parent) else ""
    words = shlex.split(fact) if fact.count('"') % 2 == 0 else fact.split()
    if "make" in words:
        targets = {word for word in words[words.index("make") + 1 :] if "=" not in word}
        return "make" if targets <= make_targets() else ""
    if PROJECT_PATH.fullmatch(fact):
        return "file" if (ROOT / fact).exists() else ""
    if match := ADDRESS.fullmatch(fact):
        return "address" if is_address(match[1].rstrip("/")) else ""
    if match := re.fullmatch(r"\[?([a-z]+)(?:\.([a-z_]+))?\]?(?: = .*)?", fact):
        section, key = match.groups()
        if section in SECTIONS and (key or fact.startswith("[")):
            return "setting" if schema_of((section, key) if key else (section,)) else ""
    # The names in it; numbers and addresses are examples.
    names = re.findall(r"[A-Za-z_~][\w/-]*\w", fact)
    return "documented" if all(name in documentation() for name in names) else ""


def is_command(line: str) -> bool:
    """Whether the command line is understood; words in capitals stand for what people put in."""
    words = shlex.split(line)[1:]
    if words[0] == "COMMAND":
        words[0] = "serve"
    if words[0] not in COMMANDS:
        return words == ["--version"]
    options = {option for action in parser_of(words[0])._actions for option in action.option_strings}
    return {word for word in words[1:] if word.startswith("--")} <= options


@functools.cache
def parser_of(command: str) -> argparse.ArgumentParser:
    for action in _parser([command])._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices[command]
            assert isinstance(parser, argparse.ArgumentParser)
            return parser
    raise AssertionError("the command line has no commands")


@functools.cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@functools.cache
def is_address(path: str) -> bool:
    """Whether the gateway knows the path, or paths below it."""
    app = create_app(Settings(models=(bundled_settings(),)), FakeEngine(bundled_settings().key))
    known = {"/api/v2/generate", *app.openapi()["paths"]}
    if any(address == path or address.startswith(f"{path}/") for address in known):
        return True
    return TestClient(app).get(path).status_code == 200


@functools.cache
def documentation() -> str:
    """README, docs, examples, what deployments are made of, and what the commands say of themselves."""
    folders = ("docs", "examples", "deploy")
    files = [ROOT / "README.md", ROOT / "Makefile", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
    files += [
        file
        for folder in folders
        for file in (ROOT / folder).glob("*")
        if file.is_file() and file.suffix != ".png"
    ]
    files += [ROOT / "src/petals_chat/terminal_chat.py"]
    texts = [file.read_text() for file in files]
    return "\n".join([*texts, *(parser_of(command).format_help() for command in COMMANDS)])
