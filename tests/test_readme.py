"""What the README and the documents tell people to type is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from petals_chat.cli import COMMANDS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKE_TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document: Path) -> None:
    text = document.read_text()
    code = "\n".join(re.findall(r"`[^`\n]+`|^ {4,}.*$|^```\w*\n[\s\S]*?^```", text, re.MULTILINE))
    commands = set(re.findall(r"petals-chat +([a-z]+)(?=[ `\n]|$)", code, re.MULTILINE))
    targets = {
        word
        for arguments in re.findall(r"\bmake ((?:[a-z]+ ?)+)(?=[`\n ]|$)", code)
        for word in arguments.split()
    }
    assert commands <= set(COMMANDS)
    assert targets <= MAKE_TARGETS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", document.read_text()):
        assert (document.parent / target).exists(), target
