from pathlib import Path

import pytest

from petals_chat.swarm.naming import default_dht_prefix


@pytest.mark.parametrize(
    ("model_type", "repository", "prefix"),
    [
        ("llama", "petals-team/StableBeluga2", "StableBeluga2-hf"),
        ("llama", "meta-llama/Llama-2-70b-chat-hf", "Llama-2-70b-chat-hf"),
        ("llama", "meta-llama/Meta-Llama-3.1-405B-Instruct", "Meta-Llama-3-1-405B-Instruct-hf"),
        ("falcon", "tiiuae/falcon-180B-chat", "falcon-180B-chat"),
        ("bloom", "bigscience/bloom", "bigscience/bloom-petals"),
        ("mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B-Instruct-v0-1"),
        ("qwen3", "Qwen/Qwen3-0.6B", "Qwen3-0-6B"),
    ],
)
def test_repositories_of_the_hub_have_the_names_that_petals_gives_them(
    model_type: str, repository: str, prefix: str
) -> None:
    assert default_dht_prefix(model_type, repository) == prefix


@pytest.mark.parametrize(
    ("model_type", "prefix"),
    [("llama", "my-model-v1-5-hf"), ("bloom", "my-model-v1-5-petals"), ("qwen3", "my-model-v1-5")],
)
def test_a_directory_is_named_like_a_repository_of_its_last_part(
    tmp_path: Path, model_type: str, prefix: str
) -> None:
    directory = tmp_path / "my model.v1.5"
    directory.mkdir()
    assert default_dht_prefix(model_type, f"{directory}/") == prefix
