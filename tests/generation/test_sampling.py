"""Sampling equals ``transformers``' processors on the same logits, alone and in any company."""

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

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


def test_ties_are_kept_as_transformers_keeps_them() -> None:
    logits = random_logits(1)[0].round()
    for parameters in PARAMETERS:
        ours = process_logits(logits[None], [TokenSampler(parameters, VOCAB_SIZE, CONTEXT)])[0]
        assert torch.equal(ours, transformers_scores(logits, parameters))


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


def test_the_repetition_penalty_counts_the_tokens_that_came_since() -> None:
    sampler = TokenSampler(SamplingParameters(repetition_penalty=100.0), VOCAB_SIZE, [])
    logits = random_logits(1)
    first = choose_tokens(logits, [sampler])[0]
    sampler.add(first)
    assert choose_tokens(logits, [sampler])[0] != first
