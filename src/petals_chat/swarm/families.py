"""The model families that a host can serve, and how each is made known to Petals.

A family is one entry of `FAMILIES`: where transformers keeps its decoder layer. The generic block around that
layer is in `petals_chat.swarm.blocks`. Reading the registry needs neither torch nor Petals.
"""

from __future__ import annotations

import dataclasses
import importlib
from fractions import Fraction
from typing import Any

from petals_chat.errors import ConfigurationError


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """A family of models in transformers.

    Its decoder layer must take ``position_embeddings`` and have a ``self_attn`` that stores keys and values
    with ``past_key_values.update``, as all layers derived from Llama's do.
    """

    model_type: str
    """As in ``config.json``; the module of transformers has the same name."""
    class_prefix: str
    """What the names of its classes in transformers begin with."""
    block_prefix: str = "model.layers"
    """What the names of the blocks' tensors in a checkpoint begin with."""

    def transformers_class(self, kind: str, module: str = "modeling") -> Any:
        """One of the family's classes, like "DecoderLayer"."""
        name = f"transformers.models.{self.model_type}.{module}_{self.model_type}"
        return getattr(importlib.import_module(name), self.class_prefix + kind)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
    )
}


def supported_model_types() -> tuple[str, ...]:
    """The ``model_type`` of every family that a host can serve."""
    return tuple(FAMILIES)


def family_of(model_type: str) -> Family:
    """The family of a checkpoint.

    Raises:
        ConfigurationError: no host can serve it.
    """
    if model_type not in FAMILIES:
        raise ConfigurationError(
            f"a host cannot serve models of type {model_type!r}. Types it can serve: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def head_size(config: Any) -> int:
    """Width of one attention head; families that set it apart from ``hidden_size`` call it ``head_dim``."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def register(family: Family) -> None:
    """Make Petals serve ``family`` with our block, in place of its own where it has one."""
    from petals.utils import auto_config

    from petals_chat.swarm.blocks import make_block_class

    config_class = type(
        f"Swarm{family.class_prefix}Config",
        (_SwarmConfig, family.transformers_class("Config", "configuration")),
        {
            "block_class": make_block_class(family),
            "block_prefix": family.block_prefix,
            "attn_class": family.transformers_class("Attention"),
        },
    )
    auto_config._CLASS_MAPPING.pop(family.model_type, None)
    auto_config.register_model_classes(config=config_class)


class _SwarmConfig:
    """What Petals reads of a configuration beyond what transformers has."""

    hidden_size: int
    num_key_value_heads: int

    @property
    def num_key_value_groups(self) -> Fraction:
        """Width of a hidden state in units of a layer's keys.

        Petals divides by it to get from hidden states to the size of its attention cache. For most families
        it is the number of query heads that share a key head; with an own ``head_dim`` it may be no integer.
        """
        return Fraction(self.hidden_size, self.num_key_value_heads * head_size(self))
