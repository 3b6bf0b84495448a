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
from typing import Protocol

import torch

from petals_chat.errors import InvalidParameterError
from petals_chat.protocol.messages import SamplingParameters

FEW_TOKENS = 256
"""Most probable tokens that are looked at first for top-p."""


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
        self._random = random.Random(parameters.seed)  # noqa: S311 - text, not keys
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
                kept, token_ids, _ = _most_probable(row_scores, [sampler], row_scores.shape[-1])
                row_scores = torch.full_like(row_scores, -math.inf).scatter(-1, token_ids, kept)
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
    return tokens


def _draw_filtered(scores: torch.Tensor, samplers: Sequence[TokenSampler]) -> list[int]:
    scores = _by_temperature(scores, samplers)
    draws = [sampler.draw() for sampler in samplers]
    kept, token_ids, is_enough = _most_probable(scores, samplers, min(FEW_TOKENS, scores.shape[-1]))
    chosen = token_ids.gather(-1, _invert(kept, draws)[:, None]).squeeze(-1)
    tokens: list[int] = chosen.tolist()
    for row, was_enough in enumerate(is_enough.tolist()):
        if not was_enough:
            kept, token_ids, _ = _most_probable(
                scores[row : row + 1], samplers[row : row + 1], scores.shape[-1]
            )
            tokens[row] = int(token_ids[0, _invert(kept, draws[row : row + 1])[0]])
    return tokens


def _by_temperature(scores: torch.Tensor, samplers: Sequence[TokenSampler]) -> torch.Tensor:
    return scores / scores.new_tensor([sampler.parameters.temperature for sampler in samplers])[:, None]


def _invert(scores: torch.Tensor, draws: Sequence[float]) -> torch.Tensor:
    """The first place of each row at which the cumulated probability exceeds the row's random number, [rows].

    In float64, since over a large vocabulary the rounding of a float32 sum would reach tokens of probability 0.
    """
    cumulated = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
    limits = cumulated.new_tensor(draws)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, limits, right=True).squeeze(-1)


def _most_probable(
    scores: torch.Tensor, samplers: Sequence[TokenSampler], count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens that top-k and top-p keep, looked for among the ``count`` most probable ones.

    Sorting a whole vocabulary costs as much as a small LM head, and nearly always the first few tokens suffice.

    Args:
        scores: [rows, vocab_size].

    Returns:
        Scores [rows, count], -inf for tokens that are not kept; their token ids [rows, count], ascending, so that
        a random number means the same token for every ``count``; and whether the ``count`` tokens were enough, [rows].
    """
    vocab_size = scores.shape[-1]
    top_k = [min(sampler.parameters.top_k or vocab_size, vocab_size) for sampler in samplers]
    best, token_ids = torch.topk(scores, count, dim=-1)
    least = best[:, -1:]
    total = scores.logsumexp(dim=-1, keepdim=True)
    knows_top_k: torch.Tensor | bool = True
    if min(top_k) < vocab_size:
        ranks = torch.tensor([min(k, count) - 1 for k in top_k], device=scores.device)[:, None]
        limited = torch.tensor([k < vocab_size for k in top_k], device=scores.device)[:, None]
        kth_best = best.gather(-1, ranks)
        knows_top_k = ~limited | (least < kth_best)
        # as in transformers, tokens that tie with the k-th best stay
        best = best.masked_fill((best < kth_best) & limited, -math.inf)
        total = torch.where(limited, best.logsumexp(dim=-1, keepdim=True), total)
    probabilities = (best - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = scores.new_tensor([sampler.parameters.top_p for sampler in samplers])[:, None]
    # Each token stays before which the more probable ones do not make up top_p yet.
    is_kept = ((before < top_p) | (top_p >= 1.0)) & (best > -math.inf)
    kept = is_kept.sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = best.gather(-1, kept - 1)
    is_enough = ((least < threshold) & knows_top_k)[:, 0] | (count == vocab_size)
    # Of tokens that tie at the threshold, as many as are needed stay: the first ones. In transformers it is left to
    # the sort which.
    needed = kept - (best > threshold).sum(dim=-1, keepdim=True)
    token_ids, order = token_ids.sort(dim=-1)
    best = best.gather(-1, order)
    ties = best == threshold
    dropped = (best < threshold) | (ties & (ties.cumsum(dim=-1) > needed))
    return best.masked_fill(dropped, -math.inf), token_ids, is_enough


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
