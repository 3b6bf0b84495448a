"""One transformer block as Petals runs it, made of the decoder layer of a family of transformers.

A block takes and returns hidden states; it tells the layer where its tokens stand and what they see, and
converts between Petals' layout of keys and values and that of transformers. It knows nothing of the network.
"""

from __future__ import annotations

import inspect
from typing import Any, Self

import torch

from petals_chat.errors import ConfigurationError
from petals_chat.swarm.families import Family, head_size


class KeysValues(tuple[torch.Tensor, torch.Tensor]):
    """A layer's keys [batch * kv_heads, head_size, length] and values [batch * kv_heads, length, head_size]."""

    room: int
    """How many positions the session has reserved memory for."""

    @classmethod
    def with_room(cls, keys: torch.Tensor, values: torch.Tensor, room: int) -> Self:
        """Put them together."""
        pair = cls((keys, values))
        pair.room = room
        return pair


def make_block_class(family: Family) -> type[torch.nn.Module]:
    """The block class of ``family``; its parameters have the names of transformers' layer."""
    layer_class = family.transformers_class(family.layer_class)
    layer_arguments = inspect.signature(layer_class.forward).parameters
    assert family.cache_argument in layer_arguments

    class Block(layer_class):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, layer_index: int = 0) -> None:
            has_alibi = family.has_alibi(config)
            # PyTorch's own attention knows neither soft-capping nor biases beside a mask.
            is_eager = has_alibi or getattr(config, "attn_logit_softcapping", None) is not None
            config._attn_implementation = "eager" if is_eager else "sdpa"
            super().__init__(config, layer_index)
            self.is_eager = is_eager
            self.positions = (_Alibi if has_alibi else _Rotary)(family, config, layer_index)
            if hasattr(self.mlp, "experts"):
                self.mlp.experts = Experts(self.mlp.experts)
            attention = getattr(self, family.attention)
            attention.num_heads = config.num_attention_heads  # Petals counts the heads
            self.key_value_heads = family.key_value_heads(config)
            self.head_size = head_size(config)
            self.window = _sliding_window(attention, config)

        def forward(
            self,
            hidden_states: torch.Tensor,
            layer_past: tuple[torch.Tensor, torch.Tensor] | None = None,
            use_cache: bool = False,
        ) -> tuple[torch.Tensor] | tuple[torch.Tensor, KeysValues]:
            """Compute the positions that follow those of ``layer_past``.

            Args:
                hidden_states: [batch, length, hidden_size]
                layer_past: keys and values of the positions before; shapes as in `KeysValues`.
                use_cache: also return the keys and values of all positions, these included.
            """
            past = self._from_petals(layer_past, hidden_states.shape[0])
            start = past[0].shape[2] if past else 0
            end = start + hidden_states.shape[1]
            room = layer_past.room if isinstance(layer_past, KeysValues) else end
            cache = _StepCache(past, self.key_value_heads)
            arguments: dict[str, Any] = {"alibi": None} if "alibi" in layer_arguments else {}
            arguments |= self.positions(hidden_states, start, room)
            arguments["attention_mask"] = self._attention_mask(hidden_states, start, end)
            arguments[family.cache_argument] = cache
            output = super().forward(hidden_states, **arguments)
            if isinstance(output, tuple):  # with attention weights, which are None
                output = output[0]
            return (output, self._to_petals(cache, room)) if use_cache else (output,)

        def _attention_mask(self, hidden_states: torch.Tensor, start: int, end: int) -> torch.Tensor | None:
            """[1, 1, end - start, end]; boolean for PyTorch's attention, to be added to the scores otherwise."""
            if self.is_eager:
                visible = _visible(start, end, self.window, hidden_states.device)
                mask = torch.zeros_like(visible, dtype=hidden_states.dtype)
                return mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
            if (end - start == 1 or start == 0) and (self.window is None or end <= self.window):
                return None  # a single token that sees everything, or causal from the first position on
            return _visible(start, end, self.window, hidden_states.device)

        def _from_petals(
            self, layer_past: tuple[torch.Tensor, torch.Tensor] | None, batch: int
        ) -> tuple[torch.Tensor, torch.Tensor] | None:
            if layer_past is None or layer_past[0].shape[2] == 0:
                return None
            keys, values = layer_past
            shape = (batch, self.key_value_heads, keys.shape[2], self.head_size)
            return keys.transpose(1, 2).reshape(shape), values.reshape(shape)

        def _to_petals(self, cache: _StepCache, room: int) -> KeysValues:
            assert cache.keys_values is not None
            keys, values = (tensor.flatten(0, 1) for tensor in cache.keys_values)
            return KeysValues.with_room(keys.transpose(1, 2), values, room)

    Block.__name__ = Block.__qualname__ = f"Swarm{family.class_prefix}Block"
    return Block


class _StepCache:
    """A transformers ``Cache`` for one call of one layer. Tensors: [batch, kv_heads, length, head_size]."""

    def __init__(self, keys_values: tuple[torch.Tensor, torch.Tensor] | None, heads: int) -> None:
        self.keys_values = keys_values
        self._heads = heads

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new keys and values behind the past ones; returns all."""
        repeats = keys.shape[1] // self._heads  # Falcon repeats a head for each query head that shares it
        keys, values = keys[:, ::repeats], values[:, ::repeats]
        if self.keys_values is not None:
            keys = torch.cat([self.keys_values[0], keys], dim=2)
            values = torch.cat([self.keys_values[1], values], dim=2)
        self.keys_values = keys, values
        if repeats == 1:
            return keys, values
        return keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)


class _Rotary(torch.nn.Module):
    """The family's rotary embedding.

    Raises:
        ConfigurationError: the embedding of a position depends on what was computed before.
    """

    def __init__(self, family: Family, config: Any, layer_index: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # even where the weights are still to be loaded
            self.embedding = family.transformers_class("RotaryEmbedding")(config)
        self._arguments: dict[str, str] = {}
        rope_type = self.embedding.rope_type
        if family.rotary_by_layer_type:
            layer_type = config.layer_types[layer_index]
            self._arguments["layer_type"] = layer_type
            rope_type = rope_type[layer_type]
        if rope_type == "dynamic":
            raise ConfigurationError(
                "config.json: the rope type 'dynamic' cannot be served, since it changes the past of a session "
                "with each token"
            )
        self._depends_on_room = rope_type == "longrope"

    def forward(self, hidden_states: torch.Tensor, start: int, room: int) -> dict[str, Any]:
        """The layer's arguments for hidden states [batch, length, hidden_size] that begin at ``start``."""
        positions = torch.arange(start, start + hidden_states.shape[1], device=hidden_states.device)[None]
        if not self._depends_on_room:
            embeddings = self.embedding(hidden_states, positions, **self._arguments)
        else:
            # Long contexts have other frequencies than short ones, from their first position on. transformers
            # looks for the largest position; this context may grow to its room's last one.
            with_last = torch.cat([positions, positions.new_full((1, 1), room - 1)], dim=1)
            embeddings = tuple(
                part[:, :-1] for part in self.embedding(hidden_states, with_last, **self._arguments)
            )
        return {"position_ids": positions, "position_embeddings": embeddings}


class _Alibi(torch.nn.Module):
    """The family's biases on attention scores, which grow with the position of the key."""

    def __init__(self, family: Family, config: Any, _: int) -> None:
        super().__init__()
        self._build = family.module().build_alibi_tensor
        self._num_heads = config.num_attention_heads

    def forward(self, hidden_states: torch.Tensor, start: int, _: int) -> dict[str, torch.Tensor]:
        """The layer's arguments for hidden states [batch, length, hidden_size] that begin at ``start``."""
        batch, length, _ = hidden_states.shape
        present = torch.ones(batch, start + length, dtype=torch.long, device=hidden_states.device)
        return {"alibi": self._build(present, self._num_heads, hidden_states.dtype)}


class Experts(torch.nn.ModuleList):
    """A mixture's experts as one module each, in place of transformers' tensors that hold all of them.

    They are so in checkpoints: their weights stay memory-mapped, and Petals can quantise them.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__(
            _Expert(fused.hidden_dim, fused.intermediate_dim, fused.act_fn) for _ in range(fused.num_experts)
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of what the chosen experts make of each token.

        Args:
            hidden_states: [tokens, hidden_size]
            top_k_index: [tokens, experts per token], numbers of experts.
            top_k_weights: of the same shape.
        """
        outputs = torch.zeros_like(hidden_states)
        for index in sorted(set(top_k_index.flatten().tolist())):
            tokens, ranks = torch.where(top_k_index == index)
            part = self[index](hidden_states[tokens]) * top_k_weights[tokens, ranks, None]
            outputs.index_add_(0, tokens, part.to(outputs.dtype))
        return outputs


class _Expert(torch.nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, activation: Any) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, bias=False)
        self._activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(
            self._activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        )
        return output


def _sliding_window(attention: torch.nn.Module, config: Any) -> int | None:
    """How many positions a token sees, itself included; None = all.

    Families whose layers differ keep it in the layer's attention, Mistral in the configuration.
    """
    source = attention if hasattr(attention, "sliding_window") else config
    window: int | None = getattr(source, "sliding_window", None)
    return window


def _visible(start: int, end: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which positions each token from ``start`` on sees: [1, 1, end - start, end], boolean."""
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(end, device=device)[None]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    return visible[None, None]
