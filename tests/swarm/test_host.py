from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from petals_chat.swarm.join_token import JoinToken, decode_token, encode_token
from tests.swarm.conftest import AskClient
from tests.swarm_processes import STOP_TIMEOUT_SECONDS, HostProcess, running_host
from tests.tiny_models import greedy_tokens, load_reference

PROMPTS = [
    [(seed * i * i + 31 * i) % 512 for i in range(length)] for seed, length in ((7, 40), (3, 5), (11, 150))
]
NEW_TOKENS = 24
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDf3X6jWcvvVjk4FmRsxxjNdjVzKbZBtkpph67men6VX4"


@contextlib.contextmanager
def _starting(model: Path, *arguments: str, initial_peers: tuple[str, ...] = ()) -> Iterator[HostProcess]:
    host = HostProcess(model, *arguments, initial_peers=initial_peers)
    try:
        yield host
    finally:
        host.release()


def test_one_host_serves_many_sessions_at_once(
    tiny_model: Callable[[str], Path], tmp_path: Path, ask: AskClient
) -> None:
    directory = tiny_model("qwen3_wide_head")
    model = load_reference(directory)
    prompts = [prompt[shift:] for prompt in PROMPTS for shift in (0, 1, 2)]
    expected = [greedy_tokens(model, prompt, NEW_TOKENS) for prompt in prompts]
    adapter = write_adapter(tmp_path / "adapter", model)
    with_adapter = [greedy_tokens(model, prompt, NEW_TOKENS) for prompt in prompts]
    assert with_adapter != expected

    with running_host(directory, f"--adapters={adapter}") as host:
        assert ask(directory, host, prompts) == expected
        assert ask(directory, host, prompts, adapter=str(adapter)) == with_adapter


def write_adapter(directory: Path, model: Any) -> Path:
    """Write a LoRA adapter as PEFT does, and merge it into ``model``."""
    rank, alpha = 4, 8
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for index, layer in enumerate(model.model.layers):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            weight = layer.get_submodule(name).weight
            down = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
            up = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            prefix = f"base_model.model.model.layers.{index}.{name}"
            tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
            weight.data += alpha / rank * up @ down
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_the_ready_line_says_what_is_served_and_where(
    tiny_model: Callable[[str], Path],
) -> None:
    with running_host(tiny_model("llama31"), "--blocks=0:2") as ready:
        pass
    assert (ready.start, ready.end, ready.num_blocks) == (0, 2, 4)
    assert (ready.dtype, ready.device) == ("float32", "cpu")
    assert ready.dht_prefix == "tiny-llama31-v1-hf"
    assert ready.peers[0].startswith("/ip4/127.0.0.1/tcp/")
    assert ready.join_token is not None
    token = decode_token(ready.join_token)
    assert (token.name, token.peers) == (ready.dht_prefix, ready.peers)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def test_a_busy_host_stops_on_sigterm_and_comes_back_at_the_same_address(
    tiny_model: Callable[[str], Path], tmp_path: Path, ask: AskClient
) -> None:
    model = tiny_model("llama")
    arguments = [f"--port={free_port()}", f"--identity={tmp_path}/keys/host.id"]
    with _starting(model, *arguments) as host, ThreadPoolExecutor(1) as background:
        ready = host.wait_until_ready()
        (address,) = ready.peers
        generating = background.submit(ask, model, ready, PROMPTS, new_tokens=5000)
        idle_cpu_seconds = host.cpu_seconds()
        while host.cpu_seconds() < idle_cpu_seconds + 0.5:
            time.sleep(0.01)
        assert len(host.family()) >= 4  # itself, the DHT process, p2pd, a handler
        host.send(signal.SIGTERM)
        assert host.wait() == 0
        assert host.stderr() == ""
        assert host.survivors() == []
        assert generating.exception() is not None

    lines, errors = _host_until_ctrl_c(model, *arguments)
    assert lines[0].startswith("Loading blocks 0:4 of ")
    assert lines[1] == "Serving blocks 0:4 of 4. Ctrl-C stops."
    token = lines[3].split(" --join ")[1]
    assert lines[3] == f"    petals-chat host DIRECTORY --join {token}"
    assert decode_token(token).peers == (address,)
    assert lines[7] == f'    initial_peers = ["{address}"]'
    assert errors == ""


def _host_until_ctrl_c(model: Path, *arguments: str) -> tuple[list[str], str]:
    """What a person reads who starts a host in a terminal, waits until it serves, and presses Ctrl-C."""
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "petals_chat", "host", str(model), "--new-swarm"),
            *("--address=127.0.0.1", "--dtype=float32", *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as host:
        assert host.stdout is not None
        lines = [host.stdout.readline().rstrip() for _ in range(8)]
        os.killpg(host.pid, signal.SIGINT)  # as a terminal does
        errors = host.communicate(timeout=STOP_TIMEOUT_SECONDS)[1]
    assert host.returncode == 0
    return lines, errors


def test_nothing_is_left_of_a_host_that_is_killed(tiny_model: Callable[[str], Path]) -> None:
    with _starting(tiny_model("llama")) as host:
        host.wait_until_ready()
        assert len(host.family()) >= 4
        host.send(signal.SIGKILL)
        host.wait()
        assert host.survivors() == []


def test_a_host_whose_p2pd_dies_ends_with_an_error(tiny_model: Callable[[str], Path]) -> None:
    with _starting(tiny_model("llama")) as host:
        host.wait_until_ready()
        for process in host.family():
            if process.name() == "p2pd":
                process.kill()
        assert host.process.wait(15) == 1
        assert host.stderr() == "petals-chat: the process that connects this host to its swarm has ended\n"
        assert host.survivors() == []


@pytest.mark.parametrize("processes", [1, 3], ids=["while it imports", "while it joins the swarm"])
def test_a_host_can_be_stopped_while_it_starts(tiny_model: Callable[[str], Path], processes: int) -> None:
    with _starting(tiny_model("llama")) as host:
        while not host.catches(signal.SIGTERM) or len(host.family()) < processes:
            time.sleep(0.01)
        host.send(signal.SIGTERM)
        assert host.wait() == 0
        assert host.read_ready_line() is None
        assert host.stderr() == ""
        assert host.survivors() == []


def test_a_parent_reads_why_a_host_cannot_start(tmp_path: Path) -> None:
    with _starting(tmp_path / "nowhere") as host:
        line = host.read_ready_line()
        assert line is not None
        assert line["error"]["code"] == "invalid_configuration"
        assert "nowhere does not exist" in line["error"]["message"]
        assert host.wait() == 2
        assert host.stderr() == ""  # the parent tells it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the MODEL to serve, or the swarm to join with --join TOKEN"),
        (["{llama}", "--join=abc"], "this is no join token"),
        (["{llama}", "--join={token}", "--public"], "not allowed with"),
        (["--join={token}", "--dht-prefix=other"], "--dht-prefix: the join token says it already"),
        (["{llama}", "--relay=always"], "only the public swarm has members that relay"),
        (["{llama}", "--public-ip=192.0.2.1"], "--public-ip needs a fixed --port"),
        (["{llama}", "--blocks=0:2", "--num-blocks=2"], "not allowed with"),
        (["{llama}", "--memory=much"], "'much' is not a size like 12GiB"),
        (["{llama}", "--memory=300kB"], "not even one block fits: it takes "),
        (["{llama}", "--new-swarm", "--public"], "not allowed with"),
        (["/no/such/directory", "--new-swarm"], "/no/such/directory does not exist"),
        (["{other}", "--new-swarm"], "cannot serve models of type 'gpt_neox'"),
        (["{llama}", "--new-swarm", "--blocks=2:9"], "--blocks 2:9: the model has blocks 0:4"),
        (["{llama}", "--new-swarm", "--blocks=all"], "'all' is not like 0:4"),
        (["{llama}", "--new-swarm", "--address=localhost"], "'localhost' is not an IP address"),
        (["{llama}", "--new-swarm", "--address=127.0.0.1", "--port={port}"], "Address already in use"),
        (["{llama}", "--initial-peers", "example.org"], "'example.org' is not like /ip4/"),
        (["{llama}", "--new-swarm", "--device=cpu", "--quantization=nf4"], "on a CUDA device only"),
        (["{llama}", "--new-swarm", "--cache-tokens=0"], "'0' is not a number greater than 0"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    tiny_model: Callable[[str], Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt_neox", "num_hidden_layers": 2}')
    save_file({"weight": torch.zeros(1)}, other / "model.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        values = {
            "llama": tiny_model("llama"),
            "other": other,
            "port": listening.getsockname()[1],
            "token": encode_token(JoinToken("name", bytes(8), (NOBODY,))),
        }
        result = _run_host(*(argument.format(**values) for argument in arguments))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_initial_peers_that_do_not_answer_are_named(tiny_model: Callable[[str], Path]) -> None:
    result = _run_host(str(tiny_model("llama")), "--initial-peers", NOBODY)
    assert result.returncode == 1
    assert result.stderr.startswith(f"petals-chat: none of the initial peers can be reached: {NOBODY} (")
    assert len(result.stderr.splitlines()) == 1


def _run_host(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "petals_chat", "host", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
