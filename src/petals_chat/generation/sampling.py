"""From logits to tokens, for the rows of many sessions at once.

Processors, their order and their formulas are those of ``transformers``' ``generate()``
(``transformers/generation/logits_process.py``): repetition penalty, then, for sampled rows, temperature, top-k,
top-p. A row's token depends on that row alone, so a result does not change with who else is in the batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from petals_chat.protocol.messages import SamplingParameters


class TokenSampler:
    """The sampling state of one generation: its parameters, its randomness, the tokens seen so far.

    Args:
        parameters: how to choose.
        vocab_size: number of logits in a row.
        context: all token ids of the session so far, for the repetition penalty.
    """

    def __init__(self, parameters: SamplingParameters, vocab_size: int, context: Sequence[int]) -> None:
        self.parameters = parameters
        self._random = random.Random(parameters.seed)  # noqa: S311 - text, not keys
        self.seen: torch.Tensor | None = None
        """bool [vocab_size]: which tokens occurred; only kept if a repetition penalty needs it."""
        if parameters.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[torch.tensor(context, dtype=torch.long)] = True

    def draw(self) -> float:
        """The next random number of this generation, uniform in [0, 1)."""
        return self._random.random()

    def add(self, token: int) -> None:
        """Note that ``token`` is part of the context now."""
        if self.seen is not None:
            self.seen[token] = True


def process_logits(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> torch.Tensor:
    """Apply each row's processors.

    Args:
        logits: float32 [rows, vocab_size].
        samplers: one for each row.

    Returns:
        float32 [rows, vocab_size]; tokens that were filtered out have -inf. Greedy rows are only penalised.
    """
    logits = _penalize_repetition(logits, samplers)
    sampled = [row for row, sampler in enumerate(samplers) if sampler.parameters.do_sample]
    if not sampled:
        return logits
    parameters = [samplers[row].parameters for row in sampled]
    scores = logits[sampled] / logits.new_tensor([p.temperature for p in parameters])[:, None]
    scores = _keep_top_k(scores, [p.top_k for p in parameters])
    scores = _keep_top_p(scores, [p.top_p for p in parameters])
    if len(sampled) == len(samplers):
        return scores
    return logits.index_copy(0, torch.tensor(sampled, device=logits.device), scores)


def choose_tokens(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> list[int]:
    """Choose the next token of each row.

    Args:
        logits: float32 [rows, vocab_size].
        samplers: one for each row; a sampled row takes one random number from its own.
    """
    scores = process_logits(logits, samplers)
    tokens: list[int] = scores.argmax(dim=-1).tolist()
    sampled = [row for row, sampler in enumerate(samplers) if sampler.parameters.do_sample]
    if sampled:
        # Inversion: the first token at which the cumulated probability exceeds the random number. In float64,
        # since over a large vocabulary the rounding of a float32 sum would reach tokens of probability 0.
        cumulated = torch.softmax(scores[sampled].double(), dim=-1).cumsum(dim=-1)
        draws = cumulated.new_tensor([[samplers[row].draw()] for row in sampled]) * cumulated[:, -1:]
        chosen = torch.searchsorted(cumulated, draws, right=True).squeeze(-1)
        for row, token in zip(sampled, chosen.tolist(), strict=True):
            tokens[row] = token
    return tokens


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


def _keep_top_k(scores: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    vocab_size = scores.shape[-1]
    limits = [min(k, vocab_size) if k > 0 else vocab_size for k in top_k]
    largest = max((limit for limit in limits if limit < vocab_size), default=0)
    if largest == 0:
        return scores
    best = torch.topk(scores, largest).values
    ranks = torch.tensor([min(limit, largest) - 1 for limit in limits], device=scores.device)[:, None]
    thresholds = best.gather(-1, ranks)
    unlimited = torch.tensor([limit == vocab_size for limit in limits], device=scores.device)[:, None]
    # as in transformers, tokens that tie with the k-th best stay
    return scores.masked_fill((scores < thresholds) & ~unlimited, -math.inf)


def _keep_top_p(scores: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    rows = [row for row, p in enumerate(top_p) if p < 1.0]
    if not rows:
        return scores
    ascending, order = torch.sort(scores[rows], descending=False)
    cumulated = ascending.softmax(dim=-1).cumsum(dim=-1)
    removed = cumulated <= 1 - scores.new_tensor([top_p[row] for row in rows])[:, None]
    removed[:, -1] = False
    filtered = scores[rows].masked_fill(removed.scatter(-1, order, removed), -math.inf)
    return scores.index_copy(0, torch.tensor(rows, device=scores.device), filtered)
