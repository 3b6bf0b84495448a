"""Greedy text through a real worker and a real swarm equals that of local transformers, token for token."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.protocol.messages import FinishReason, GenerationRequest, SamplingParameters
from tests.engine.conftest import PREFILL_CHUNK_TOKENS, SESSION_TOKENS
from tests.engine.generating import collect, text_of
from tests.tiny_tokenizers import TOKENIZERS

PROMPTS = ["Hello, how are you", "你好 👋 many machines", "The quick brown fox " * 8]


class LocalModel:
    """transformers on the same checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def generate(self, tokens: list[int], max_new_tokens: int, **options: Any) -> list[int]:
        ids = torch.tensor([tokens])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        new: list[int] = output[0, len(tokens) :].tolist()
        return new

    def text_after(self, tokens: list[int], new: list[int]) -> str:
        """What ``new`` tokens add to the text of ``tokens``."""
        before: str = self.tokenizer.decode(tokens)
        text: str = self.tokenizer.decode(tokens + new)
        return text.rstrip("\N{REPLACEMENT CHARACTER}")[len(before) :]


@pytest.fixture(scope="module")
def local_models(checkpoints: dict[str, Path]) -> dict[str, LocalModel]:
    return {kind: LocalModel(directory) for kind, directory in checkpoints.items()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 3])
async def test_a_generation_equals_local_transformers(
    engine: ProcessEngine,
    local_models: dict[str, LocalModel],
    kind: str,
    prompt: str,
    chunk_tokens: int | None,
) -> None:
    local = local_models[kind]
    tokens = local.tokenizer(prompt)["input_ids"]
    expected = local.generate(tokens, 40)
    session = await engine.open_session(kind, SESSION_TOKENS)
    chunks = await collect(session, GenerationRequest(prompt, max_new_tokens=40, chunk_tokens=chunk_tokens))
    await session.close()
    assert sum(chunk.token_count for chunk in chunks) == len(expected)
    assert chunks[-1].prompt_tokens == len(tokens)
    assert text_of(chunks).rstrip("\N{REPLACEMENT CHARACTER}") == local.text_after(tokens, expected)


@pytest.mark.parametrize("kind", TOKENIZERS)
async def test_a_session_continued_over_several_requests_equals_local_transformers(
    engine: ProcessEngine, local_models: dict[str, LocalModel], kind: str
) -> None:
    local = local_models[kind]
    session = await engine.open_session(kind, SESSION_TOKENS)
    tokens: list[int] = []
    for inputs, count in [("Hello, swarm", 7), (None, 5), (" and you? 你", 9), (None, 1), ("!" * 40, 12)]:
        if inputs is not None:
            tokens += local.tokenizer(inputs, add_special_tokens=not tokens)["input_ids"]
        expected = local.generate(tokens, count)
        chunks = await collect(session, GenerationRequest(inputs, max_new_tokens=count, chunk_tokens=1))
        assert sum(chunk.token_count for chunk in chunks) == len(expected)
        # Characters that a request's end cuts come with the next one, so compare whole texts at the end only.
        tokens += expected
    await session.close()
    assert len(tokens) > PREFILL_CHUNK_TOKENS * 2


async def test_a_repetition_penalty_counts_the_whole_session(
    engine: ProcessEngine, local_models: dict[str, LocalModel]
) -> None:
    local = local_models["byte_fallback"]
    sampling = SamplingParameters(repetition_penalty=1.5)
    session = await engine.open_session("byte_fallback", SESSION_TOKENS)
    tokens = local.tokenizer("Hello machines")["input_ids"]
    for inputs in ("Hello machines", None):
        expected = local.generate(tokens, 12, repetition_penalty=1.5)
        chunks = await collect(session, GenerationRequest(inputs, sampling, max_new_tokens=12))
        assert text_of(chunks) == local.text_after(tokens, expected)
        tokens += expected
    await session.close()


async def test_many_sessions_at_once_each_get_their_own_text(
    engine: ProcessEngine, local_models: dict[str, LocalModel]
) -> None:
    local = local_models["byte_level"]

    async def chat(number: int) -> tuple[str, str]:
        prompt = f"{number} machines " * (number + 1)
        tokens = local.tokenizer(prompt)["input_ids"]
        session = await engine.open_session("byte_level", SESSION_TOKENS)
        chunks = await collect(session, GenerationRequest(prompt, max_new_tokens=20, chunk_tokens=1))
        await session.close()
        return text_of(chunks), local.text_after(tokens, local.generate(tokens, 20))

    for text, expected in await asyncio.gather(*(chat(number) for number in range(8))):
        assert text.rstrip("\N{REPLACEMENT CHARACTER}") == expected


async def test_a_session_that_outgrows_its_room_in_the_swarm_continues_identically(
    engine: ProcessEngine, local_models: dict[str, LocalModel]
) -> None:
    local = local_models["byte_level"]
    tokens = local.tokenizer("many machines run")["input_ids"]
    count = SESSION_TOKENS - len(tokens)
    session = await engine.open_session("byte_level", SESSION_TOKENS)
    chunks = await collect(
        session, GenerationRequest("many machines run", max_new_tokens=10_000, chunk_tokens=1)
    )
    await session.close()
    expected = local.generate(tokens, count)
    assert text_of(chunks).rstrip("\N{REPLACEMENT CHARACTER}") == local.text_after(tokens, expected)
    assert chunks[-1].finish_reason in (FinishReason.CONTEXT_FULL, FinishReason.END_OF_SEQUENCE)


async def test_a_seed_makes_a_generation_reproducible(engine: ProcessEngine) -> None:
    async def sample(seed: int) -> str:
        session = await engine.open_session("byte_level", SESSION_TOKENS)
        sampling = SamplingParameters(do_sample=True, temperature=1.5, seed=seed)
        chunks = await collect(session, GenerationRequest("Hello", sampling, max_new_tokens=20))
        await session.close()
        return text_of(chunks)

    assert await sample(1) == await sample(1)
    assert await sample(1) != await sample(2)
