"""The model card: what the checkpoint is, in the README.md beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from training.corpus import Entry

_SHARES = [
    f"{prefix}{area}" for prefix in ("", "third_") for area in ("questions", "off_topic", "small_talk")
]
_TEMPLATE = Path(__file__).with_name("model_card.md")


def write_model_card(
    directory: Path, entries: Sequence[Entry], table: str, figures: Mapping[str, float]
) -> None:
    """Fill in the template from the checkpoint, the corpus and the evaluation."""
    config = json.loads((directory / "config.json").read_text())
    weights = directory / "model.safetensors"
    text = _TEMPLATE.read_text().format(
        parameters=f"{_count_parameters(weights) / 1e6:.1f}",
        megabytes=f"{weights.stat().st_size / 1e6:.1f}",
        blocks=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        entries=len(entries),
        wordings=f"{sum(len(entry.questions) for entry in entries):,}",
        steps=f"{figures['steps']:,}",
        minutes=figures["minutes"],
        cpu_minutes=figures["cpu_minutes"],
        **{name: f"{figures[name]:.0%}" for name in _SHARES},
        shared_5_grams=f"{figures['shared_5_grams']:.0%}",
        table=table,
    )
    (directory / "README.md").write_text(text)


def _count_parameters(weights: Path) -> int:
    with safe_open(weights, framework="np") as tensors:
        names = list(tensors.keys())
        shapes = [tensors.get_slice(name).get_shape() for name in names]
    return sum(math.prod(shape) for shape in shapes)
