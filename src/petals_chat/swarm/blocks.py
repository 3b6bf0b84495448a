"""One transformer block as Petals runs it, made of the decoder layer of a family of transformers.

A block takes and returns hidden states; it owns the rotary embedding, builds the causal mask, and converts
between Petals' layout of keys and values and that of transformers. It knows nothing of the network.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from petals_chat.swarm.families import Family, head_size

PetalsKeysValues = tuple[torch.Tensor, torch.Tensor]
"""A layer's keys [batch * kv_heads, head_size, length] and values [batch * kv_heads, length, head_size]."""


def make_block_class(family: Family) -> type[torch.nn.Module]:
    """The block class of ``family``; its parameters have the names of the family's checkpoints."""
    layer_class = family.transformers_class("DecoderLayer")
    rotary_class = family.transformers_class("RotaryEmbedding")

    class Block(layer_class):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, layer_index: int = 0) -> None:
            config._attn_implementation = "sdpa"
            super().__init__(config, layer_index)
            with torch.device("cpu"):  # even where the weights are still to be loaded
                self.rotary_emb = rotary_class(config)
            self.self_attn.num_heads = config.num_attention_heads  # Petals counts the heads
            self.key_value_heads = config.num_key_value_heads
            self.head_size = head_size(config)
            self.window = _sliding_window(self.self_attn, config)

        def forward(
            self,
            hidden_states: torch.Tensor,
            layer_past: PetalsKeysValues | None = None,
            use_cache: bool = False,
        ) -> tuple[torch.Tensor] | tuple[torch.Tensor, PetalsKeysValues]:
            """Compute the positions that follow those of ``layer_past``.

            Args:
                hidden_states: [batch, length, hidden_size]
                layer_past: keys and values of the positions before.
                use_cache: also return the keys and values of all positions, these included.
            """
            past = self._from_petals(layer_past, hidden_states.shape[0])
            past_length = past[0].shape[2] if past else 0
            length = hidden_states.shape[1]
            positions = torch.arange(past_length, past_length + length, device=hidden_states.device)[None]
            cache = _StepCache(past)
            output = super().forward(
                hidden_states,
                attention_mask=_attention_mask(length, past_length, self.window, hidden_states.device),
                position_ids=positions,
                position_embeddings=self.rotary_emb(hidden_states, positions),
                past_key_values=cache,
            )
            return (output, self._to_petals(cache)) if use_cache else (output,)

        def _from_petals(self, layer_past: PetalsKeysValues | None, batch: int) -> PetalsKeysValues | None:
            if layer_past is None or layer_past[0].shape[2] == 0:
                return None
            keys, values = layer_past
            shape = (batch, self.key_value_heads, keys.shape[2], self.head_size)
            return keys.transpose(1, 2).reshape(shape), values.reshape(shape)

        def _to_petals(self, cache: _StepCache) -> PetalsKeysValues:
            assert cache.keys_values is not None
            keys, values = (tensor.flatten(0, 1) for tensor in cache.keys_values)
            return keys.transpose(1, 2), values

    Block.__name__ = Block.__qualname__ = f"Swarm{family.class_prefix}Block"
    assert "past_key_values" in inspect.signature(layer_class.forward).parameters
    return Block


class _StepCache:
    """A transformers ``Cache`` for one call of one layer. Tensors: [batch, kv_heads, length, head_size]."""

    def __init__(self, keys_values: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.keys_values = keys_values

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new keys and values behind the past ones; returns all."""
        if self.keys_values is not None:
            keys = torch.cat([self.keys_values[0], keys], dim=2)
            values = torch.cat([self.keys_values[1], values], dim=2)
        self.keys_values = keys, values
        return keys, values


def _sliding_window(attention: torch.nn.Module, config: Any) -> int | None:
    """How many positions a token sees, itself included; None = all.

    Families whose layers differ keep it in the layer's attention, Mistral in the configuration.
    """
    source = attention if hasattr(attention, "sliding_window") else config
    window: int | None = getattr(source, "sliding_window", None)
    return window


def _attention_mask(
    length: int, past_length: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Which positions each new token sees: [1, 1, length, past_length + length], boolean.

    None where attention is what it is without a mask: causal from the first position on, or a single token
    that sees everything.
    """
    total = past_length + length
    if (length == 1 or past_length == 0) and (window is None or total <= window):
        return None
    queries = torch.arange(past_length, total, device=device)[:, None]
    keys = torch.arange(total, device=device)[None]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    return visible[None, None]
