"""`petals-chat keys add`: the key is printed once, and the file has its hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from petals_chat import cli
from petals_chat.gateway.clients import Clients, hash_of
from petals_chat.settings import load_settings


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file of an empty working directory; it does not exist yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PETALS_CHAT_CONFIG", raising=False)
    return tmp_path / "petals-chat.toml"


def test_a_key_is_entered_in_a_new_file_and_works(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "add", 'Ada "the first" 你']) == 0
    key = capsys.readouterr().out.strip()
    assert key not in file.read_text()
    settings = load_settings(file, {})
    assert [(each.name, each.hash) for each in settings.api.keys] == [('Ada "the first" 你', hash_of(key))]
    assert Clients(settings.api, []).owner_of_key(key) == 'key:Ada "the first" 你'
    assert len(key) > 40


def test_what_the_file_has_already_stays(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text('[api]\nrequests_per_minute = 5\n[models]\n"Qwen/Qwen3-8B" = true')
    assert cli.main(["keys", "add", "ada"]) == 0
    assert cli.main(["keys", "add", "bob", "--models", "Qwen/Qwen3-8B"]) == 0
    keys = capsys.readouterr().out.split()
    assert len(set(keys)) == 2
    settings = load_settings(file, {})
    assert [(key.name, key.models) for key in settings.api.keys] == [
        ("ada", None),
        ("bob", ("Qwen/Qwen3-8B",)),
    ]
    assert settings.api.requests_per_minute == 5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["ada"], "there is a key of the name 'ada' already"),
        (["bob", "--models", "no/such"], "model 'no/such' is not served"),
        ([""], "must be"),
    ],
)
def test_a_key_that_cannot_be_added_leaves_the_file_as_it_was(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert cli.main(["keys", "add", "ada"]) == 0
    before = file.read_text()
    assert cli.main(["keys", "add", *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert file.read_text() == before


def test_a_list_of_keys_in_one_line_is_left_to_its_author(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f'[api]\nkeys = [{{name = "ada", hash = "{hash_of("a")}"}}]\n'
    file.write_text(text)
    assert cli.main(["keys", "add", "bob"]) == 2
    assert "add this to it" in capsys.readouterr().err
    assert file.read_text() == text
