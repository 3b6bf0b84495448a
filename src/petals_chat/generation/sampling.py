"""From logits to tokens, for the rows of many sessions at once.

Processors, their order and their formulas are those of ``transformers``' ``generate()``
(``transformers/generation/logits_process.py``): repetition penalty, then, for sampled rows, temperature, top-k,
top-p. Biases, and penalties on what was generated, come behind the repetition penalty; the API of OpenAI has
them. A row's token depends on that row alone, so a result does not change with who else is in the batch.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from petals_chat.errors import InvalidParameterError
from petals_chat.protocol.messages import SamplingParameters

DISTANCES = (3.0, 12.0, math.inf)
"""How far below the highest score of a row tokens are looked at; if these do not suffice, those within the next one.

Nearly always the first ones do, which are few; sorting a whole vocabulary costs as much as a small LM head.
"""
MANY_TOKENS = 1024
"""More than these are not sorted, but for those of one level of scores."""
_LEVELS, _LEVELS_PER_UNIT = 1024, 32.0
"""How many levels there are, and how many from one score to one that is less by 1."""
_UNSEEDED = random.Random()  # noqa: S311 - text, not keys
"""Shared by all generations without a seed: seeding one of its own takes as long as hundreds of draws."""

_Scores = npt.NDArray[np.floating[Any]]
_TokenIds = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Logprobs:
    """The log probability of a token, and of the likeliest tokens in its place, as (token, log probability)."""

    token: int
    logprob: float | None
    """None for the first token of a text, which nothing comes before."""
    top: tuple[tuple[int, float], ...]


class TokenMask(Protocol):
    """Tells which tokens may come next, by what came before."""

    def allowed(self) -> torch.Tensor:
        """bool [vocab_size]; at least one is."""

    def add(self, token: int) -> None:
        """Note the token that came; an allowed one."""


class TokenSampler:
    """The sampling state of one generation: its parameters, its randomness, the tokens seen so far.

    Args:
        parameters: how to choose.
        vocab_size: number of logits in a row.
        context: all token ids of the session so far, for the repetition penalty.
        mask: keeps the text to a grammar; None = any token may come.

    Raises:
        InvalidParameterError: there is no such token as one that has a bias.
    """

    def __init__(
        self,
        parameters: SamplingParameters,
        vocab_size: int,
        context: Sequence[int],
        mask: TokenMask | None = None,
    ) -> None:
        self.parameters = parameters
        self.mask = mask
        self._random = _UNSEEDED if parameters.seed is None else random.Random(parameters.seed)  # noqa: S311 - text, not keys
        self.seen: torch.Tensor | None = None
        """bool [vocab_size]: which tokens occurred; only kept if a repetition penalty needs it."""
        if parameters.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[torch.tensor(context, dtype=torch.long)] = True
        self.adjustment: torch.Tensor | None = None
        """float32 [vocab_size]: added to the logits; only kept if a bias or a penalty needs it."""
        self._generated: set[int] = set()
        if parameters.logit_bias or parameters.frequency_penalty or parameters.presence_penalty:
            self.adjustment = _bias(parameters.logit_bias, vocab_size)
        self.last_logprobs: Logprobs | None = None
        """Of the token that was chosen last, if the parameters ask for it."""

    def draw(self) -> float:
        """The next random number of this generation, uniform in [0, 1)."""
        return self._random.random()

    def add(self, token: int) -> None:
        """Note that ``token`` is part of the context now."""
        if self.mask is not None:
            self.mask.add(token)
        if self.seen is not None:
            self.seen[token] = True
        if self.adjustment is not None:
            self.adjustment[token] -= self.parameters.frequency_penalty
            if token not in self._generated:
                self.adjustment[token] -= self.parameters.presence_penalty
                self._generated.add(token)


def process_logits(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> torch.Tensor:
    """Apply each row's processors: what `choose_tokens` draws from, written out over the whole vocabulary.

    Args:
        logits: float32 [rows, vocab_size].
        samplers: one for each row.

    Returns:
        float32 [rows, vocab_size]; tokens that were filtered out have -inf. Greedy rows are only penalised
        and masked.
    """
    scores = _mask(_adjust(_penalize_repetition(logits, samplers), samplers), samplers).clone()
    for row, sampler in enumerate(samplers):
        if sampler.parameters.do_sample:
            row_scores = _by_temperature(scores[row : row + 1], [sampler])
            if _filters(sampler):
                kept, token_ids = _kept(row_scores[0].cpu().numpy(), sampler.parameters)
                row_scores = torch.full_like(row_scores, -math.inf)
                row_scores[0, torch.from_numpy(token_ids)] = row_scores.new_tensor(kept)
            scores[row] = row_scores[0]
    return scores


def choose_tokens(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> list[int]:
    """Choose the next token of each row.

    Args:
        logits: float32 [rows, vocab_size].
        samplers: one for each row; a sampled row takes one random number from its own.
    """
    scores = _mask(_adjust(_penalize_repetition(logits, samplers), samplers), samplers)
    tokens = [0] * len(samplers)
    for rows, choose in (
        (
            [row for row, sampler in enumerate(samplers) if not sampler.parameters.do_sample],
            _choose_likeliest,
        ),
        ([row for row, sampler in enumerate(samplers) if _filters(sampler)], _draw_filtered),
        ([row for row, sampler in enumerate(samplers) if _is_plain(sampler)], _draw_plainly),
    ):
        if rows:
            selected = scores if len(rows) == len(samplers) else scores[rows]
            for row, token in zip(rows, choose(selected, [samplers[row] for row in rows]), strict=True):
                tokens[row] = token
    _note_logprobs(logits, samplers, tokens)
    return tokens


def _filters(sampler: TokenSampler) -> bool:
    parameters = sampler.parameters
    return parameters.do_sample and (parameters.top_k > 0 or parameters.top_p < 1.0)


def _is_plain(sampler: TokenSampler) -> bool:
    return sampler.parameters.do_sample and not _filters(sampler)


def _choose_likeliest(scores: torch.Tensor, samplers: Sequence[TokenSampler]) -> list[int]:
    tokens: list[int] = scores.argmax(dim=-1).tolist()
    return tokens


def _draw_plainly(scores: torch.Tensor, samplers: Sequence[TokenSampler]) -> list[int]:
    draws = [sampler.draw() for sampler in samplers]
    tokens: list[int] = _invert(_by_temperature(scores, samplers), draws).tolist()
    if max(tokens) >= scores.shape[-1]:
        raise ValueError("logits that are no numbers")
    return tokens


def _draw_filtered(scores: torch.Tensor, samplers: Sequence[TokenSampler]) -> list[int]:
    # Row by row: with the few tokens that matter, numpy is done before torch has begun.
    return [
        _draw(*_kept(row / sampler.parameters.temperature, sampler.parameters), sampler.draw())
        for sampler, row in zip(samplers, scores.cpu().numpy(), strict=True)
    ]


def _draw(scores: _Scores, token_ids: _TokenIds, draw: float) -> int:
    """The first token at which the cumulated probability exceeds the random number."""
    cumulated = np.exp(scores - scores.max(), dtype=np.float64).cumsum()
    return int(token_ids[cumulated.searchsorted(draw * cumulated[-1], side="right")])


def _by_temperature(scores: torch.Tensor, samplers: Sequence[TokenSampler]) -> torch.Tensor:
    return scores / scores.new_tensor([sampler.parameters.temperature for sampler in samplers])[:, None]


def _invert(scores: torch.Tensor, draws: Sequence[float]) -> torch.Tensor:
    """The first place of each row at which the cumulated probability exceeds the row's random number, [rows].

    In float64, since over a large vocabulary the rounding of a float32 sum would reach tokens of probability 0.
    """
    cumulated = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
    limits = cumulated.new_tensor(draws)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, limits, right=True).squeeze(-1)


def _kept(row: _Scores, parameters: SamplingParameters) -> tuple[_Scores, _TokenIds]:
    """The tokens that top-k and top-p keep.

    Args:
        row: scores [vocab_size].

    Returns:
        Scores and ids of those kept, ids ascending, so that a random number means the same token however many were
        looked at.
    """
    highest = row.max()
    if not math.isfinite(highest):
        raise ValueError("logits that are no numbers")
    total = highest + math.log(np.exp(row - highest).sum())
    for distance in DISTANCES:
        near = row[np.flatnonzero(row > highest - distance)]  # several times as fast as row[row > ...]
        if limit := _limit(near, total, parameters, is_all=distance == math.inf):
            token_ids = np.flatnonzero(row >= limit[0])
            return _without_surplus(row[token_ids], token_ids, *limit)
    raise AssertionError("all tokens were too few")


def _limit(
    scores: _Scores, total: float, parameters: SamplingParameters, *, is_all: bool
) -> tuple[float, int] | None:
    """The lowest score that top-k and top-p keep, and how many tokens they keep.

    Args:
        scores: the highest ones of a row, in any order.
        total: the logarithm of the sum of the exponentials of all scores of the row.
        is_all: whether the row has no others.

    Returns:
        None if there must be others.
    """
    if parameters.top_k > 0:
        if len(scores) < parameters.top_k and not is_all:
            return None
        if len(scores) > parameters.top_k:
            kth_best = np.partition(scores, -parameters.top_k)[-parameters.top_k]
            scores = scores[scores >= kth_best]  # as in transformers, tokens that tie with it stay
        highest = scores.max()
        total = highest + math.log(np.exp(scores - highest, dtype=np.float64).sum())
        is_all = True
    if parameters.top_p == 1.0:
        return scores.min(), len(scores)
    return _limit_of_top_p(scores, total, parameters.top_p, is_all=is_all)


def _limit_of_top_p(scores: _Scores, total: float, top_p: float, *, is_all: bool) -> tuple[float, int] | None:
    """As `_limit`: each token stays before which the more probable ones do not make up ``top_p`` yet."""
    probabilities = np.exp(scores - total, dtype=np.float64)
    if not is_all and probabilities.sum() < top_p:
        return None
    above, before = 0, 0.0
    """How many tokens stay in any case, and their probability."""
    if len(scores) > MANY_TOKENS:
        distances = (scores.max() - scores) * _LEVELS_PER_UNIT
        levels = np.minimum(distances, _LEVELS - 1, out=distances).astype(np.intp)
        up_to = np.bincount(levels, probabilities, _LEVELS).cumsum()
        if level := int(up_to.searchsorted(min(top_p, up_to[-1]))):
            above, before = int(np.count_nonzero(levels < level)), up_to[level - 1]
        scores = scores[levels == level]
    best = np.sort(scores)[::-1]
    cumulated = before + np.exp(best[:-1] - total, dtype=np.float64).cumsum()
    count = 1 + int(cumulated.searchsorted(top_p))
    return best[count - 1], above + count


def _without_surplus(
    scores: _Scores, token_ids: _TokenIds, threshold: float, kept: int
) -> tuple[_Scores, _TokenIds]:
    """Of tokens that tie at the threshold, as many as are needed: the first ones.

    In transformers it is left to the sort which.
    """
    surplus = len(scores) - kept
    if surplus == 0:
        return scores, token_ids
    dropped = np.flatnonzero(scores == threshold)[-surplus:]
    return np.delete(scores, dropped), np.delete(token_ids, dropped)


def _penalize_repetition(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> torch.Tensor:
    rows = [row for row, sampler in enumerate(samplers) if sampler.seen is not None]
    if not rows:
        return logits
    penalized = logits[rows]
    penalty = logits.new_tensor([samplers[row].parameters.repetition_penalty for row in rows])[:, None]
    seen = torch.stack([seen for sampler in samplers if (seen := sampler.seen) is not None]).to(logits.device)
    # Keskar et al. 2019 (CTRL), with the division turned for negative logits as in transformers
    penalized = torch.where(
        seen, torch.where(penalized < 0, penalized * penalty, penalized / penalty), penalized
    )
    return logits.index_copy(0, torch.tensor(rows, device=logits.device), penalized)


def _bias(logit_bias: Mapping[int, float], vocab_size: int) -> torch.Tensor:
    bias = torch.zeros(vocab_size)
    for token, value in logit_bias.items():
        if not 0 <= token < vocab_size:
            raise InvalidParameterError(
                "logit_bias", f"token ids go from 0 to {vocab_size - 1}, not to {token}"
            )
        bias[token] = value
    return bias


def _adjust(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> torch.Tensor:
    """Add biases, and take off penalties, as in the API of OpenAI."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.adjustment is not None]
    if not rows:
        return logits
    adjustments = [adjustment for sampler in samplers if (adjustment := sampler.adjustment) is not None]
    return logits.index_add(
        0, torch.tensor(rows, device=logits.device), torch.stack(adjustments).to(logits.device)
    )


def _mask(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> torch.Tensor:
    """Filter out what a grammar does not allow."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.mask is not None]
    if not rows:
        return logits
    allowed = torch.stack([mask.allowed() for sampler in samplers if (mask := sampler.mask) is not None])
    masked = logits[rows].masked_fill(~allowed.to(logits.device), -math.inf)
    return logits.index_copy(0, torch.tensor(rows, device=logits.device), masked)


def _note_logprobs(logits: torch.Tensor, samplers: Sequence[TokenSampler], tokens: Sequence[int]) -> None:
    for row, (sampler, token) in enumerate(zip(samplers, tokens, strict=True)):
        count = sampler.parameters.top_logprobs
        if count is None:
            continue
        (sampler.last_logprobs,) = logprobs_of(logits[row : row + 1], [token], count)


def logprobs_of(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list[Logprobs]:
    """The log probability of one token in each row.

    Args:
        logits: float32 [rows, vocab_size].
        tokens: one for each row.
        count: how many of the likeliest are told, too.
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(-1).tolist()
    best = logprobs.topk(min(count, logprobs.shape[-1]))
    return [
        Logprobs(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
