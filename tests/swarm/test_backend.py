from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.swarm import families
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.usefixtures("petals")


def swarm_config(directory: Path) -> Any:
    from petals.utils.auto_config import AutoDistributedConfig

    families.register(families.FAMILIES["llama"])
    return AutoDistributedConfig.from_pretrained(directory)


def test_a_block_is_loaded_from_its_shard_in_the_wanted_precision(tiny_model: Callable[[str], Path]) -> None:
    from petals_chat.swarm.backend import load_block

    directory = tiny_model("llama")
    assert len(list(directory.glob("*.safetensors"))) > 1
    block = load_block(open_checkpoint(str(directory)), 3, swarm_config(directory), torch.bfloat16)
    stored = {
        name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, stored[f"model.layers.3.{name}"].bfloat16())


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    from petals_chat.swarm.backend import load_block

    directory = write_tiny_model(tmp_path, "llama", num_layers=1)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"lacks the tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        load_block(open_checkpoint(str(directory)), 0, swarm_config(directory), torch.float32)


def test_loading_stops_when_it_is_interrupted(tiny_model: Callable[[str], Path]) -> None:
    from petals.server import server

    from petals_chat.swarm.backend import install_backend

    def interrupt() -> None:
        raise KeyboardInterrupt

    directory = tiny_model("llama")
    install_backend(open_checkpoint(str(directory)), interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.load_pretrained_block(
            str(directory), 0, config=swarm_config(directory), torch_dtype=torch.float32
        )


def test_petals_can_measure_the_throughput_of_a_block(tiny_model: Callable[[str], Path]) -> None:
    from petals.server.throughput import measure_compute_rps
    from petals.utils.convert_block import QuantType

    device = torch.device("cpu")
    for inference in (True, False):
        tokens_per_second = measure_compute_rps(
            swarm_config(tiny_model("llama")),
            device,
            torch.float32,
            quant_type=QuantType.NONE,
            tensor_parallel_devices=(device,),
            n_tokens=4,
            n_steps=2,
            inference=inference,
        )
        assert tokens_per_second > 0
