"""Sampling equals ``transformers``' processors on the same logits, alone and in any company."""

import math
import random
from collections import Counter

import msgspec
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from petals_chat.errors import InvalidParameterError
from petals_chat.generation.sampling import TokenSampler, choose_tokens, draw_token, process_logits
from petals_chat.protocol.messages import SamplingParameters

VOCAB_SIZE = 500
CONTEXT = [3, 17, 17, 256, 499]

PARAMETERS = [
    SamplingParameters(),
    SamplingParameters(repetition_penalty=1.3),
    SamplingParameters(do_sample=True),
    SamplingParameters(do_sample=True, temperature=0.6, top_p=0.9),
    SamplingParameters(do_sample=True, temperature=1.7, top_k=7),
    SamplingParameters(do_sample=True, top_k=1),
    SamplingParameters(do_sample=True, top_k=10_000),
    SamplingParameters(do_sample=True, top_p=0.0),
    SamplingParameters(do_sample=True, top_p=0.3, top_k=40, temperature=0.9, repetition_penalty=0.8),
    SamplingParameters(do_sample=True, temperature=0.01, top_p=0.999),
]


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 4


def transformers_scores(logits: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """What ``generate()`` would sample from: the processors in the order in which it builds them."""
    processors = LogitsProcessorList()
    if parameters.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty))
    if parameters.do_sample:
        if parameters.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(parameters.temperature))
        if parameters.top_k:
            processors.append(TopKLogitsWarper(parameters.top_k))
        if parameters.top_p < 1.0:
            processors.append(TopPLogitsWarper(parameters.top_p))
    scores: torch.Tensor = processors(torch.tensor([CONTEXT]), logits[None].clone())
    return scores[0]


SAMPLED = [parameters for parameters in PARAMETERS if parameters.do_sample]
PROBABLE = 1e-5
"""Random numbers that mean a less probable token are too near to each other to be told apart in float32."""


def tokens_that_may_come(logits: torch.Tensor, parameters: SamplingParameters) -> list[int]:
    """The probable tokens that are chosen when a random number means them, and not asked for another number."""
    before_top_p = msgspec.structs.replace(parameters, top_p=1.0)
    probabilities = transformers_scores(logits, before_top_p).double().softmax(-1)
    middles = (probabilities.cumsum(-1) - probabilities / 2).tolist()
    (scores,) = process_logits(logits[None], [TokenSampler(parameters, len(logits), CONTEXT)]).numpy()

    def may_come(token: int) -> bool:
        numbers = [0.5] * len(logits) + [middles[token]]
        is_chosen = draw_token(scores, parameters, numbers.pop) == token
        return is_chosen and len(numbers) == len(logits)

    return [token for token in range(len(logits)) if probabilities[token] > PROBABLE and may_come(token)]


def tokens_that_transformers_keeps(logits: torch.Tensor, parameters: SamplingParameters) -> list[int]:
    """The probable ones of them."""
    before_top_p = msgspec.structs.replace(parameters, top_p=1.0)
    is_probable = transformers_scores(logits, before_top_p).double().softmax(-1) > PROBABLE
    kept = transformers_scores(logits, parameters).isfinite() & is_probable
    return kept.nonzero().flatten().tolist()


@pytest.mark.parametrize("parameters", SAMPLED)
def test_the_tokens_that_may_come_are_those_that_transformers_keeps(parameters: SamplingParameters) -> None:
    for logits in random_logits(5):
        ours = tokens_that_may_come(logits, parameters)
        assert ours == tokens_that_transformers_keeps(logits, parameters)


@pytest.mark.parametrize("parameters", SAMPLED)
def test_of_tokens_that_tie_as_many_may_come_as_transformers_keeps(parameters: SamplingParameters) -> None:
    for logits in random_logits(5).round():
        ours = tokens_that_may_come(logits, parameters)
        theirs = tokens_that_transformers_keeps(logits, parameters)
        assert sorted(logits[ours].tolist()) == sorted(logits[theirs].tolist())
        if parameters.top_p == 1.0:
            assert ours == theirs


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_the_likeliest_token_is_that_of_transformers(parameters: SamplingParameters) -> None:
    greedy = msgspec.structs.replace(parameters, do_sample=False)
    for logits in random_logits(20):
        sampler = TokenSampler(greedy, VOCAB_SIZE, CONTEXT)
        assert choose_tokens(logits[None], [sampler]) == [transformers_scores(logits, greedy).argmax()]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_few_or_many_probable_tokens_make_no_difference_to_top_p(top_p: float) -> None:
    parameters = SamplingParameters(do_sample=True, top_p=top_p)
    steepness = torch.tensor([0.0, 0.01, 0.5, 1.0, 8.0])[:, None]
    for logits in torch.randn(5, 3000, generator=torch.Generator().manual_seed(1)) * steepness:
        ours = tokens_that_may_come(logits, parameters)
        theirs = tokens_that_transformers_keeps(logits, parameters)
        # Over thousands of nearly equal probabilities, the roundings of two sums may differ by some tokens.
        assert abs(len(ours) - len(theirs)) <= max(1, 0.002 * len(theirs))


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(do_sample=True, temperature=2.0),
        SamplingParameters(do_sample=True, temperature=2.0, top_p=0.5),
        SamplingParameters(do_sample=True, temperature=2.0, top_p=0.8, top_k=30),
    ],
    ids=["plain", "top_p", "both"],
)
@pytest.mark.parametrize("vocab_size", [20, 1000])
def test_tokens_come_as_often_as_transformers_says(parameters: SamplingParameters, vocab_size: int) -> None:
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 4
    probabilities = transformers_scores(logits, parameters).softmax(-1)
    numbers, draws = random.Random(0), 20_000
    counts = Counter(draw_token(logits.numpy(), parameters, numbers.random) for _ in range(draws))
    for token, probability in enumerate(probabilities.tolist()):
        # five standard deviations of a binomial distribution, and one more; the seed is fixed
        deviation = (draws * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - draws * probability) <= 5 * deviation + (probability > 0)


def test_a_row_does_not_depend_on_the_others_in_the_batch() -> None:
    logits = random_logits(len(PARAMETERS))
    seeded = [
        SamplingParameters(p.do_sample, p.temperature, p.top_k, p.top_p, p.repetition_penalty, seed=5)
        for p in PARAMETERS
    ]
    together = choose_tokens(logits, [TokenSampler(p, VOCAB_SIZE, CONTEXT) for p in seeded])
    alone = [
        choose_tokens(logits[row : row + 1], [TokenSampler(p, VOCAB_SIZE, CONTEXT)])[0]
        for row, p in enumerate(seeded)
    ]
    assert together == alone


def test_a_seed_makes_a_generation_reproducible_and_no_seed_does_not() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)

    def run(seed: int | None) -> list[int]:
        sampler = TokenSampler(SamplingParameters(do_sample=True, seed=seed), VOCAB_SIZE, CONTEXT)
        return [choose_tokens(logits, [sampler])[0] for _ in range(20)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


@pytest.mark.parametrize("vocab_size", [31, 500, 512, 4097])
@pytest.mark.parametrize("places", [(10, 20), (0, 30), (30, -1)])
def test_impossible_tokens_never_come_even_at_the_edges_of_the_random_numbers(
    vocab_size: int, places: tuple[int, int]
) -> None:
    logits = torch.full((vocab_size,), -math.inf)
    first, second = (place % vocab_size for place in places)
    logits[first] = logits[second] = 0.0
    for number, token in [(0.0, first), (0.4999, first), (0.5001, second), (1 - 2**-53, second)]:
        for top_k in (0, 5):
            parameters = SamplingParameters(do_sample=True, top_k=top_k)
            assert draw_token(logits.numpy(), parameters, [number].pop) == token
        likeliest = SamplingParameters(do_sample=True, top_p=0.5)  # of two that tie, the first
        assert draw_token(logits.numpy(), likeliest, [number, number].pop) == min(first, second)


def test_the_repetition_penalty_counts_the_tokens_that_came_since() -> None:
    sampler = TokenSampler(SamplingParameters(repetition_penalty=100.0), VOCAB_SIZE, [])
    logits = random_logits(1)
    first = choose_tokens(logits, [sampler])[0]
    sampler.add(first)
    assert choose_tokens(logits, [sampler])[0] != first


PENALTIES = SamplingParameters(frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: 2.0, 9: -100.0})


def test_what_was_generated_is_penalised_and_a_bias_is_added() -> None:
    logits = random_logits(1)
    sampler = TokenSampler(PENALTIES, VOCAB_SIZE, CONTEXT)
    for token in (17, 17, 3):
        sampler.add(token)
    expected = logits[0].clone()
    expected[17] -= 2 * 0.5 + 0.25
    expected[3] += 2.0 - 0.5 - 0.25
    expected[9] -= 100.0
    torch.testing.assert_close(process_logits(logits, [sampler])[0], expected)


def test_penalties_and_biases_of_a_row_do_not_change_others() -> None:
    logits = random_logits(3)
    plain = SamplingParameters(do_sample=True, temperature=0.7, seed=1)
    samplers = [TokenSampler(each, VOCAB_SIZE, CONTEXT) for each in (plain, PENALTIES, plain)]
    together = process_logits(logits, samplers)
    for row, sampler in enumerate(samplers):
        assert torch.equal(together[row], process_logits(logits[row : row + 1], [sampler])[0])


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_a_bias_for_a_token_that_is_none_is_refused(token: int) -> None:
    with pytest.raises(InvalidParameterError, match="logit_bias: token ids go from 0 to 499"):
        TokenSampler(SamplingParameters(logit_bias={token: 1.0}), VOCAB_SIZE, CONTEXT)


def test_log_probabilities_are_those_of_the_model_alone() -> None:
    logits = random_logits(2)
    parameters = SamplingParameters(
        do_sample=True, temperature=0.3, top_k=5, seed=1, logit_bias={3: 50.0}, top_logprobs=3
    )
    samplers = [TokenSampler(each, VOCAB_SIZE, CONTEXT) for each in (parameters, SamplingParameters())]
    tokens = choose_tokens(logits, samplers)
    expected = logits[0].log_softmax(-1)
    described = samplers[0].last_logprobs
    assert described is not None
    assert described.token == tokens[0] == 3
    assert described.logprob == pytest.approx(expected[3].item())
    best = expected.topk(3)
    assert [token for token, _ in described.top] == best.indices.tolist()
    assert [logprob for _, logprob in described.top] == pytest.approx(best.values.tolist())
    assert samplers[1].last_logprobs is None


def test_no_alternatives_are_told_where_none_are_wanted() -> None:
    sampler = TokenSampler(SamplingParameters(top_logprobs=0), VOCAB_SIZE, CONTEXT)
    choose_tokens(random_logits(1), [sampler])
    assert sampler.last_logprobs is not None
    assert sampler.last_logprobs.top == ()


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(do_sample=True),
        SamplingParameters(do_sample=True, top_p=0.9),
        SamplingParameters(do_sample=True, top_k=5),
    ],
    ids=["plain", "top_p", "top_k"],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_token_is_made_of_what_is_no_number(parameters: SamplingParameters, bad: float) -> None:
    logits = torch.zeros(1, 50)
    logits[0, 3] = bad
    with pytest.raises(ValueError, match="no numbers"):
        choose_tokens(logits, [TokenSampler(parameters, 50, [])])
