"""The models' table: which models are switched on, and what the catalog and defaults add to what is written.

It turns ``[models]`` as people write it into the values of one `ModelSettings` for each model. It does not
check the values' types: that is done with those of all other settings.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from petals_chat.models.catalog import CATALOG, aliases_of
from petals_chat.settings.sections import ModelSettings
from petals_chat.settings.sources import KeyPath, Layers, Origin, Table
from petals_chat.settings.wording import expected, show


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong at a path, in a sentence that goes on after the name of the value's origin."""

    path: KeyPath
    sentence: str


def served_models(layers: Layers) -> tuple[list[Table], list[Problem]]:
    """The values for a `ModelSettings` for each model that is switched on, in order; and what is wrong."""
    entries = layers.tree.get("models", {})
    if not isinstance(entries, dict):
        sentence = f"models = {show(entries)}, but it must be {expected(('models',))}"
        return [], [Problem(("models",), sentence)]
    results = [_served_model(key, entry, layers) for key, entry in entries.items() if entry is not False]
    models = [result for result in results if not isinstance(result, Problem)]
    return models, [result for result in results if isinstance(result, Problem)]


def _served_model(key: str, entry: object, layers: Layers) -> Table | Problem:
    path = ("models", key)
    if entry is True and key not in CATALOG:
        return Problem(path, _not_in_catalog(key))
    written: object = {} if entry is True else entry
    if not isinstance(written, dict):
        return Problem(path, f"model {show(key)} = {show(entry)}, but it must be {expected(path)}")
    if "key" in written:
        return Problem((*path, "key"), f"the key of model {show(key)} is its table's name; remove key")
    if "adapter" in written and "repository" not in written and key not in CATALOG:
        sentence = f"model {show(key)} has an adapter, so it needs the repository of the model that it adapts"
        return Problem(path, sentence)

    model = {"repository": key, "name": key.rsplit("/", 1)[-1]} | _merged(CATALOG.get(key, {}), written)
    is_local = False
    for setting in ("repository", "adapter"):
        value, origin = model.get(setting), layers.origin((*path, setting))
        if isinstance(value, str) and origin and (directory := _local_directory(value, origin)):
            model[setting] = str(directory)
            is_local = True
    is_named_after_source = key in CATALOG or key in (model["repository"], model.get("adapter"))
    if "/" in key and not is_local and not is_named_after_source:
        return Problem(path, _foreign_key(key, model))
    return {"key": key, **model}


def grouped_by_family(models: Sequence[ModelSettings]) -> tuple[ModelSettings, ...]:
    """The models family by family, both in the order in which they are written."""
    families = list(dict.fromkeys(model.family for model in models))
    return tuple(sorted(models, key=lambda model: families.index(model.family)))


def duplicate_names(models: Sequence[ModelSettings]) -> list[Problem]:
    """A problem for each name under which more than one model could be asked for."""
    owners: dict[str, str] = {model.key: model.key for model in models}
    problems = []
    for model in models:
        for alias in model.aliases:
            owner = owners.setdefault(alias, model.key)
            if owner != model.key:
                sentence = (
                    f"the alias {show(alias)} of model {show(model.key)} is a name of model {show(owner)}"
                )
                problems.append(Problem(("models", model.key, "aliases"), f"{sentence} too"))
    return problems


def _merged(below: Mapping[str, object], above: Mapping[str, object]) -> Table:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _local_directory(text: str, origin: Origin) -> Path | None:
    """The directory that ``text`` means; None if it is a hub repository, "owner/name" or "name"."""
    directory = origin.absolute(text)
    looks_local = text.startswith(("/", ".", "~")) or text.count("/") > 1
    return directory if looks_local or (text and directory.is_dir()) else None


def _not_in_catalog(key: str) -> str:
    names = {name.lower(): name for name in CATALOG}
    names |= {alias.lower(): name for name, entry in CATALOG.items() for alias in aliases_of(entry)}
    matches = difflib.get_close_matches(key.lower(), names, n=3)
    nearest = dict.fromkeys(names[match] for match in matches)
    advice = f"Did you mean {' or '.join(map(show, nearest))}? " if nearest else ""
    return (
        f"model {show(key)} is not in the catalog, so true is not enough for it. {advice}"
        f"A model of your own is a table: [models.{show(key)}]"
    )


def _foreign_key(key: str, model: Mapping[str, object]) -> str:
    return (
        f"model {show(key)} has the repository {show(model['repository'])}. A key of the form owner/name "
        "must be the name of the model's repository or adapter. If it is the adapter's, add adapter = "
        f"{show(key)}; else choose a key without a slash, or use aliases for other names"
    )
