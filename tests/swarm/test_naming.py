from pathlib import Path

import pytest

from petals_chat.swarm.naming import default_dht_prefix, is_peer_id


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


@pytest.mark.parametrize(
    "peer_id",
    [
        "12D3KooWHQ73vpdGi26dkTMyf3zarCVW5iN7We6XvyDfDDGk9Mbz",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    ],
)
def test_peer_ids_of_both_kinds_are_known(peer_id: str) -> None:
    assert is_peer_id(peer_id)
    assert not is_peer_id(peer_id[:-1])
    assert not is_peer_id(peer_id + "1")
    assert not is_peer_id(f" {peer_id}")


@pytest.mark.parametrize("text", ["", "hello", "1" * 46, "0" * 46, "é" * 46, "Q" * 10**6])
def test_other_texts_are_no_peer_ids(text: str) -> None:
    assert not is_peer_id(text)
