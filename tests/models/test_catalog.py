"""The catalog: every entry is valid as it stands, and ends answers as its model does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from petals_chat.models.catalog import CATALOG, aliases_of
from petals_chat.settings import ModelSettings, load_settings

NO_FILE = Path(os.devnull)


def switched_on(key: str) -> ModelSettings:
    [model] = load_settings(NO_FILE, {}, overrides=[f'models."{key}"=true']).models
    return model


@pytest.mark.parametrize("key", CATALOG)
def test_an_entry_is_valid_and_complete(key: str) -> None:
    model = switched_on(key)
    assert model.key == key
    assert model.repository == key or model.adapter == key
    assert model.family != "Other"
    for url in (model.model_card, model.license):
        assert url is not None
        assert url.startswith("https://")
        assert "{" not in url


def test_all_entries_can_be_on_at_once() -> None:
    settings = load_settings(NO_FILE, {}, overrides=[f'models."{key}"=true' for key in CATALOG])
    assert [model.key for model in settings.models] == list(CATALOG)


def test_the_names_of_2023_still_work() -> None:
    names = {name: key for key, entry in CATALOG.items() for name in (key, *aliases_of(entry))}
    assert names["stabilityai/StableBeluga2"] == "petals-team/StableBeluga2"
    assert names["enoch/llama-65b-hf"] == "huggyllama/llama-65b"
    assert names["bigscience/bloom-petals"] == "bigscience/bloom"
    assert names["bigscience/bloomz-petals"] == "bigscience/bloomz"


def test_models_without_a_chat_template_keep_the_separators_of_2023() -> None:
    chat = switched_on("petals-team/StableBeluga2").chat
    assert (chat.max_session_length, chat.sep_token, chat.stop_token) == (8192, "###", "###")
    assert chat.extra_stop_sequences == ("</s>",)
    generation = chat.generation
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)


def test_bloom_has_shorter_sessions_and_other_defaults() -> None:
    chat = switched_on("bigscience/bloomz").chat
    assert chat.max_session_length == 2048
    assert (chat.generation.temperature, chat.generation.top_p) == (0.75, 0.9)


@pytest.mark.parametrize(
    ("key", "stop_token"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "<|eot_id|>"),
        ("Qwen/Qwen3-32B", "<|im_end|>"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "</s>"),
    ],
)
def test_models_with_a_chat_template_end_answers_as_it_does(key: str, stop_token: str) -> None:
    assert switched_on(key).chat.stop_token == stop_token


def test_only_falcon_180b_may_not_be_offered_through_a_public_api() -> None:
    private = {key for key in CATALOG if not switched_on(key).public_api}
    assert private == {"tiiuae/falcon-180B", "tiiuae/falcon-180B-chat"}


def test_guanaco_is_an_adapter_on_llama_65b() -> None:
    model = switched_on("timdettmers/guanaco-65b")
    assert (model.repository, model.adapter) == ("huggyllama/llama-65b", "timdettmers/guanaco-65b")
