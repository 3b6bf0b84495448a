"""The model families that a host can serve, and how each is made known to Petals.

A family is one entry of `FAMILIES`: what its code in transformers does otherwise than Llama's. The generic block
around its decoder layer is in `petals_chat.swarm.blocks`. Reading the registry needs neither torch nor Petals.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from fractions import Fraction
from types import ModuleType
from typing import Any

from petals_chat.errors import ConfigurationError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models in transformers. The defaults are those of layers derived from Llama's.

    Its attention must pass keys and values to a registered attention function, together with arguments that the layer
    does not know; or, if it ``attends_itself``, store them with ``update`` of a transformers ``Cache``.
    """

    model_type: str
    """As in ``config.json``."""
    class_prefix: str
    """What the names of its classes in transformers begin with."""
    package: str | None = None
    """Where transformers has them; None = in the one called as the model type."""
    config_class: str = "Config"
    layer_class: str = "DecoderLayer"
    attention: str = "self_attn"
    """The layer's attribute that is its attention."""
    attends_itself: bool = False
    """Whether its attention computes scores itself, and does not ask for an attention function."""
    cache_argument: str = "past_key_values"
    """The layer's argument that takes the cache."""
    rotary_by_layer_type: bool = False
    """Whether layers of different ``layer_types`` have different rotary embeddings."""
    has_alibi: Callable[[Any], bool] = lambda _: False
    """Whether a model with this configuration has biases on attention scores in place of rotary embeddings."""
    key_value_heads: Callable[[Any], int] = lambda config: int(config.num_key_value_heads)
    """How many different heads of keys, and of values, a layer has."""
    block_prefixes: tuple[str, ...] = ("model.layers",)
    """What the names of the blocks' tensors may begin with; checkpoints of a bare model lack the first part."""
    stored_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What parts of the names of a block's parameters are called in checkpoints, if otherwise."""

    def module(self, kind: str = "modeling") -> ModuleType:
        """The family's module of transformers of that kind, "modeling" or "configuration"."""
        package = self.package or self.model_type
        return importlib.import_module(f"transformers.models.{package}.{kind}_{package}")

    def transformers_class(self, name: str, kind: str = "modeling") -> Any:
        """One of the family's classes, like "DecoderLayer"."""
        return getattr(self.module(kind), self.class_prefix + name)

    def tensor_names(
        self, block_index: int, parameters: Iterable[str], stored: Collection[str]
    ) -> dict[str, str]:
        """The names in a checkpoint of a block's parameters, by parameter.

        Args:
            stored: names of all of the checkpoint's tensors.
        """
        names = {}
        for parameter in parameters:
            name = parameter
            for ours, theirs in self.stored_names.items():
                name = name.replace(ours, theirs)
            candidates = [f"{prefix}.{block_index}.{name}" for prefix in self.block_prefixes]
            names[parameter] = next((name for name in candidates if name in stored), candidates[0])
        return names


def _falcon_key_value_heads(config: Any) -> int:
    if config.multi_query and not config.new_decoder_architecture:  # num_kv_heads does not count then
        return 1
    return int(config.num_kv_heads)


_BIGSCIENCE: dict[str, Any] = {
    "attention": "self_attention",
    "attends_itself": True,
    "cache_argument": "layer_past",
    "block_prefixes": ("transformer.h", "h"),
}
"""What Falcon's code has from BLOOM's."""

FAMILIES = {
    family.model_type: family
    for family in (
        Family(model_type="llama", class_prefix="Llama"),
        Family(model_type="mistral", class_prefix="Mistral"),
        Family(
            model_type="mixtral",
            class_prefix="Mixtral",
            stored_names={"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        ),
        Family(model_type="qwen2", class_prefix="Qwen2"),
        Family(model_type="qwen3", class_prefix="Qwen3"),
        Family(model_type="qwen3_moe", class_prefix="Qwen3Moe"),
        Family(model_type="gemma2", class_prefix="Gemma2"),
        Family(
            model_type="gemma3_text",
            class_prefix="Gemma3",
            package="gemma3",
            config_class="TextConfig",
            rotary_by_layer_type=True,
        ),
        Family(model_type="phi3", class_prefix="Phi3"),
        Family(
            model_type="bloom",
            class_prefix="Bloom",
            layer_class="Block",
            has_alibi=lambda _: True,
            key_value_heads=lambda config: int(config.num_attention_heads),
            **_BIGSCIENCE,
        ),
        Family(
            model_type="falcon",
            class_prefix="Falcon",
            has_alibi=lambda config: bool(config.alibi),
            key_value_heads=_falcon_key_value_heads,
            **_BIGSCIENCE,
        ),
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


def key_value_heads(config: Any) -> int:
    """Heads of keys in a layer of a registered family, and as many of values."""
    family: Family = config.family
    return family.key_value_heads(config)


def register(family: Family) -> None:
    """Make Petals serve ``family`` with our block, in place of its own where it has one."""
    from petals.utils import auto_config

    from petals_chat.swarm.blocks import make_block_class

    config_class = type(
        f"Swarm{family.class_prefix}Config",
        (_SwarmConfig, family.transformers_class(family.config_class, "configuration")),
        {
            "family": family,
            "block_class": make_block_class(family),
            "attn_class": family.transformers_class("Attention"),
        },
    )
    auto_config._CLASS_MAPPING.pop(family.model_type, None)
    auto_config.register_model_classes(config=config_class)


class _SwarmConfig:
    """What Petals reads of a configuration beyond what transformers has."""

    hidden_size: int

    @property
    def num_key_value_groups(self) -> Fraction:
        """Width of a hidden state in units of a layer's keys.

        Petals divides by it to get from hidden states to the size of its attention cache. For most families
        it is the number of query heads that share a key head; with an own ``head_dim`` it may be no integer.
        """
        return Fraction(self.hidden_size, key_value_heads(self) * head_size(self))
