"""``petals-chat keys add NAME``: make a key of the APIs, and enter its hash in the configuration file."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from pathlib import Path

from petals_chat.errors import ConfigurationError
from petals_chat.gateway.clients import hash_of
from petals_chat.settings import Settings, find_configuration_file, load_settings
from petals_chat.settings.sources import FILE_NAME

_KEY_BYTES = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, and for whom."""
    parser.add_argument(
        "action", choices=["add"], help="add: make a key, and enter its hash in the configuration file"
    )
    parser.add_argument("name", metavar="NAME", help="whose key it is")
    parser.add_argument(
        "--models", nargs="+", metavar="KEY", help="models that the key may use (default: all)"
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the key alone on standard output; it cannot be shown again."""
    name: str = arguments.name
    if any(key.name == name for key in settings.api.keys):
        raise ConfigurationError(f"api.keys: there is a key of the name {name!r} already")
    served = [model.key for model in settings.models]
    for model in arguments.models or ():
        if model not in served:
            raise ConfigurationError(f"model {model!r} is not served. Models: {', '.join(served)}")
    file = find_configuration_file(arguments.config) or Path(FILE_NAME)
    key = f"sk-{secrets.token_urlsafe(_KEY_BYTES)}"
    _enter(file, _entry(name, key, arguments.models))
    print(key)
    print(f"{file} has its hash. The server knows it after a restart.", file=sys.stderr)
    return 0


def _entry(name: str, key: str, models: list[str] | None) -> str:
    lines = ["[[api.keys]]", f"name = {json.dumps(name, ensure_ascii=False)}", f'hash = "{hash_of(key)}"']
    if models:
        lines.append(f"models = {json.dumps(models, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _enter(file: Path, entry: str) -> None:
    """Put the entry at the end of the file; as it was, if it cannot be used then."""
    before = file.read_text(encoding="utf-8") if file.exists() else None
    separator = "" if not before else "\n" if before.endswith("\n") else "\n\n"
    file.write_text(f"{before or ''}{separator}{entry}", encoding="utf-8")
    try:
        load_settings(file, {})
    except ConfigurationError as error:
        if before is None:
            file.unlink()
        else:
            file.write_text(before, encoding="utf-8")
        raise ConfigurationError(
            f"{file} was left as it was, since the key cannot be added: {error.message}\n"
            f"Where api.keys is a list already, add this to it in your own way:\n\n{entry}"
        ) from None
