"""One norm, LM head and sampling for the rows of all sessions that wait.

A large LM head is bound by reading its weights, so many rows cost little more than one: it is computed in a
thread, and rows that arrive meanwhile form the next batch. There is no waiting for a batch to fill: what the
swarm sends arrives either together or while a batch is computed (docs/log.md has the measurement). A small head
takes less time than the way to a thread and back: it is computed in the event loop, for all rows of one turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from petals_chat.generation.sampling import Logprobs, TokenSampler, choose_tokens, logprobs_of
from petals_chat.head.modules import ClientModules

MAX_ROWS = 64
"""Bounds the memory of one batch's logits (float32: rows x vocabulary x 4 bytes, several times over)."""
INLINE_SECONDS = 0.001
"""A head whose row takes longer than this goes to the thread."""

_Row = tuple[torch.Tensor, TokenSampler, asyncio.Future[int]]


class HeadBatcher:
    """Turns last hidden states into tokens; use from one event loop.

    Args:
        row_seconds: how long one row takes, see `petals_chat.head.tuning`.
    """

    def __init__(self, modules: ClientModules, *, row_seconds: float) -> None:
        self._modules = modules
        self._waiting: list[_Row] = []
        self._is_scheduled = False
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="head") if row_seconds > INLINE_SECONDS else None
        )
        self._batch_task: asyncio.Task[None] | None = None

    async def next_token(self, hidden_state: torch.Tensor, sampler: TokenSampler) -> int:
        """The token that follows.

        Args:
            hidden_state: output of the last block for the session's last token, [hidden_size].
            sampler: how this session chooses.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[int] = loop.create_future()
        self._waiting.append((hidden_state, sampler, result))
        if self._thread is None:
            if not self._is_scheduled:
                self._is_scheduled = True
                loop.call_soon(self._compute_inline)
        elif self._batch_task is None:
            self._batch_task = asyncio.create_task(self._compute_in_thread(self._thread))
        return await result

    async def logprobs(
        self, hidden_states: torch.Tensor, tokens: Sequence[int], count: int
    ) -> list[Logprobs]:
        """The log probabilities of tokens that are known already, as those of a prompt.

        Args:
            hidden_states: outputs of the last block, [rows, hidden_size].
            tokens: what came after each of them.
            count: how many of the likeliest in their place are told, too.
        """
        described: list[Logprobs] = []
        for start in range(0, len(tokens), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            described += await asyncio.to_thread(self._describe, hidden_states[rows], tokens[rows], count)
        return described

    def _describe(self, hidden_states: torch.Tensor, tokens: Sequence[int], count: int) -> list[Logprobs]:
        with torch.inference_mode():
            return logprobs_of(self._modules.logits(hidden_states), tokens, count)

    def _compute_inline(self) -> None:
        self._is_scheduled = False
        while self._waiting:
            rows = self._next_batch()
            try:
                tokens = self._compute(rows)
            except Exception as error:
                _fail(rows, error)
            else:
                _finish(rows, tokens)

    async def _compute_in_thread(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            rows = self._next_batch()
            try:
                tokens = await loop.run_in_executor(thread, self._compute, rows)
            except Exception as error:
                _fail(rows, error)
            else:
                _finish(rows, tokens)
        self._batch_task = None

    def _next_batch(self) -> list[_Row]:
        batch, self._waiting = self._waiting[:MAX_ROWS], self._waiting[MAX_ROWS:]
        return batch

    def _compute(self, rows: Sequence[_Row]) -> list[int]:
        with torch.inference_mode():
            hidden_states = torch.stack([hidden_state for hidden_state, _, _ in rows])
            return choose_tokens(self._modules.logits(hidden_states), [sampler for _, sampler, _ in rows])

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


def _finish(rows: Sequence[_Row], tokens: Sequence[int]) -> None:
    for (_, _, result), token in zip(rows, tokens, strict=True):
        if not result.done():  # its session may have been cancelled meanwhile
            result.set_result(token)


def _fail(rows: Sequence[_Row], error: Exception) -> None:
    for _, _, result in rows:
        if not result.done():
            result.set_exception(error)
