"""Greedy text over both APIs equals that of transformers on the same weights, for each kind of tokenizer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from websockets.sync.client import ClientConnection

from tests.contract.conftest import PREFILL_CHUNK_TOKENS, RANDOM_SESSION_TOKENS
from tests.contract.wire import receive
from tests.engine.test_exactness import LocalModel
from tests.tiny_tokenizers import TOKENIZERS

Generate = Callable[..., Any]
OpenSession = Callable[..., str]

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
LONG_PROMPT = "The quick brown fox " * 5
TURNS = [("Hello, swarm", 7), (None, 5), (" and you? 你", 9), (None, 1), (None, 4), ("!" * 30, 12)]
"""New text or none, and how many tokens follow it."""


@pytest.fixture(scope="module")
def local_models(checkpoints: dict[str, Path]) -> Iterator[dict[str, LocalModel]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small models, more only wait for each other
    yield {kind: LocalModel(checkpoints[kind]) for kind in TOKENIZERS}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["Hello, how are you", "你好 👋 many machines", LONG_PROMPT])
def test_text_equals_that_of_transformers(
    generate: Generate, local_models: dict[str, LocalModel], kind: str, prompt: str
) -> None:
    local = local_models[kind]
    tokens = local.tokenizer(prompt)["input_ids"]
    assert prompt != LONG_PROMPT or len(tokens) > PREFILL_CHUNK_TOKENS
    reply = generate(model=kind, inputs=prompt, max_new_tokens=30)
    expected = local.text_after(tokens, local.generate(tokens, 30))
    assert reply["outputs"].rstrip(REPLACEMENT_CHARACTER) == expected


def test_far_too_many_tokens_are_cut_down_to_what_the_model_allows(
    generate: Generate, local_models: dict[str, LocalModel]
) -> None:
    local = local_models["byte_fallback"]
    tokens = local.tokenizer("Hello machines")["input_ids"]
    expected = local.text_after(tokens, local.generate(tokens, RANDOM_SESSION_TOKENS - len(tokens)))
    for max_new_tokens in (4096, 10**30):
        reply = generate(model="byte_fallback", inputs="Hello machines", max_new_tokens=max_new_tokens)
        assert reply["outputs"] == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_stream_token_by_token_equals_transformers(
    websocket: ClientConnection, local_models: dict[str, LocalModel], kind: str
) -> None:
    local = local_models[kind]
    tokens = local.tokenizer(LONG_PROMPT)["input_ids"]
    expected = local.text_after(tokens, local.generate(tokens, 40))
    websocket.send(json.dumps({"type": "open_inference_session", "model": kind, "max_length": 128}))
    assert receive(websocket) == {"ok": True}
    request = {"type": "generate", "inputs": LONG_PROMPT, "max_new_tokens": 1, "stop_sequence": "\0"}
    websocket.send(json.dumps(request))
    text, count = "", 0
    while count < 40:
        reply = receive(websocket)
        text, count = text + reply["outputs"], count + reply["token_count"]
        if reply["stop"]:
            break
    assert text.startswith(expected)


@pytest.fixture(scope="module")
def expected_turns(local_models: dict[str, LocalModel]) -> dict[str, list[str]]:
    """By kind: what transformers puts behind each new input, over all requests up to the next input."""

    def texts(local: LocalModel) -> Iterator[str]:
        tokens: list[int] = []
        for turn in _by_input(TURNS):
            inputs = turn[0][0]
            tokens += local.tokenizer(inputs, add_special_tokens=not tokens)["input_ids"]
            generated = local.generate(tokens, sum(count for _, count in turn))
            yield local.text_after(tokens, generated)
            tokens += generated

    return {kind: list(texts(local)) for kind, local in local_models.items()}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_continued_v1_session_equals_transformers(
    http: httpx.Client, open_session: OpenSession, expected_turns: dict[str, list[str]], kind: str
) -> None:
    session_id = open_session(model=kind, max_length=RANDOM_SESSION_TOKENS)
    request = {"session_id": session_id, "model": kind}
    outputs = []
    for inputs, max_new_tokens in TURNS:
        parameters = {"inputs": inputs, "max_new_tokens": max_new_tokens}
        outputs.append(http.post("/api/v1/generate", json=request | parameters).json()["outputs"])
    assert joined_turns(outputs) == expected_turns[kind]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_continued_v2_session_equals_transformers(
    websocket: ClientConnection, expected_turns: dict[str, list[str]], kind: str
) -> None:
    opening = {"type": "open_inference_session", "model": kind, "max_length": RANDOM_SESSION_TOKENS}
    websocket.send(json.dumps(opening))
    for inputs, max_new_tokens in TURNS:
        request = {"type": "generate", "inputs": inputs, "max_new_tokens": max_new_tokens}
        websocket.send(json.dumps(request))
    assert receive(websocket) == {"ok": True}
    outputs = [receive(websocket)["outputs"] for _ in TURNS]
    assert joined_turns(outputs) == expected_turns[kind]


def test_a_repetition_penalty_counts_prompt_and_answers_of_the_session(
    http: httpx.Client, open_session: OpenSession, local_models: dict[str, LocalModel]
) -> None:
    local = local_models["byte_fallback"]
    session_id = open_session(model="byte_fallback", max_length=RANDOM_SESSION_TOKENS)
    request = {"model": "byte_fallback", "session_id": session_id, "max_new_tokens": 12}
    tokens = local.tokenizer("Hello machines")["input_ids"]
    for inputs in ("Hello machines", None):
        expected = local.generate(tokens, 12, repetition_penalty=1.5)
        reply = http.post(
            "/api/v1/generate", json={**request, "inputs": inputs, "repetition_penalty": 1.5}
        ).json()
        assert reply["outputs"] == local.text_after(tokens, expected)
        tokens += expected


def joined_turns(outputs: Sequence[str]) -> list[str]:
    """Outputs of one request each, as the text behind each new input; without half a character at its end."""
    remaining = iter(outputs)
    return [
        "".join(itertools.islice(remaining, len(turn))).rstrip(REPLACEMENT_CHARACTER)
        for turn in _by_input(TURNS)
    ]


def _by_input(turns: Sequence[tuple[str | None, int]]) -> list[list[tuple[str | None, int]]]:
    starts = [index for index, (inputs, _) in enumerate(turns) if inputs is not None]
    return [list(turns[start:end]) for start, end in itertools.pairwise([*starts, len(turns)])]
