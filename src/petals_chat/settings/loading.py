"""From the sources to `Settings`, or to one error that names everything that is wrong.

It knows the order of the sources and how problems are reported; what is valid stands in the types.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from petals_chat.errors import ConfigurationError
from petals_chat.settings.sections import Settings
from petals_chat.settings.served import Problem, duplicate_names, grouped_by_family, served_models
from petals_chat.settings.sources import (
    Assignment,
    KeyPath,
    Layers,
    SourceError,
    Table,
    find_configuration_file,
    read_environment,
    read_file,
    read_override,
)
from petals_chat.settings.wording import dotted, expected, keys_of, known_settings, schema_of, show


def load_settings(
    config_path: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    overrides: Iterable[str] = (),
) -> Settings:
    """Defaults < configuration file < environment < ``overrides``.

    Args:
        config_path: the file; None = the one that PETALS_CHAT_CONFIG names, else petals-chat.toml in the
            working directory, else none.
        environment: PETALS_CHAT_SECTION__KEY=value; other variables are not looked at.
        overrides: "section.key=value", as on the command line.

    Raises:
        ConfigurationError: something cannot be read, or is wrong; the message names all that is.
    """
    layers = Layers()
    unreadable: list[str] = []

    def read_all() -> Iterator[Assignment]:
        file = find_configuration_file(config_path, environment)
        if file is not None:
            try:
                yield read_file(file)
            except SourceError as error:
                unreadable.append(str(error))
        yield from read_environment(environment)
        for text in overrides:
            try:
                yield read_override(text)
            except SourceError as error:
                unreadable.append(str(error))

    layers.lay(read_all())
    settings, problems = _validate(layers)
    lines = unreadable + [_line(problem, layers) for problem in problems]
    if settings is None or lines:
        raise ConfigurationError(_message(lines))
    return settings


def _validate(layers: Layers) -> tuple[Settings | None, list[Problem]]:
    models, problems = served_models(layers)
    values: Table = {**layers.tree, "models": models}
    _resolve_data_dir(values, layers)
    try:
        # With JSON, pydantic is strict as is right for TOML: "1" and true are no numbers, but a list may
        # become a tuple, and a string a path.
        settings = Settings.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        found = [
            _translate(_location(detail["loc"], models), detail["type"], layers.tree)
            for detail in error.errors()
        ]
        # One value can break several alternatives of its type; it is one problem all the same.
        return None, problems + list({problem.path: problem for problem in found}.values())
    problems += duplicate_names(settings.models)
    return settings.model_copy(update={"models": grouped_by_family(settings.models)}), problems


def _resolve_data_dir(values: Table, layers: Layers) -> None:
    engine, origin = values.get("engine"), layers.origin(("engine", "data_dir"))
    if isinstance(engine, dict) and isinstance(engine.get("data_dir"), str) and origin:
        values["engine"] = {**engine, "data_dir": str(origin.absolute(engine["data_dir"]))}


def _location(location: tuple[int | str, ...], models: list[Table]) -> tuple[int | str, ...]:
    """``location`` with a model's key in place of its position."""
    match location:
        case ("models", int(position), *rest):
            return ("models", str(models[position]["key"]), *rest)
    return location


def _translate(location: tuple[int | str, ...], kind: str, tree: Table) -> Problem:
    """The problem that pydantic found at ``location``, told in the words of the configuration.

    Behind the path of the setting, ``location`` goes on into its value, or names an alternative of its type.
    """
    path: KeyPath = ()
    value: object = tree
    for part in location:
        if not isinstance(part, str) or schema_of((*path, part)) is None:
            break
        path = (*path, part)
        value = value.get(part) if isinstance(value, dict) else value
    if kind == "extra_forbidden":
        path = (*path, str(location[-1]))
        return Problem(path, _unknown(path))
    inside = next((part for part in location[len(path) :] if isinstance(part, int)), None)
    if isinstance(value, list) and inside is not None:
        return Problem(path, f"{dotted(path)} has {show(value[inside])}, but it must be {expected(path)}")
    return Problem(path, f"{dotted(path)} = {show(value)}, but it must be {expected(path)}")


def _unknown(path: KeyPath) -> str:
    table, name = path[:-1], path[-1]
    siblings = keys_of(table)
    elsewhere = {dotted(known) for known in known_settings() if known[-1] == name}
    nearest = difflib.get_close_matches(name, siblings, n=1)
    if nearest:
        advice = f"Did you mean {dotted((*table, nearest[0]))}?"
    elif elsewhere:
        advice = f"Did you mean {' or '.join(sorted(elsewhere))}?"
    else:
        advice = f"The {'settings' if table else 'sections'} there are: {', '.join(siblings)}"
    return f"there is no {'setting' if table else 'section'} {dotted(path)}. {advice}"


def _line(problem: Problem, layers: Layers) -> str:
    origin = layers.origin(problem.path)
    return f"{origin.name}: {problem.sentence}" if origin else problem.sentence


def _message(lines: list[str]) -> str:
    if len(lines) == 1:
        return lines[0]
    return f"the configuration has {len(lines)} problems:\n" + "\n".join(f"  - {line}" for line in lines)
