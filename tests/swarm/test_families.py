"""Every family of the registry: what a host computes is what transformers computes."""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.errors import ConfigurationError, ModelUnavailableError
from petals_chat.head.modules import load_client_modules
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.protocol.messages import GenerationRequest
from petals_chat.settings import Dtype, EngineSettings, ModelSettings, Settings
from petals_chat.swarm import families
from petals_chat.swarm.host_options import HostReady
from tests.swarm.conftest import AskClient
from tests.swarm.forked_hosts import ForkedHosts
from tests.tiny_models import KINDS, greedy_tokens, load_reference, write_tiny_model
from tests.tiny_tokenizers import save_tokenizer

CPU = torch.device("cpu")
PROMPTS = [
    [(seed * i * i + 31 * i) % 512 for i in range(length)]
    for seed, length in ((7, 40), (3, 5), (11, 150), (13, 1), (5, 65), (17, 33))
]
"""Some fit into the models' windows; one is longer than a window, than a step of the client's, and than the pieces in
which a host computes steps."""
CLIENT_STEP_TOKENS = 64
SERVED_KINDS = {kind.model_type: name for name, kind in KINDS.items()}
"""For each family the last of its kinds, the one that differs most from the others."""
NEW_TOKENS = 24

pytestmark = pytest.mark.usefixtures("petals")


def run_blocks(
    directory: Path, sequences: Sequence[torch.Tensor], turns: list[list[int]]
) -> list[torch.Tensor]:
    """Send sequences [rows, length, hidden] through the blocks as a host runs them.

    Args:
        turns: for each batch, how many tokens of each sequence are in it.
    """
    from petals_chat.swarm.backend import load_block
    from petals_chat.swarm.blocks import Batch, KeysValues, Piece

    checkpoint = open_checkpoint(str(directory))
    config = swarm_config(directory)
    blocks: list[Any] = [
        load_block(checkpoint, n, config, torch.float32) for n in range(checkpoint.num_blocks)
    ]
    shape = families.key_value_heads(config), families.head_size(config)
    caches = [
        [
            KeysValues(*(torch.full((rows, shape[0], length + 3, shape[1]), torch.nan) for _ in range(2)))
            for rows, length, _ in (sequence.shape for sequence in sequences)
        ]
        for _ in blocks
    ]
    done = [0] * len(sequences)
    outputs: list[list[torch.Tensor]] = [[] for _ in sequences]
    for lengths in turns:
        members = [n for n, length in enumerate(lengths) if length]
        pieces = [
            Piece(done[n], lengths[n], room=sequences[n].shape[1], rows=sequences[n].shape[0])
            for n in members
        ]
        states = [sequences[n][:, done[n] : done[n] + lengths[n]].flatten(0, 1) for n in members]
        hidden_states, batch = torch.cat(states)[None], Batch(pieces, CPU)
        for block, of_block in zip(blocks, caches, strict=True):
            hidden_states = block.step(hidden_states, batch, [of_block[n] for n in members])
        for n, piece, output in zip(
            members, pieces, torch.split(hidden_states[0], [piece.tokens for piece in pieces]), strict=True
        ):
            outputs[n].append(output.view(piece.rows, piece.length, -1))
            done[n] += piece.length
    return [torch.cat(parts, dim=1) for parts in outputs]


def swarm_config(directory: Path) -> transformers.PretrainedConfig:
    from petals.utils.auto_config import AutoDistributedConfig

    families.register(families.family_of(open_checkpoint(str(directory)).model_type))
    return AutoDistributedConfig.from_pretrained(directory)


@pytest.mark.parametrize("model_type", families.supported_model_types())
def test_every_family_has_a_tiny_model(model_type: str) -> None:
    assert model_type in {kind.model_type for kind in KINDS.values()}


@pytest.fixture(scope="module")
def reference(tiny_model: Callable[[str], Path]) -> Iterator[Callable[[str], Any]]:
    """The model of a kind as transformers runs it, in one thread: these models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield functools.cache(lambda kind: load_reference(tiny_model(kind)))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_blocks_compute_what_transformers_computes(
    tiny_model: Callable[[str], Path], reference: Callable[[str], Any], kind: str
) -> None:
    directory = tiny_model(kind)
    prompt = PROMPTS[2][:80]
    two_rows = torch.tensor([prompt, prompt[::-1]])  # a mix-up of rows would show
    prompts = [two_rows, torch.tensor([PROMPTS[0]]), torch.tensor([PROMPTS[2]])]
    ends = load_client_modules(open_checkpoint(str(directory)), device=CPU, dtype=torch.float32)
    embeddings = [torch.cat([ends.embed(row) for row in tokens.tolist()]) for tokens in prompts]
    outputs = run_blocks(
        directory,
        embeddings,
        # long and short pieces beside single tokens, sessions that come later, rest and end earlier
        [[9, 40, 0], [40, 0, 100], [1, 0, 1], [1, 0, 1], [29, 0, 1], [0, 0, 46], [0, 0, 1]],
    )
    for tokens, output in zip(prompts, outputs, strict=True):
        torch.testing.assert_close(ends.logits(output), reference(kind)(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SERVED_KINDS.values())
@torch.no_grad()
def test_blocks_without_caches_compute_what_transformers_computes(
    tiny_model: Callable[[str], Path], reference: Callable[[str], Any], kind: str
) -> None:
    from petals_chat.swarm.backend import load_block

    checkpoint = open_checkpoint(str(tiny_model(kind)))
    config = swarm_config(tiny_model(kind))
    prompts = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    ends = load_client_modules(checkpoint, device=CPU, dtype=torch.float32)
    states = torch.cat([ends.embed(row) for row in prompts.tolist()])
    for index in range(checkpoint.num_blocks):
        (states,) = load_block(checkpoint, index, config, torch.float32)(states)
    torch.testing.assert_close(ends.logits(states), reference(kind)(prompts).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def chains(tiny_model: Callable[[str], Path]) -> Iterator[dict[str, HostReady]]:
    """For each family a swarm of two hosts, with blocks 0:2 and 2:4; the first host's address."""
    with ForkedHosts() as hosts:
        starting = {kind: hosts.start(tiny_model(kind), "--blocks=0:2") for kind in SERVED_KINDS.values()}
        firsts = {kind: hosts.wait(host) for kind, host in starting.items()}
        seconds = [
            hosts.start(tiny_model(kind), "--blocks=2:4", initial_peers=first.peers)
            for kind, first in firsts.items()
        ]
        for host in seconds:
            hosts.wait(host)
        yield firsts


@pytest.mark.parametrize("model_type", families.supported_model_types())
def test_two_chained_hosts_generate_what_transformers_generates(
    tiny_model: Callable[[str], Path],
    reference: Callable[[str], Any],
    chains: dict[str, HostReady],
    ask: AskClient,
    model_type: str,
) -> None:
    kind = SERVED_KINDS[model_type]
    expected = [greedy_tokens(reference(kind), prompt, NEW_TOKENS) for prompt in PROMPTS]
    answers = ask(
        tiny_model(kind),
        chains[kind],
        PROMPTS,
        chunk=CLIENT_STEP_TOKENS,
        new_tokens=NEW_TOKENS,
        request_timeout=60,
    )
    assert answers == expected


@pytest.mark.parametrize(("kind", "head_size"), [("qwen3", 32), ("qwen3_wide_head", 40)])
def test_petals_reserves_attention_cache_for_heads_of_their_true_size(
    tiny_model: Callable[[str], Path], kind: str, head_size: int
) -> None:
    config = swarm_config(tiny_model(kind))
    assert config.hidden_size // config.num_key_value_groups == 2 * head_size


def test_an_adapter_or_a_quantisation_finds_all_large_weights_in_linear_layers(
    tiny_model: Callable[[str], Path],
) -> None:
    from petals_chat.swarm.blocks import make_block_class

    for kind, name in SERVED_KINDS.items():
        block = make_block_class(families.FAMILIES[kind])(swarm_config(tiny_model(name)))
        linear = {id(module.weight) for module in block.modules() if isinstance(module, torch.nn.Linear)}
        others = [
            name for name, weight in block.named_parameters() if weight.dim() > 1 and id(weight) not in linear
        ]
        assert others in ([], ["mlp.gate.weight"])  # the router of a mixture of experts stays as it is


def test_the_documentation_names_every_model_type() -> None:
    text = " ".join(Path("docs/configuration.md").read_text().split())
    *others, last = families.supported_model_types()
    assert f"the `model_type`s {', '.join(others)} and {last}, with" in text


@pytest.fixture(scope="module")
def unsupported_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a type that is not in the registry."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}
    config = transformers.GPTNeoXConfig(**sizes, num_hidden_layers=2)
    directory = tmp_path_factory.mktemp("models") / "unsupported"
    transformers.GPTNeoXForCausalLM(config).save_pretrained(directory)
    return directory


ALL_TYPES = ", ".join(families.supported_model_types())


def test_a_host_refuses_other_model_types_with_the_list_of_those_it_serves(unsupported_model: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "petals_chat", "host", str(unsupported_model), "--new-swarm"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "cannot serve models of type 'gpt_neox'" in result.stderr
    assert result.stderr.endswith(f": {ALL_TYPES}\n")


async def test_a_gateway_refuses_other_model_types_with_the_list_of_those_it_serves(
    unsupported_model: Path, chains: dict[str, HostReady], tmp_path: Path
) -> None:
    peers = next(iter(chains.values())).peers
    models = [
        ModelSettings(key=key, repository=str(unsupported_model), name=key, initial_peers=initial_peers)
        for key, initial_peers in (("in a swarm of hosts", peers), ("in a swarm of its own", ()))
    ]
    engine_settings = EngineSettings(data_dir=tmp_path, dtype=Dtype.FLOAT32, threads=1)
    async with ProcessEngine(Settings(models=tuple(models), engine=engine_settings)) as engine:
        await engine.wait_until_settled()
        for model in models:
            with pytest.raises(ModelUnavailableError) as raised:
                await engine.open_session(model.key, 64)
            assert str(raised.value.__cause__).endswith(f": {ALL_TYPES}")


async def test_a_context_that_becomes_a_long_one_gets_the_frequencies_of_long_ones(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", "phi3_long", vocab_size=400)
    tokenizer = save_tokenizer("byte_level", directory)
    short = open_checkpoint(str(directory)).short_context
    assert short == 64
    prompt = "Hello! " * 6
    tokens = tokenizer(prompt)["input_ids"]
    assert len(tokens) < short - 8
    expected = greedy_tokens(load_reference(directory), tokens, new_tokens=60)
    model = ModelSettings(key="long", repository=str(directory), name="Long", initial_peers=())
    engine_settings = EngineSettings(data_dir=tmp_path, dtype=Dtype.FLOAT32, threads=1)
    async with ProcessEngine(Settings(models=(model,), engine=engine_settings)) as engine:
        await engine.wait_until_settled()
        session = await engine.open_session("long", 400)
        request = GenerationRequest(prompt, max_new_tokens=60, chunk_tokens=1)
        text = "".join([chunk.text async for chunk in session.generate(request)])
        await session.close()
    whole: str = tokenizer.decode(tokens + expected)
    assert text == whole.removeprefix(prompt)


def test_rope_that_changes_the_past_is_refused(tmp_path: Path) -> None:
    from petals_chat.swarm.backend import load_block

    rope = {"rope_type": "dynamic", "factor": 2.0}
    directory = write_tiny_model(tmp_path, "llama", num_layers=1, rope_scaling=rope)
    with pytest.raises(ConfigurationError, match="rope type 'dynamic' cannot be served"):
        load_block(open_checkpoint(str(directory)), 0, swarm_config(directory), torch.float32)
