"""One transformer block as a host runs it, made of the decoder layer of a family of transformers.

A block computes *batches*: tokens of several sessions side by side, of each as many as it likes. What costs is
reading the weights, and the layer's linear parts read them once for all tokens; only attention is computed for each
session by itself, with its own caches, which are written in place. It knows nothing of the network.

Overrides parts of transformers 5: a function registered as an attention implementation, and for families whose
attention does not ask for one the forward method of their attention. `tests/swarm/test_families.py` compares every
family with transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from petals_chat.errors import ConfigurationError
from petals_chat.swarm.families import Family

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class KeysValues(NamedTuple):
    """A session's caches for one layer, each [rows, kv_heads, room, head_size]."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of one session in a batch."""

    start: int
    """Position of the first one."""
    length: int
    room: int
    """How many positions the session has reserved memory for."""
    rows: int = 1
    """Sequences that the session computes side by side; each has ``length`` tokens here, one row after the other."""

    @property
    def end(self) -> int:
        """The first position after it."""
        return self.start + self.length

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.length


class Batch:
    """Where the tokens of a batch stand. Serves all layers that the batch goes through."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self.pieces = tuple(pieces)
        self.positions = torch.tensor(
            [[n for piece in pieces for _ in range(piece.rows) for n in range(piece.start, piece.end)]],
            device=device,
        )
        """[1, tokens]"""
        self.position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """By type of layer, computed by the first of that type."""

    def slices(self) -> Iterator[tuple[Piece, slice]]:
        """Each piece, and where its tokens are in the batch."""
        first = 0
        for piece in self.pieces:
            yield piece, slice(first, first + piece.tokens)
            first += piece.tokens


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
            config._attn_implementation = _attention_implementation(family, is_eager)
            super().__init__(config, layer_index)
            self.is_eager = is_eager
            self.positions = _Positions() if has_alibi else _Rotary(family, config, layer_index)
            self.alibi = _Alibi(family, config) if has_alibi else None
            if hasattr(self.mlp, "experts"):
                self.mlp.experts = Experts(self.mlp.experts)
            attention = getattr(self, family.attention)
            attention.num_heads = config.num_attention_heads  # Petals counts the heads
            if family.attends_itself:
                attention.forward = functools.partial(_attend_piecewise, attention.forward)
            self.key_value_heads = family.key_value_heads(config)
            self.window = _sliding_window(attention, config)

        def forward(
            self, hidden_states: torch.Tensor, layer_past: None = None, use_cache: bool = False
        ) -> tuple[torch.Tensor | None, ...]:
            """Compute whole sequences without caches, for training and for Petals' measurement of throughput.

            Args:
                hidden_states: [rows, length, hidden_size]

            Returns:
                The same shape; with ``use_cache`` also what Petals passes as ``layer_past`` next time.
            """
            rows, length, _ = hidden_states.shape
            batch = Batch([Piece(0, length, room=length, rows=rows)], hidden_states.device)
            output = self.step(hidden_states.flatten(0, 1)[None], batch, [None])
            output = output.view(hidden_states.shape)
            return (output, None) if use_cache else (output,)

        def step(
            self, hidden_states: torch.Tensor, batch: Batch, caches: Sequence[KeysValues | None]
        ) -> torch.Tensor:
            """Compute the tokens of a batch, and write their keys and values into the caches.

            Args:
                hidden_states: [1, tokens, hidden_size], the pieces of ``batch`` one behind the other.
                caches: of this layer, one for each piece; None = the piece has no past and leaves nothing behind.

            Returns:
                [1, tokens, hidden_size]
            """
            parts = [
                self._part(piece, where, cache, hidden_states)
                for (piece, where), cache in zip(batch.slices(), caches, strict=True)
            ]
            arguments: dict[str, Any] = {"alibi": None} if "alibi" in layer_arguments else {}
            arguments |= self.positions(hidden_states, batch)
            arguments["attention_mask"] = None
            arguments[family.cache_argument if family.attends_itself else "parts"] = parts
            output = super().forward(hidden_states, **arguments)
            outputs: torch.Tensor = output[0] if isinstance(output, tuple) else output  # beside no weights
            return outputs

        def _part(
            self, piece: Piece, where: slice, cache: KeysValues | None, hidden_states: torch.Tensor
        ) -> _Part:
            first = 0 if self.window is None else max(0, piece.start + 1 - self.window)
            mask = self._attention_mask(piece, first, hidden_states)
            alibi = None if self.alibi is None else self.alibi(piece, hidden_states)
            return _Part(piece, where, first, mask, alibi, cache, self.key_value_heads)

        def _attention_mask(
            self, piece: Piece, first: int, hidden_states: torch.Tensor
        ) -> torch.Tensor | None:
            """[1, 1, length, end - first]; boolean for PyTorch's attention, to be added to the scores otherwise."""
            if not self.is_eager and (
                piece.length == 1  # it sees everything from ``first`` on
                or (piece.start == 0 and (self.window is None or piece.end <= self.window))  # causal
            ):
                return None
            visible = _visible(piece, first, self.window, hidden_states.device)
            if not self.is_eager:
                return visible
            mask = torch.zeros_like(visible, dtype=hidden_states.dtype)
            return mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)

    Block.__name__ = Block.__qualname__ = f"Swarm{family.class_prefix}Block"
    return Block


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """What attention must know of a piece in one layer.

    In place of a transformers ``Cache``, it keeps the keys and values of one call where a session has them.
    """

    piece: Piece
    where: slice
    first: int
    """The first position that a token of the piece sees."""
    mask: torch.Tensor | None
    alibi: torch.Tensor | None
    cache: KeysValues | None
    heads: int
    """Of keys, and of values, that differ from each other."""

    def tokens_of(self, states: torch.Tensor) -> torch.Tensor:
        """From [1, tokens of the batch, size] to [rows, length, size]."""
        return states[0, self.where].view(self.piece.rows, self.piece.length, -1)

    def heads_of(self, states: torch.Tensor) -> torch.Tensor:
        """From [1, heads, tokens of the batch, head_size] to [rows, heads, length, head_size]."""
        heads = states.shape[1]
        return states[0, :, self.where].view(heads, self.piece.rows, self.piece.length, -1).transpose(0, 1)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new keys and values [rows, heads, length, head_size] behind the past ones; returns all in sight."""
        if self.cache is None:
            return keys, values
        repeats = keys.shape[1] // self.heads  # Falcon repeats a head for each query head that shares it
        end = self.piece.end
        self.cache.keys[:, :, self.piece.start : end] = keys[:, ::repeats]
        self.cache.values[:, :, self.piece.start : end] = values[:, ::repeats]
        keys, values = (cache[:, :, self.first : end] for cache in self.cache)
        if repeats == 1:
            return keys, values
        return keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)


def _attention_implementation(family: Family, is_eager: bool) -> str:
    """The name under which attention modules of transformers find what computes their scores."""
    if family.attends_itself:
        return "eager" if is_eager else "sdpa"
    attend = family.module().eager_attention_forward if is_eager else ALL_ATTENTION_FUNCTIONS["sdpa"]
    name = f"petals_chat_{family.model_type}"
    ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(_attend, attend))
    return name


def _attend(
    attend: Attention,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    parts: Sequence[_Part],
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers for one session after the other.

    Args:
        attend: the function that computes one.
        query, key, value: [1, heads, tokens, head_size]

    Returns:
        [1, tokens, heads, head_size], and no weights.
    """
    outputs = []
    for part in parts:
        keys, values = part.update(part.heads_of(key), part.heads_of(value))
        output, _ = attend(module, part.heads_of(query), keys, values, part.mask, **arguments)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


def _attend_piecewise(
    attend: Attention,
    *states: torch.Tensor,
    layer_past: Sequence[_Part],
    position_embeddings: Sequence[torch.Tensor] | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """The forward method of an attention of BLOOM's kind for one session after the other.

    It computes scores itself, between linear layers of its own, which therefore read their weights for each session.

    Args:
        attend: the method.
        states: [1, tokens, hidden_size]

    Returns:
        [1, tokens, hidden_size], and no weights.
    """
    outputs = []
    for part in layer_past:
        arguments |= {"layer_past": part, "attention_mask": part.mask, "alibi": part.alibi}
        if position_embeddings is not None:
            arguments["position_embeddings"] = [part.tokens_of(states) for states in position_embeddings]
        output, _ = attend(*(part.tokens_of(state) for state in states), **arguments)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


class _Positions(torch.nn.Module):
    """Of a family whose layers need not be told where tokens stand."""

    def forward(self, hidden_states: torch.Tensor, batch: Batch) -> dict[str, Any]:
        """No arguments."""
        return {}


class _Rotary(_Positions):
    """The family's rotary embedding.

    Raises:
        ConfigurationError: the embedding of a position depends on what was computed before.
    """

    def __init__(self, family: Family, config: Any, layer_index: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # even where the weights are still to be loaded
            self.embedding = family.transformers_class("RotaryEmbedding")(config)
        rope_type = self.embedding.rope_type
        self._layer_type = ""
        if family.rotary_by_layer_type:
            self._layer_type = config.layer_types[layer_index]
            rope_type = rope_type[self._layer_type]
        if rope_type == "dynamic":
            raise ConfigurationError(
                "config.json: the rope type 'dynamic' cannot be served, since it changes the past of a session "
                "with each token"
            )
        self._depends_on_room = rope_type == "longrope"

    def forward(self, hidden_states: torch.Tensor, batch: Batch) -> dict[str, Any]:
        """The layer's arguments for hidden states [1, tokens, hidden_size]."""
        if self._layer_type not in batch.position_embeddings:
            batch.position_embeddings[self._layer_type] = self._embed(hidden_states, batch)
        embeddings = batch.position_embeddings[self._layer_type]
        return {"position_ids": batch.positions, "position_embeddings": embeddings}

    def _embed(self, hidden_states: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each [1, tokens, head_size] or narrower."""
        arguments = {"layer_type": self._layer_type} if self._layer_type else {}
        if not self._depends_on_room:
            cosines, sines = self.embedding(hidden_states, batch.positions, **arguments)
            return cosines, sines
        # Long contexts have other frequencies than short ones, from their first position on. transformers looks
        # for the largest position; a context may grow to its room's last one.
        pieces = []
        for piece, where in batch.slices():
            last = batch.positions.new_full((1, 1), piece.room - 1)
            positions = torch.cat([batch.positions[:, where], last], dim=1)
            pieces.append(self.embedding(hidden_states, positions, **arguments))
        cosines, sines = (
            torch.cat([part[:, :-1] for part in parts], dim=1) for parts in zip(*pieces, strict=True)
        )
        return cosines, sines


class _Alibi(torch.nn.Module):
    """The family's biases on attention scores, which grow with the position of the key."""

    def __init__(self, family: Family, config: Any) -> None:
        super().__init__()
        self._build = family.module().build_alibi_tensor
        self._num_heads = config.num_attention_heads

    def forward(self, piece: Piece, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows * heads, 1, end], of the dtype and device of ``hidden_states``."""
        present = torch.ones(piece.rows, piece.end, dtype=torch.long, device=hidden_states.device)
        biases: torch.Tensor = self._build(present, self._num_heads, hidden_states.dtype)
        return biases


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
            inputs = hidden_states[tokens]
            if len(tokens) == 1 and inputs.dtype is torch.bfloat16:
                inputs = inputs.expand(
                    2, -1
                )  # alone it might get other bits than beside other sessions' tokens
            part = self[index](inputs)[: len(tokens)] * top_k_weights[tokens, ranks, None]
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


def _visible(piece: Piece, first: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which positions from ``first`` on each token of the piece sees: [1, 1, length, end - first], boolean."""
    queries = torch.arange(piece.start, piece.end, device=device)[:, None]
    keys = torch.arange(first, piece.end, device=device)[None]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    return visible[None, None]
