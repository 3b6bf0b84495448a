"""What the documentation says of `petals-chat host` is so."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from petals_chat.commands import host
from petals_chat.settings import load_settings

ROOT = Path(__file__).parent.parent.parent
TEXTS = [ROOT / "docs" / "private-swarm.md", ROOT / "docs" / "troubleshooting.md", ROOT / "README.md"]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_option_in_the_text_exists(path: Path) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    host.add_arguments(parser)
    text = path.read_text(encoding="utf-8")
    of_host = [line for line in re.findall(r"petals-chat host[^`\n]*", text) if " --" in line]
    if path.name == "private-swarm.md":
        of_host.append(text)
    options = {option for line in of_host for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    assert options
    assert options <= {option for action in parser._actions for option in action.option_strings}


def test_every_configuration_in_the_text_is_valid(tmp_path: Path) -> None:
    examples = re.findall(r"```toml\n(.*?)```", TEXTS[0].read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        (tmp_path / "petals-chat.toml").write_text(example)
        load_settings(tmp_path / "petals-chat.toml", {})


def test_the_text_says_what_is_left_free() -> None:
    from petals_chat.swarm import memory

    text = TEXTS[0].read_text(encoding="utf-8")
    assert f"| {memory.DEFAULT_CACHE_TOKENS}; fewer, down to {memory.SMALLEST_CACHE_TOKENS}," in text
    assert f"{memory.SYSTEM_SHARE:.0%}".replace("%", " %") in text
