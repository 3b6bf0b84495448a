"""The documentation says what is: every setting and catalog entry is listed, every example is valid.

``python -m tests.test_documentation`` writes the tables of docs/configuration.md anew.
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from petals_chat.cli import COMMANDS
from petals_chat.models.catalog import CATALOG
from petals_chat.settings import Section, Settings, load_settings
from petals_chat.settings.wording import dotted, expected, keys_of, schema_of, show, table_of

ROOT = Path(__file__).parent.parent
CONFIGURATION = ROOT / "docs" / "configuration.md"
EXAMPLE = ROOT / "examples" / "petals-chat.toml"
NO_FILE = Path(os.devnull)
MODEL = ("models", "owner/name")
TABLES = [
    ("server",),
    ("limits",),
    ("api",),
    ("api", "keys"),
    ("swarm",),
    ("engine",),
    ("history",),
    MODEL,
    (*MODEL, "chat"),
    (*MODEL, "chat", "generation"),
]


def settings_table(section: tuple[str, ...]) -> str:
    """A Markdown table of a section's settings, from their types."""
    rows = ["| Setting | Default | It may be | Meaning |", "| --- | --- | --- | --- |"]
    for key in keys_of(section):
        schema = schema_of((*section, key))
        assert schema is not None
        if schema.get("type") != "object":
            cells = (f"`{key}`", default_of(section, key), expected((*section, key)), meaning(section, key))
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def default_of(section: tuple[str, ...], key: str) -> str:
    default = table_of(section)["properties"][key].get("default")
    return "unset" if default is None else f"`{show(default)}`"


def meaning(section: tuple[str, ...], key: str) -> str:
    return (
        str(table_of(section)["properties"][key].get("description", "")).replace("``", "`").replace("\n", " ")
    )


def catalog_table() -> str:
    """A Markdown table of the catalog, with what distinguishes the entries."""
    settings = load_settings(NO_FILE, {}, overrides=[f'models."{key}"=true' for key in CATALOG])
    rows = ["| Key | Name | Family | Session length | Notes |", "| --- | --- | --- | --- | --- |"]
    for model in settings.models:
        notes = [f"also `{alias}`" for alias in model.aliases]
        if model.adapter:
            notes.append(f"adapter on `{model.repository}`")
        if not model.public_api:
            notes.append("`public_api = false`")
        rows.append(
            f"| [`{model.key}`]({model.model_card}) | {model.name} | {model.family} "
            f"| {model.chat.max_session_length} | {', '.join(notes)} |"
        )
    return "\n".join(rows)


def generated() -> Iterator[tuple[str, str]]:
    """The name and the content of each table of docs/configuration.md."""
    for section in TABLES:
        yield f"settings of {dotted(section)}", settings_table(section)
    yield "catalog", catalog_table()


def with_tables(text: str) -> str:
    """``text`` with each table between its markers, ``<!-- table: NAME -->`` and ``<!-- end -->``, anew."""
    for name, table in generated():
        before, start, rest = text.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert end, f"docs/configuration.md has no place for the table {name!r}"
        text = f"{before}{start}\n{table}\n\n{end}{after}"
    return text


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    yield kind
    for field in kind.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Section):
                yield from sections(part)


def test_the_tables_of_settings_and_catalog_are_up_to_date() -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert text == with_tables(text), "run: python -m tests.test_documentation"


def test_there_is_a_table_for_each_section() -> None:
    assert len(TABLES) == len(list(sections(Settings))) - 1


@pytest.mark.parametrize("section", TABLES, ids=dotted)
def test_every_setting_has_a_meaning(section: tuple[str, ...]) -> None:
    described = {key for key in keys_of(section) if meaning(section, key)}
    assert set(keys_of(section)) - described <= {"chat"}  # a table of its own


def test_every_example_in_the_text_is_valid(tmp_path: Path) -> None:
    examples = re.findall(r"```toml\n(.*?)```", CONFIGURATION.read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    for example in examples:
        (tmp_path / "petals-chat.toml").write_text(example)
        load_settings(tmp_path / "petals-chat.toml", {})


def test_every_variable_and_override_in_the_text_is_valid() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", CONFIGURATION.read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    environment = dict(words[0].split("=", 1) for words in lines if words[0].startswith("PETALS_CHAT_"))
    overrides = [after for words in lines for word, after in pairwise(words) if word == "--set"]
    assert environment
    assert overrides
    load_settings(NO_FILE, environment, overrides)


def test_the_example_file_is_valid() -> None:
    settings = load_settings(EXAMPLE, {})
    assert settings.models


def test_the_lines_that_the_example_file_leaves_out_are_valid_too(tmp_path: Path) -> None:
    """They begin with "#" and no space."""
    text = re.sub(r"^#(?=\S)", "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (tmp_path / "petals-chat.toml").write_text(text, encoding="utf-8")
    settings = load_settings(tmp_path / "petals-chat.toml", {})
    written = tomllib.loads(text)
    assert set(written) == set(Settings.model_fields)
    assert len(settings.models) == len(written["models"])


def test_the_commands_are_named() -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert [command for command in COMMANDS if f"petals-chat {command}" not in text] == []


if __name__ == "__main__":
    CONFIGURATION.write_text(with_tables(CONFIGURATION.read_text(encoding="utf-8")), encoding="utf-8")
