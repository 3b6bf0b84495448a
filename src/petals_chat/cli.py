"""The command line: parse it, load the settings, run the command.

A command is a module of `petals_chat.commands` with ``add_arguments`` and ``run``; only the one that is used
is imported. What the commands do is not known here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from petals_chat import __version__
from petals_chat.errors import ConfigurationError, PetalsChatError
from petals_chat.settings import Settings, load_settings

COMMANDS = {
    "serve": "serve the page and the APIs",
    "host": "add this machine to a swarm, as a host of a model's blocks",
    "swarm": "show the servers of a swarm, and which blocks they hold",
    "chat": "chat with a server in the terminal",
    "keys": "make keys of the APIs",
    "check": "check the configuration and say what its models need",
}
FAILED, UNUSABLE_CONFIGURATION, INTERRUPTED = 1, 2, 130


class Command(Protocol):
    """A module of `petals_chat.commands`."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own options."""

    def run(self, arguments: argparse.Namespace, settings: Settings) -> int:
        """Do it, and return the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's own, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = _parser(words).parse_args(words)
        arguments.config = arguments.config or arguments.early_config
        settings = load_settings(arguments.config, overrides=_overrides(arguments))
        return _command(arguments.command).run(arguments, settings)
    except KeyboardInterrupt:
        return INTERRUPTED
    except PetalsChatError as error:
        print(f"petals-chat: {error.message}", file=sys.stderr)
        return UNUSABLE_CONFIGURATION if isinstance(error, ConfigurationError) else FAILED


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="petals-chat",
        description="A chat web app and an inference gateway for models served by a Petals swarm.",
        epilog="`petals-chat COMMAND --help` lists the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"petals-chat {__version__}")
    _add_settings_options(parser, "early_")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        if name in words:  # a command's options are needed, and its module imported, only if it is named
            _command(name).add_arguments(subparser)
        if name == "serve":
            subparser.add_argument("--host", help="address to listen on (the setting server.host)")
            subparser.add_argument("--port", help="TCP port; 0 = any free one (the setting server.port)")
        _add_settings_options(subparser)
    return parser


def _add_settings_options(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    # Before and behind the command they have names of their own: argparse would let the later, even if it
    # is absent, replace the earlier.
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--config",
        dest=f"{prefix}config",
        metavar="FILE",
        type=Path,
        help="configuration file; else the one that PETALS_CHAT_CONFIG names, else ./petals-chat.toml",
    )
    group.add_argument(
        "--set",
        dest=f"{prefix}overrides",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="set anything that the configuration file can set; may be repeated",
    )


def _overrides(arguments: argparse.Namespace) -> list[str]:
    overrides = [*arguments.early_overrides, *arguments.overrides]
    if arguments.command == "serve":
        if arguments.host is not None:
            overrides.append(f"server.host={json.dumps(arguments.host)}")
        if arguments.port is not None:
            overrides.append(f"server.port={arguments.port}")
    return overrides


def _command(name: str) -> Command:
    return cast(Command, importlib.import_module(f"petals_chat.commands.{name}"))
