"""The command line: options in any place, exit codes, and what `check` reports."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from petals_chat import __version__, cli
from petals_chat.errors import ModelLoadingError
from petals_chat.settings import Settings
from tests.models.checkpoints import write_checkpoint, write_sharded_checkpoint


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("PETALS_CHAT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def two_models(tmp_path: Path) -> Path:
    """A configuration with two local checkpoints; the second may only be used from the page."""
    write_checkpoint(tmp_path / "one")
    write_sharded_checkpoint(tmp_path / "two")
    file = tmp_path / "petals-chat.toml"
    file.write_text(
        "[swarm]\ninitial_peers = 'public'\n"
        "[models.one]\nname = 'First'\nrepository = './one'\n"
        "[models.two]\nrepository = './two'\npublic_api = false\ninitial_peers = []\n"
    )
    return file


class RecordingCommand(types.ModuleType):
    """Stands in for a command's module, and keeps what it is run with."""

    settings: Settings
    arguments: argparse.Namespace

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--loud", action="store_true")

    def run(self, arguments: argparse.Namespace, settings: Settings) -> int:
        self.arguments, self.settings = arguments, settings
        return 0


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> RecordingCommand:
    command = RecordingCommand("petals_chat.commands.serve")
    monkeypatch.setitem(sys.modules, command.__name__, command)
    return command


def run_check(*words: str) -> dict[str, Any]:
    """Run ``petals-chat check --json`` as a process of its own."""
    process = subprocess.run(
        [sys.executable, "-m", "petals_chat", "check", "--json", *words],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stderr == ""
    report: dict[str, Any] = json.loads(process.stdout)
    assert process.returncode == int(any(model["problem"] for model in report["models"]))
    return report


# Options and exit codes


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"petals-chat {__version__}\n"


def test_the_package_can_be_run_as_a_module() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "petals_chat", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stdout) == (0, f"petals-chat {__version__}\n")


@pytest.mark.parametrize(
    "words", [[], ["dance"], ["check", "--jsn"], ["check", "--config"], ["check", "extra"]]
)
def test_a_line_that_cannot_be_parsed_ends_with_2_and_the_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert "usage: petals-chat" in capsys.readouterr().err


def test_help_names_every_command_without_importing_any() -> None:
    program = """
import sys, petals_chat.cli
try:
    petals_chat.cli.main(["--help"])
finally:
    print(*sys.modules)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    for command in cli.COMMANDS:
        assert f"    {command} " in process.stdout
        assert f"petals_chat.commands.{command}" not in process.stdout


def test_options_of_the_settings_stand_before_or_behind_the_command(
    serve: RecordingCommand, tmp_path: Path
) -> None:
    (tmp_path / "a.toml").write_text("[server]\nroot_path = '/a'")
    words = [
        "--set",
        "server.port=1",
        "--config",
        "a.toml",
        "serve",
        "--loud",
        "--set",
        "limits.max_sessions=2",
    ]
    assert cli.main(words) == 0
    assert serve.arguments.loud
    assert serve.settings.server.root_path == "/a"
    assert (serve.settings.server.port, serve.settings.limits.max_sessions) == (1, 2)
    assert cli.main(["serve", "--config", "a.toml"]) == 0
    assert serve.settings.server.root_path == "/a"


def test_serve_has_short_options_for_the_address(serve: RecordingCommand) -> None:
    assert cli.main(["serve", "--host", "::1", "--port", "0", "--set", "server.port=7"]) == 0
    assert (serve.settings.server.host, serve.settings.server.port) == ("::1", 0)


def test_a_wrong_port_is_reported_as_a_setting(
    serve: RecordingCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--port", "http"]) == 2
    assert capsys.readouterr().err == (
        'petals-chat: command line: server.port = "http", but it must be a whole number from 0 to 65535\n'
    )


def test_a_wrong_configuration_ends_with_2_and_a_message_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "petals-chat.toml").write_text("[server]\nprot = 1")
    assert cli.main(["check"]) == 2
    output = capsys.readouterr()
    assert output.err == (
        "petals-chat: petals-chat.toml: there is no setting server.prot. Did you mean server.port?\n"
    )
    assert output.out == ""


def test_an_error_of_a_command_ends_with_1_and_its_sentence(
    serve: RecordingCommand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise ModelLoadingError("a/b")

    monkeypatch.setattr(serve, "run", fail)
    assert cli.main(["serve"]) == 1
    assert capsys.readouterr().err == "petals-chat: model 'a/b' is still loading. Try again in a moment\n"


@pytest.fixture
def silent_hub() -> Iterator[socket.socket]:
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(30)
        yield listening


def test_ctrl_c_ends_quietly_with_130(silent_hub: socket.socket, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "petals_chat", "check", "--set", 'models."a/b"={}'],
        env={
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{silent_hub.getsockname()[1]}",
            "HF_HOME": str(tmp_path / "cache"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        connection, _ = silent_hub.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, output) == (130, (b"", b""))


# check


def test_check_reports_what_each_model_needs_from_its_headers(two_models: Path) -> None:
    report = run_check()
    assert report["configuration_file"] == "petals-chat.toml"
    first, second = report["models"]
    assert first["requirements"] == {
        "memory_bytes_16_bit": 2 * (2 * 32 * 8 + 8),
        "memory_bytes_32_bit": 4 * (2 * 32 * 8 + 8),
        "tied_head": False,
        "model_type": "llama",
        "num_blocks": 2,
        "hidden_size": 8,
        "vocabulary": 32,
        "dtype": "float16",
    }
    assert (first["initial_peers"], first["public_api"]) == ("public", True)
    assert (second["initial_peers"], second["public_api"]) == ([], False)
    assert second["requirements"] == first["requirements"]


def test_check_goes_on_after_a_model_that_cannot_be_had(two_models: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "model.safetensors").unlink()
    first, second = run_check("--config", str(two_models))["models"]
    assert first["requirements"] is None
    assert "no weights in safetensors" in first["problem"]
    assert second["problem"] is None


def test_check_tells_the_same_to_people(two_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_models.write_text(two_models.read_text() + "[models.three]\nrepository = './three'")
    assert cli.main(["check"]) == 1
    directory = two_models.parent
    assert capsys.readouterr().out == (
        "petals-chat.toml is valid. 3 models:\n"
        "\n"
        "First (one, the default model)\n"
        f"  from        {directory}/one\n"
        "  memory      1.0 KiB in 16 bit, 2.0 KiB in 32 bit (embeddings and head)\n"
        "  checkpoint  llama, 2 blocks, hidden size 8, vocabulary 32, float16\n"
        "  swarm       public\n"
        "\n"
        "two (two)\n"
        f"  from        {directory}/two\n"
        "  memory      1.0 KiB in 16 bit, 2.0 KiB in 32 bit (embeddings and head)\n"
        "  checkpoint  llama, 2 blocks, hidden size 8, vocabulary 32, float16\n"
        "  swarm       private; `petals-chat serve` starts a host with all blocks on this machine\n"
        "  use         only on this server's own page, not through the public APIs\n"
        "\n"
        "three (three)\n"
        f"  from        {directory}/three\n"
        f"  problem     the model directory {directory}/three does not exist\n"
        "  swarm       public\n"
        "\n"
        "Memory for these 2 models together: 2.0 KiB in 16 bit, 4.1 KiB in 32 bit.\n"
        "\n"
        "1 of 3 cannot be served as configured.\n"
    )


def test_check_without_models_says_what_serve_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("There is no configuration file; the settings are valid.")
    assert "will serve the bundled model" in output
