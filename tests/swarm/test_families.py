from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.swarm import families
from tests.tiny_models import KINDS, load_reference

PROMPT = [(7 * i * i + 31 * i) % 512 for i in range(40)]


pytestmark = pytest.mark.usefixtures("petals")


def run_blocks(directory: Path, hidden_states: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Send [batch, length, hidden] through the blocks as a host runs them, in pieces of these lengths."""
    from petals_chat.swarm.backend import load_block

    checkpoint = open_checkpoint(str(directory))
    config = swarm_config(directory)
    for index in range(checkpoint.num_blocks):
        block = load_block(checkpoint, index, config, torch.float32)
        outputs, past = [], None
        for piece in torch.split(hidden_states, pieces, dim=1):
            output, past = block(piece, layer_past=past, use_cache=True)
            outputs.append(output)
        hidden_states = torch.cat(outputs, dim=1)
    return hidden_states


def swarm_config(directory: Path) -> transformers.PretrainedConfig:
    from petals.utils.auto_config import AutoDistributedConfig

    model_type = open_checkpoint(str(directory)).config["model_type"]
    families.register(families.family_of(model_type))
    return AutoDistributedConfig.from_pretrained(directory)


def test_every_family_has_a_tiny_model() -> None:
    assert {kind.model_type for kind in KINDS.values()} == set(families.supported_model_types())


@pytest.mark.parametrize("pieces", [[40], [9, 20, 1, 1, 9]], ids=["at once", "in pieces"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_blocks_compute_what_transformers_computes(
    tiny_model: Callable[[str], Path], kind: str, pieces: list[int]
) -> None:
    directory = tiny_model(kind)
    model = load_reference(directory)
    prompts = torch.tensor([PROMPT, PROMPT[::-1]])  # a batch shows a mix-up of rows
    output = run_blocks(directory, model.get_input_embeddings()(prompts), pieces)
    logits = model.lm_head(model.model.norm(output))
    torch.testing.assert_close(logits, model(prompts).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "head_size"), [("qwen3", 32), ("qwen3_wide_head", 40)])
def test_petals_reserves_attention_cache_for_heads_of_their_true_size(
    tiny_model: Callable[[str], Path], kind: str, head_size: int
) -> None:
    config = swarm_config(tiny_model(kind))
    assert config.hidden_size // config.num_key_value_groups == 2 * head_size


def test_a_model_type_without_family_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(ConfigurationError, match=r"'gpt_neox'.* llama, mistral, qwen2, qwen3$"):
        families.family_of("gpt_neox")
