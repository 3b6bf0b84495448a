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

import torch

from petals_chat.errors import InvalidParameterError
from petals_chat.protocol.messages import SamplingParameters

FEW_TOKENS = 256
"""Most probable tokens that are looked at first for top-p."""


@dataclasses.dataclass(frozen=True, slots=True)
class Logprobs:
    """The log probability of a token, and of the likeliest tokens in its place, as (token, log probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenSampler:
    """The sampling state of one generation: its parameters, its randomness, the tokens seen so far.

    Args:
        parameters: how to choose.
        vocab_size: number of logits in a row.
        context: all token ids of the session so far, for the repetition penalty.

    Raises:
        InvalidParameterError: there is no such token as one that has a bias.
    """

    def __init__(self, parameters: SamplingParameters, vocab_size: int, context: Sequence[int]) -> None:
        self.parameters = parameters
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
        if self.seen is not None:
            self.seen[token] = True
        if self.adjustment is not None:
            self.adjustment[token] -= self.parameters.frequency_penalty
            if token not in self._generated:
                self.adjustment[token] -= self.parameters.presence_penalty
                self._generated.add(token)


def process_logits(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> torch.Tensor:
    """Apply each row's processors.

    Args:
        logits: float32 [rows, vocab_size].
        samplers: one for each row.

    Returns:
        float32 [rows, vocab_size]; tokens that were filtered out have -inf. Greedy rows are only penalised.
    """
    logits = _adjust(_penalize_repetition(logits, samplers), samplers)
    sampled = [row for row, sampler in enumerate(samplers) if sampler.parameters.do_sample]
    if not sampled:
        return logits
    parameters = [samplers[row].parameters for row in sampled]
    selected = logits if len(sampled) == len(samplers) else logits[sampled]
    scores = selected / logits.new_tensor([p.temperature for p in parameters])[:, None]
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
    _note_logprobs(logits, samplers, tokens)
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


def _note_logprobs(logits: torch.Tensor, samplers: Sequence[TokenSampler], tokens: Sequence[int]) -> None:
    for row, (sampler, token) in enumerate(zip(samplers, tokens, strict=True)):
        count = sampler.parameters.top_logprobs
        if count is None:
            continue
        logprobs = logits[row].log_softmax(-1)
        best = logprobs.topk(min(count, len(logprobs)))
        sampler.last_logprobs = Logprobs(
            token,
            logprobs[token].item(),
            tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        )


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
    limits = scores.new_tensor([top_p[row] for row in rows])[:, None]
    selected = scores if len(rows) == len(top_p) else scores[rows]
    filtered = _keep_most_probable(selected, limits, min(FEW_TOKENS, scores.shape[-1]))
    if len(rows) == len(top_p):
        return filtered
    return scores.index_copy(0, torch.tensor(rows, device=scores.device), filtered)


def _keep_most_probable(scores: torch.Tensor, top_p: torch.Tensor, count: int) -> torch.Tensor:
    """Keep each token before which the more probable ones do not make up ``top_p`` yet.

    Sorting a whole vocabulary costs as much as a small LM head. Nearly always the first ``count`` tokens suffice;
    for rows where they do not, all are sorted.

    Args:
        scores: [rows, vocab_size]
        top_p: [rows, 1]
    """
    best = torch.topk(scores, count, dim=-1).values
    probabilities = (best - scores.logsumexp(dim=-1, keepdim=True)).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = best.gather(-1, kept - 1)
    filtered = scores.masked_fill(scores < threshold, -math.inf)
    # Of tokens that tie at the threshold, as many as are needed stay: the first ones. In transformers it is left to
    # the sort which.
    ties = scores == threshold
    needed = kept - (best > threshold).sum(dim=-1, keepdim=True)
    if (ties.sum(dim=-1, keepdim=True) > needed).any():
        filtered.masked_fill_(ties & (ties.cumsum(dim=-1) > needed), -math.inf)
    if count < scores.shape[-1]:
        more = (kept.squeeze(-1) == count).nonzero().squeeze(-1)
        if len(more):
            filtered[more] = _keep_most_probable(scores[more], top_p[more], scores.shape[-1])
    return filtered
