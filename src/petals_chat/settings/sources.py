"""Where values come from: the TOML file, the environment, the command line; each value keeps its origin.

It knows how values are written in each source, not which settings exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

FILE_NAME = "petals-chat.toml"
VARIABLE_PREFIX = "PETALS_CHAT_"
FILE_VARIABLE = "PETALS_CHAT_CONFIG"

Table = dict[str, object]
KeyPath = tuple[str, ...]
"""Where a value stands: ("server", "port"), ("models", "owner/name", "chat", "sep_token"); () = the root."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Who gave a value, in words, and the directory to which paths in it are relative."""

    name: str
    directory: Path

    def absolute(self, text: str) -> Path:
        """The path that ``text`` means; "~" is the home directory, if there is one."""
        with contextlib.suppress(RuntimeError):
            return (self.directory / Path(text).expanduser()).resolve()
        return (self.directory / text).resolve()


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One value, or a whole table of values, at a path."""

    path: KeyPath
    value: object
    origin: Origin


class SourceError(Exception):
    """A source cannot be read; the message says which, and why."""


def find_configuration_file(
    config_path: Path | None, environment: Mapping[str, str] = os.environ
) -> Path | None:
    """The file that is asked for, else the one in the working directory, else None."""
    if config_path is not None:
        return config_path
    if named := environment.get(FILE_VARIABLE):
        return Path(named)
    return Path(FILE_NAME) if Path(FILE_NAME).exists() else None


def read_file(path: Path) -> Assignment:
    """The whole file as one assignment to the root.

    Raises:
        SourceError: it is missing, unreadable or no TOML.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"the configuration file {path} does not exist") from None
    except OSError as error:
        raise SourceError(f"the configuration file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise SourceError(f"{path}: not valid TOML: {error}") from None
    return Assignment((), table, Origin(str(path), path.resolve().parent))


def read_environment(environment: Mapping[str, str]) -> Iterator[Assignment]:
    """One assignment for each variable ``PETALS_CHAT_SECTION__KEY``."""
    directory = Path.cwd()
    for name, text in environment.items():
        if name.startswith(VARIABLE_PREFIX) and name != FILE_VARIABLE:
            path = tuple(name.removeprefix(VARIABLE_PREFIX).lower().split("__"))
            yield Assignment(path, _parse_value(text), Origin(name, directory))


def read_override(text: str) -> Assignment:
    """The assignment in ``section.key=value``.

    Raises:
        SourceError: it is not of this form.
    """
    key, equals, value = text.partition("=")
    path = _parse_key(key)
    if not equals or path is None:
        raise SourceError(
            f"command line: {text!r} is not of the form section.key=value, like server.port=5001"
        )
    return Assignment(path, _parse_value(value.strip()), Origin("command line", Path.cwd()))


class Layers:
    """Assignments laid over each other, the later over the earlier, as one tree of tables."""

    def __init__(self) -> None:
        self.tree: Table = {}
        self._origins: dict[KeyPath, Origin] = {}

    def lay(self, assignments: Iterable[Assignment]) -> None:
        """Put the assignments, in order, over what is there."""
        for assignment in assignments:
            self._set(assignment.path, assignment.value, assignment.origin)

    def origin(self, path: KeyPath) -> Origin | None:
        """Who gave the value at ``path``, or the table around it; None = nobody."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._origins:
                return self._origins[path[:length]]
        return None

    def _set(self, path: KeyPath, value: object, origin: Origin) -> None:
        if isinstance(value, dict):
            self._table(path)
            self._origins[path] = origin
            for key, inner in value.items():
                self._set((*path, key), inner, origin)
            return
        table = self._table(path[:-1])
        if value is True and path[:-1] == ("models",) and isinstance(table.get(path[1]), dict):
            return  # "switched on" takes nothing back from a model that has a table of its own
        table[path[-1]] = value
        self._origins[path] = origin

    def _table(self, path: KeyPath) -> Table:
        table = self.tree
        for key in path:
            inner = table.get(key)
            if not isinstance(inner, dict):
                inner = table[key] = {}
            table = inner
        return table


def _parse_key(text: str) -> KeyPath | None:
    """The parts of a TOML key, which may have dots and quotes; None if it is none."""
    try:
        tree: object = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        return None
    path = []
    while isinstance(tree, dict):
        if len(tree) != 1:
            return None
        [(key, tree)] = tree.items()
        path.append(key)
    return tuple(path)


def _parse_value(text: str) -> object:
    """A TOML value; what is none, and dates, which no setting is, are taken as they are written."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table.pop("value")
    return text if table or isinstance(value, datetime.date | datetime.time) else value
