"""Hosts that compute the steps of many sessions together, beside the pools of released Petals.

    python bench/host_batching.py [--dtype float32] [--rounds 4] [--tokens 32]

Makes a model of 100 million parameters in eight blocks, starts two hosts for it with one thread each, and lets users
generate from one and then the other, in turns, greedily and with prompts of different lengths. Prints a table and, as
the last line, the same as JSON. Ratios are medians over rounds that follow each other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from measuring import percentile
from processes import BENCH, Host, Script

USERS = (1, 8)
BATCHING, RELEASED = "batching", "released"
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
CACHE_TOKENS = 16384
ROUND_LIMIT_SECONDS = 300.0


class ReleasedHost(Host):
    """See released_pools.py."""

    program = (str(BENCH / "released_pools.py"),)


def main() -> None:
    """Measure, print, stop."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        model = write_model(Path(directory, "model"), arguments)
        with contextlib.ExitStack() as processes:
            users = {
                name: start(name, model, arguments.dtype, Path(directory), processes)
                for name in (BATCHING, RELEASED)
            }
            measured = {
                count: take_turns(users, count, arguments.rounds, arguments.tokens) for count in USERS
            }
    print("  users  contender  tok/s  ms between tokens p50, p99  host CPU ms/tok")
    rows = [
        row(count, name, rounds)
        for count, contenders in measured.items()
        for name, rounds in contenders.items()
    ]
    summary = {
        "dtype": arguments.dtype,
        "rows": rows,
        "tokens_per_second_to_released": {
            f"{count} users": ratio(contenders, lambda answers: answers["tokens"] / answers["seconds"])
            for count, contenders in measured.items()
        },
        "host_cpu_per_token_to_released": {
            f"{count} users": ratio(contenders, lambda answers: answers["host_cpu_seconds"])
            for count, contenders in measured.items()
        },
        "texts_identical": {
            "to released": len(texts(measured, 8, (BATCHING, RELEASED))) == 1
            and len(texts(measured, 1, (BATCHING, RELEASED))) == 1,
            "in all rounds": len(texts(measured, 8, (BATCHING,))) == 1,
            "alone and beside others": {user for user, *_ in texts(measured, 8, (BATCHING,))}
            == {user for (user,) in texts(measured, 1, (BATCHING,))},
        },
    }
    print(json.dumps(summary))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of each user in a round")
    parser.add_argument("--hidden-size", type=int, default=SHAPE["hidden_size"], help="for a smaller model")
    return parser.parse_args()


def write_model(directory: Path, arguments: argparse.Namespace) -> Path:
    """A Llama with random weights."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**SHAPE, "hidden_size": arguments.hidden_size})
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    model.save_pretrained(directory)
    return directory


def start(name: str, model: Path, dtype: str, directory: Path, processes: contextlib.ExitStack) -> Script:
    """A host, and the process of its users."""
    place = directory / name
    place.mkdir()
    kind = ReleasedHost if name == RELEASED else Host
    host = processes.enter_context(kind(str(model), dtype, CACHE_TOKENS, place, threads=1))
    ready = host.wait_until_ready()
    options = {"peers": ready.peers, "dht_prefix": ready.dht_prefix, "dtype": dtype, "host": host.pid}
    users = Script("batching_users", place, repository=str(model), **options)
    processes.enter_context(users)
    users.wait_until_ready()
    return users


def take_turns(
    users: dict[str, Script], count: int, rounds: int, tokens: int
) -> dict[str, list[dict[str, Any]]]:
    """What each contender gave in each round; the first round is not counted."""
    prompts = [[(7 * n * n + 31 * n + user) % 2048 for n in range(16 + 12 * user)] for user in range(count)]
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in users}
    for number in range(rounds + 1):
        for name in sorted(users, reverse=bool(number % 2)):
            answers = users[name].ask("generate", ROUND_LIMIT_SECONDS, prompts=prompts, tokens=tokens)
            if number:
                measured[name].append(answers)
    return measured


def row(count: int, name: str, rounds: list[dict[str, Any]]) -> dict[str, object]:
    """Figures of a contender, also printed."""
    tokens = sum(answers["tokens"] for answers in rounds)
    gaps = [1000 * gap for answers in rounds for gap in answers["gaps"]]
    figures = {
        "users": count,
        "contender": name,
        "tokens_per_second": round(tokens / sum(answers["seconds"] for answers in rounds), 1),
        "between_tokens_ms_p50": round(percentile(gaps, 50) or 0, 1),
        "between_tokens_ms_p99": round(percentile(gaps, 99) or 0, 1),
        "host_cpu_ms_per_token": round(
            1000 * sum(answers["host_cpu_seconds"] for answers in rounds) / tokens, 1
        ),
    }
    print(*(f"{value:>9}" for value in figures.values()), flush=True)
    return figures


def texts(
    measured: dict[int, dict[str, list[dict[str, Any]]]], count: int, names: tuple[str, ...]
) -> set[tuple[tuple[int, ...], ...]]:
    """What the users of the rounds with ``count`` of them got, without repetitions; the first is always the same."""
    return {
        tuple(tuple(text) for text in answers["texts"]) for name in names for answers in measured[count][name]
    }


def ratio(contenders: dict[str, list[dict[str, Any]]], figure: Any) -> float:
    """Of batching to released, in neighbouring rounds."""
    pairs = zip(contenders[BATCHING], contenders[RELEASED], strict=True)
    return round(statistics.median(figure(ours) / figure(theirs) for ours, theirs in pairs), 2)


if __name__ == "__main__":
    main()
