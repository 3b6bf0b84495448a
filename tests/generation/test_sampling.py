"""Sampling equals ``transformers``' processors on the same logits, alone and in any company."""

import math
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
from petals_chat.generation import sampling
from petals_chat.generation.sampling import TokenSampler, choose_tokens, process_logits
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


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_scores_equal_those_of_transformers(parameters: SamplingParameters) -> None:
    for logits in random_logits(20):
        ours = process_logits(logits[None], [TokenSampler(parameters, VOCAB_SIZE, CONTEXT)])[0]
        assert torch.equal(ours, transformers_scores(logits, parameters))


def test_of_tokens_that_tie_as_many_are_kept_as_transformers_keeps() -> None:
    for logits in random_logits(20).round():
        for parameters in PARAMETERS:
            ours = process_logits(logits[None], [TokenSampler(parameters, VOCAB_SIZE, CONTEXT)])[0]
            theirs = transformers_scores(logits, parameters)
            assert torch.equal(ours.sort().values, theirs.sort().values)
            if parameters.top_p == 1.0:
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_few_or_many_probable_tokens_make_no_difference_to_top_p(top_p: float) -> None:
    parameters = SamplingParameters(do_sample=True, top_p=top_p)
    steepness = torch.tensor([0.0, 0.01, 0.5, 1.0, 8.0])[:, None]
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(1)) * steepness
    ours = process_logits(logits, [TokenSampler(parameters, 3000, [0]) for _ in logits])
    for row, scores in zip(ours, logits, strict=True):
        theirs = TopPLogitsWarper(top_p)(torch.tensor([[0]]), scores[None].clone())[0]
        # Over thousands of nearly equal probabilities, the roundings of two sums may differ by some tokens.
        kept, expected = row.isfinite().sum().item(), theirs.isfinite().sum().item()
        assert abs(kept - expected) <= max(1, 0.002 * expected)
        assert kept > 256 or torch.equal(row.sort().values, theirs.sort().values)


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


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    draws = 20_000
    rows = 100
    samplers = [TokenSampler(SamplingParameters(do_sample=True, seed=row), 5, [0]) for row in range(rows)]
    logits = probabilities.log().expand(rows, 5)
    counts: Counter[int] = Counter()
    for _ in range(draws // rows):
        counts.update(choose_tokens(logits, samplers))
    assert counts[1] == 0
    for token, probability in enumerate(probabilities.tolist()):
        # five standard deviations of a binomial distribution; the seeds are fixed
        deviation = (draws * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - draws * probability) <= 5 * deviation


def test_filtered_tokens_never_come_even_at_the_edges_of_the_random_numbers() -> None:
    class Edge(TokenSampler):
        value = 0.0

        def draw(self) -> float:
            return self.value

    logits = torch.full((1, VOCAB_SIZE), -float("inf"))
    logits[0, 10], logits[0, 20] = 0.0, 0.0
    edge = Edge(SamplingParameters(do_sample=True), VOCAB_SIZE, CONTEXT)
    for edge.value, token in [(0.0, 10), (0.4999, 10), (0.5001, 20), (1 - 2**-53, 20)]:
        assert choose_tokens(logits, [edge]) == [token]


@pytest.mark.parametrize("distances", [(0.5, math.inf), (2.0, 4.0, math.inf), (math.inf,)])
@pytest.mark.parametrize("many", [1, 20])
@pytest.mark.parametrize("parameters", [p for p in PARAMETERS if p.do_sample])
def test_it_does_not_matter_among_how_many_tokens_is_looked_first(
    parameters: SamplingParameters, distances: tuple[float, ...], many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(200).round()  # with many ties
    seeded = [msgspec.structs.replace(parameters, seed=row) for row in range(len(logits))]

    def choose() -> list[int]:
        return choose_tokens(logits, [TokenSampler(each, VOCAB_SIZE, CONTEXT) for each in seeded])

    among_all = choose()
    monkeypatch.setattr(sampling, "DISTANCES", distances)
    monkeypatch.setattr(sampling, "MANY_TOKENS", many)
    assert choose() == among_all


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
