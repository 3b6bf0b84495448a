"""What the parameters of the v1 and v2 APIs may be, and what is made of them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from petals_chat.errors import InvalidParameterError
from petals_chat.gateway.parameters import (
    _EXPECTED,
    AnswerParameters,
    AttachParameters,
    GenerationParametersV1,
    GenerationParametersV2,
    SessionParameters,
    SessionReference,
    StopParameters,
    parse,
    parse_generation,
)
from petals_chat.protocol.messages import GenerationRequest, SamplingParameters

GREEDY = SamplingParameters()


def parsed(**values: Any) -> GenerationParametersV1:
    return parse_generation(GenerationParametersV1, {"max_new_tokens": 1, **values})


def refusal(**values: Any) -> str:
    with pytest.raises(InvalidParameterError) as refused:
        parsed(**values)
    return str(refused.value)


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "true", "True", "TRUE", " true "])
def test_do_sample_can_be_true_in_many_ways(value: Any) -> None:
    assert parsed(do_sample=value).sampling.do_sample


@pytest.mark.parametrize("value", [0, 0.0, False, "0", "false", "False", "", None])
def test_do_sample_can_be_false_in_many_ways(value: Any) -> None:
    assert parsed(do_sample=value).sampling == GREEDY


@pytest.mark.parametrize("value", ["64", "64.0", " 64\n", 64, 64.0])
def test_whole_numbers_may_come_as_strings_and_as_floats(value: Any) -> None:
    assert parsed(max_new_tokens=value).max_new_tokens == 64


@pytest.mark.parametrize("value", [10**9, 10**400, "9" * 50, 1e300])
def test_absurdly_many_tokens_are_cut_to_what_a_message_can_carry(value: Any) -> None:
    assert (parsed(max_new_tokens=value).max_new_tokens or 0) in (10**9, 2**31 - 1)


@pytest.mark.parametrize("value", [0, "0", 0.0, "0.0", 1e-300])
def test_temperature_0_means_greedy(value: Any) -> None:
    assert parsed(do_sample=1, temperature=value, top_p=0.5, seed=3).sampling == GREEDY


@pytest.mark.parametrize("value", [0, "0", None, ""])
def test_top_k_can_be_off_in_many_ways(value: Any) -> None:
    assert parsed(do_sample=1, top_k=value).sampling.top_k == 0


def test_the_repetition_penalty_counts_without_sampling_too() -> None:
    assert parsed(repetition_penalty="1.5").sampling == SamplingParameters(repetition_penalty=1.5)


def test_all_sampling_parameters_are_passed_on() -> None:
    parameters = parsed(
        do_sample="true",
        temperature="0.6",
        top_k="5",
        top_p="0.9",
        repetition_penalty="1.2",
        seed=str(2**63 - 1),
    )
    assert parameters.sampling == SamplingParameters(True, 0.6, 5, 0.9, 1.2, 2**63 - 1)


@pytest.mark.parametrize("value", ["", " a cat ", "\n", "猫\N{CAT FACE}", "\x00"])
def test_inputs_stay_as_they_are(value: str) -> None:
    assert parsed(inputs=value).inputs == value


def test_null_inputs_are_the_same_as_none() -> None:
    assert parsed(inputs=None).inputs is None


def test_unknown_keys_are_ignored() -> None:
    assert parsed(num_beams=3, max_total_tokens="x") == parsed()


def test_max_new_tokens_wins_over_max_length() -> None:
    both = parsed(max_new_tokens=5, max_length=7).single_chunk_request()
    assert both == GenerationRequest(None, max_new_tokens=5)
    alone = parsed(max_new_tokens=None, max_length=7).single_chunk_request()
    assert alone == GenerationRequest(None, max_length=7)


def test_one_of_the_lengths_is_needed() -> None:
    assert refusal(max_new_tokens=None) == "max_new_tokens: it is missing; give max_new_tokens or max_length"


def test_a_session_needs_its_length() -> None:
    with pytest.raises(InvalidParameterError, match="max_length: it is missing; it must be a whole number"):
        parse(SessionParameters, {})


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("max_new_tokens", 0, "0"),
        ("max_new_tokens", -1, "-1"),
        ("max_new_tokens", 1.5, "1.5"),
        ("max_new_tokens", "many", '"many"'),
        ("max_new_tokens", True, "true"),
        ("max_new_tokens", [1], "[1]"),
        ("max_new_tokens", {"a": 1}, '{"a": 1}'),
        ("max_new_tokens", "9" * 5000, f'"{"9" * 59}...'),
        ("max_new_tokens", float("nan"), "NaN"),
        ("max_new_tokens", float("inf"), "Infinity"),
        pytest.param("max_length", -(10**5000), "a huge number", id="huge"),
        ("do_sample", 2, "2"),
        ("do_sample", "maybe", '"maybe"'),
        ("temperature", -0.1, "-0.1"),
        ("temperature", 100.5, "100.5"),
        ("temperature", "nan", '"nan"'),
        ("temperature", "inf", '"inf"'),
        ("temperature", "1e999", '"1e999"'),
        ("temperature", 10**400, f"1{'0' * 59}..."),
        ("temperature", True, "true"),
        ("top_k", -1, "-1"),
        ("top_p", 1.01, "1.01"),
        ("top_p", -1, "-1"),
        ("repetition_penalty", 0, "0"),
        ("repetition_penalty", -1, "-1"),
        ("repetition_penalty", 1e9, "1000000000.0"),
        ("seed", -1, "-1"),
        ("seed", 2**63, str(2**63)),
        ("inputs", 5, "5"),
        ("inputs", ["a"], '["a"]'),
        ("inputs", "\ud800", '"\\ud800"'),
        ("model", 5, "5"),
        ("session_id", 5, "5"),
    ],
)
def test_a_refusal_names_the_parameter_the_value_and_what_would_be_right(
    name: str, value: Any, shown: str
) -> None:
    assert refusal(**{name: value}) == f"{name}: it must be {_EXPECTED[name]}, but {shown} was given"


def test_every_parameter_has_words_for_what_it_may_be() -> None:
    kinds: tuple[type[BaseModel], ...] = (
        GenerationParametersV1,
        GenerationParametersV2,
        SessionParameters,
        SessionReference,
        AnswerParameters,
        AttachParameters,
        StopParameters,
    )
    assert {name for kind in kinds for name in kind.model_fields} == set(_EXPECTED)
