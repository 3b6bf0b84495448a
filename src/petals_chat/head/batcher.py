"""One norm, LM head and sampling for the rows of all sessions that wait.

The LM head is bound by reading its weights, so many rows cost little more than one. Rows that arrive while a
batch is computed form the next one; a row that comes alone is computed at once.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch

from petals_chat.generation.sampling import TokenSampler, choose_tokens
from petals_chat.head.modules import ClientModules

MAX_ROWS = 64
"""Bounds the memory of one batch's logits (float32: rows x vocabulary x 4 bytes, several times over)."""


class HeadBatcher:
    """Turns last hidden states into tokens, in a thread, so that the event loop goes on meanwhile."""

    def __init__(self, modules: ClientModules) -> None:
        self._modules = modules
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="head")
        self._waiting: list[tuple[torch.Tensor, TokenSampler, asyncio.Future[int]]] = []
        self._batch_task: asyncio.Task[None] | None = None

    async def next_token(self, hidden_state: torch.Tensor, sampler: TokenSampler) -> int:
        """The token that follows.

        Args:
            hidden_state: output of the last block for the session's last token, [hidden_size].
            sampler: how this session chooses.
        """
        result: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((hidden_state, sampler, result))
        if self._batch_task is None:
            self._batch_task = asyncio.create_task(self._compute_batches())
        return await result

    async def _compute_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[:MAX_ROWS], self._waiting[MAX_ROWS:]
            rows, samplers, results = zip(*batch, strict=True)
            try:
                tokens = await loop.run_in_executor(self._thread, self._compute, rows, samplers)
            except Exception as error:
                for result in results:
                    if not result.done():
                        result.set_exception(error)
            else:
                for result, token in zip(results, tokens, strict=True):
                    if not result.done():  # its session may have been cancelled meanwhile
                        result.set_result(token)
        self._batch_task = None

    def _compute(self, rows: tuple[torch.Tensor, ...], samplers: tuple[TokenSampler, ...]) -> list[int]:
        with torch.inference_mode():
            return choose_tokens(self._modules.logits(torch.stack(rows)), samplers)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
