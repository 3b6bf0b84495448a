"""The generation parameters, which are the same in both APIs.

"A" is answered with "😀世界 machine[END]...", "B" with "! Hello Hello...", "C" with "?" and the end of the text. At
temperature 100 nearly everything is equally likely: what is sampled then is not the known text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Generate = Callable[..., Any]

KNOWN = "😀世界 machine"
HOT = {"inputs": "A", "max_new_tokens": 11, "temperature": 100, "seed": 1}


def text(reply: Any) -> str:
    assert reply["ok"] is True, reply
    outputs: str = reply["outputs"]
    return outputs


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": "reciting"}, {"model": "old/name"}])
def test_a_model_is_found_by_key_and_alias_and_the_first_by_default(
    generate: Generate, model: dict[str, Any]
) -> None:
    assert text(generate(inputs="B", max_new_tokens=2, **model)) == "! Hello"


@pytest.mark.parametrize(
    "greedy",
    [{}, *({"do_sample": value} for value in (0, False, "0", "false", "False", 0.0, None))],
    ids=str,
)
def test_without_sampling_the_text_is_the_likeliest(generate: Generate, greedy: dict[str, Any]) -> None:
    assert text(generate(**HOT, **greedy)) == KNOWN


@pytest.mark.parametrize("value", [1, True, "1", "true", "True", 1.0], ids=repr)
def test_sampling_is_switched_on_in_many_ways(generate: Generate, value: Any) -> None:
    assert text(generate(**HOT, do_sample=value)) != KNOWN


@pytest.mark.parametrize("temperature", [0, 0.0, "0", 1e-30])
def test_a_temperature_of_0_is_greedy(generate: Generate, temperature: Any) -> None:
    assert text(generate(**{**HOT, "do_sample": 1, "temperature": temperature})) == KNOWN


@pytest.mark.parametrize("top_k", [None, 0, "0"])
def test_a_top_k_of_0_or_null_is_off(generate: Generate, top_k: Any) -> None:
    unlimited = text(generate(**HOT, do_sample=1))
    assert text(generate(**HOT, do_sample=1, top_k=top_k)) == unlimited


def test_a_top_k_of_1_leaves_the_likeliest_token_alone(generate: Generate) -> None:
    assert text(generate(**HOT, do_sample=1, top_k=1)) == KNOWN


@pytest.mark.parametrize("top_p", [0, 0.001, "0.001"])
def test_a_small_top_p_leaves_the_likeliest_token_alone(generate: Generate, top_p: Any) -> None:
    assert text(generate(**HOT, do_sample=1, top_p=top_p)) == KNOWN


@pytest.mark.parametrize("top_p", [None, 1, 1.0, "1"])
def test_a_top_p_of_1_or_null_is_off(generate: Generate, top_p: Any) -> None:
    unlimited = text(generate(**HOT, do_sample=1))
    assert text(generate(**HOT, do_sample=1, top_p=top_p)) == unlimited


def test_a_seed_makes_sampling_reproducible(generate: Generate) -> None:
    texts = [text(generate(**{**HOT, "do_sample": 1, "seed": seed})) for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_seed_sampling_differs_from_time_to_time(generate: Generate) -> None:
    unseeded = {**HOT, "do_sample": 1, "seed": None}
    assert text(generate(**unseeded)) != text(generate(**unseeded))


@pytest.mark.parametrize("max_length", [4, 4.0, "4"])
def test_max_length_counts_the_whole_context(generate: Generate, max_length: Any) -> None:
    assert text(generate(inputs="B", max_length=max_length)) == "! Hello Hello"


def test_max_new_tokens_counts_the_new_tokens(generate: Generate) -> None:
    assert text(generate(inputs="B", max_new_tokens=3)) == "! Hello Hello"


@pytest.mark.parametrize("max_length", [1, 60])
def test_max_new_tokens_wins_over_max_length(generate: Generate, max_length: int) -> None:
    assert text(generate(inputs="B", max_new_tokens=2, max_length=max_length)) == "! Hello"


def test_unknown_keys_are_ignored(generate: Generate) -> None:
    unknown = {"num_beams": 4, "max_total_tokens": 9999, "stream": True, "nested": {"a": [None]}, "": 1}
    assert text(generate(inputs="B", max_new_tokens=2, **unknown)) == "! Hello"


def test_the_text_keeps_its_leading_space(generate: Generate) -> None:
    assert text(generate(inputs="Hi!", max_new_tokens=1)) == " Hello"


def test_the_text_of_the_end_of_sequence_is_part_of_the_outputs(generate: Generate) -> None:
    assert text(generate(inputs="C", max_new_tokens=50)) == "?<|endoftext|>"


def test_a_nul_character_is_a_character(generate: Generate) -> None:
    assert text(generate(inputs="\0A", max_new_tokens=4)) == "😀"
