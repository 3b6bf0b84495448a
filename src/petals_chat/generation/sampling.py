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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from petals_chat.errors import InvalidParameterError
from petals_chat.protocol.messages import SamplingParameters

_NEAR = 3.0
"""How far below the highest score of a row the best k are looked for first: nearly always they are there."""
_PIECE = 256
"""How many probabilities are summed up at once: finding a token in their sums is several times as fast as adding up
one after the other."""
_UNSEEDED = random.Random()  # noqa: S311 - text, not keys
"""Shared by all generations without a seed: seeding one of its own takes as long as hundreds of draws."""

_Scores = npt.NDArray[np.floating[Any]]
_Sums = npt.NDArray[np.float64]


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


def choose_tokens(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> list[int]:
    """Choose the next token of each row.

    Args:
        logits: float32 [rows, vocab_size].
        samplers: one for each row; a sampled row takes random numbers from its own.

    Raises:
        ValueError: a row that is sampled has logits that are no numbers.
    """
    scores = process_logits(logits, samplers)
    greedy = [row for row, sampler in enumerate(samplers) if not sampler.parameters.do_sample]
    tokens = [0] * len(samplers)
    if greedy:
        likeliest = (scores if len(greedy) == len(samplers) else scores[greedy]).argmax(dim=-1)
        for row, token in zip(greedy, likeliest.tolist(), strict=True):
            tokens[row] = token
    if len(greedy) < len(samplers):
        # Row by row: with the few numbers that matter, numpy is done before torch has begun.
        for row, (sampler, row_scores) in enumerate(zip(samplers, scores.cpu().numpy(), strict=True)):
            if sampler.parameters.do_sample:
                tokens[row] = draw_token(row_scores, sampler.parameters, sampler.draw)
    _note_logprobs(logits, samplers, tokens)
    return tokens


def process_logits(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> torch.Tensor:
    """Apply the penalties, biases and grammar of each row: float32 [rows, vocab_size] to the same."""
    return _mask(_adjust(_penalize_repetition(logits, samplers), samplers), samplers)


def draw_token(scores: _Scores, parameters: SamplingParameters, draw: Callable[[], float]) -> int:
    """Draw from what temperature, top-k and top-p leave of a row.

    Neither do probabilities have to be sorted for it, nor all that top-p keeps be found: a token is drawn from all
    of them, and if top-p does not keep it, another one from those before it, which are all that can be kept.

    Args:
        scores: float32 [vocab_size].
        parameters: of sampling.
        draw: gives random numbers, uniform in [0, 1).

    Raises:
        ValueError: the scores are no numbers.
    """
    scores = scores / parameters.temperature
    highest = float(scores.max())
    if not math.isfinite(highest):
        raise ValueError("logits that are no numbers")
    token_ids = None
    if 0 < parameters.top_k < len(scores):
        # As in transformers, tokens that tie with the last of the best k stay.
        token_ids = np.flatnonzero(scores >= _kth_best(scores, highest, parameters.top_k))
        scores = scores[token_ids]
    weights = np.exp(scores - highest)
    sums = _sums(weights)
    limit = parameters.top_p * sums[-1]
    place = _find(weights, sums, draw())
    while parameters.top_p < 1.0:
        before = _comes_before(scores, place)
        weight_before = weights.dot(before.astype(weights.dtype))
        if weight_before == 0.0 or weight_before < limit:
            break
        places = np.flatnonzero(before)
        token_ids = places if token_ids is None else token_ids[places]
        scores, weights = scores[places], weights[places]
        place = _find(weights, _sums(weights), draw())
    return place if token_ids is None else int(token_ids[place])


def _kth_best(scores: _Scores, highest: float, k: int) -> float:
    near = scores[np.flatnonzero(scores > highest - _NEAR)]  # several times as fast as scores[scores > ...]
    if len(near) < k:
        near = scores
    return float(np.partition(near, -k)[-k])


def _comes_before(scores: _Scores, place: int) -> npt.NDArray[np.bool_]:
    """Which tokens are likelier than the one at ``place``, or as likely and come first.

    In transformers it is left to the sort which of those that tie come first.
    """
    before: npt.NDArray[np.bool_] = scores > scores[place]
    before[:place] |= scores[:place] == scores[place]
    return before


def _sums(weights: _Scores) -> _Sums:
    """The sum of all weights up to the end of each piece, in float64.

    Over a large vocabulary the rounding of a float32 sum would reach tokens of probability 0.
    """
    return np.add.reduceat(weights, np.arange(0, len(weights), _PIECE), dtype=np.float64).cumsum()


def _find(weights: _Scores, sums: _Sums, draw: float) -> int:
    """The first place up to which the weights exceed this share of their sum."""
    piece = _first_above(sums, draw * sums[-1])
    start = piece * _PIECE
    rest = draw * sums[-1] - (sums[piece - 1] if piece else 0.0)
    return start + _first_above(weights[start : start + _PIECE].cumsum(dtype=np.float64), rest)


def _first_above(sums: _Sums, value: float) -> int:
    """The first place at which ``sums`` exceed the value; by rounding it may be as large as the last one."""
    return int(sums.searchsorted(min(value, np.nextafter(sums[-1], 0.0)), side="right"))


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
