"""One norm, LM head and sampling for the rows of all sessions that wait.

A large LM head is bound by reading its weights, so many rows cost little more than one: it is computed in a
thread, and rows that arrive meanwhile form the next batch. Before that one begins, it waits a little for rows that
are about to come: sessions say when a step of one token leaves for the swarm (`HeadBatcher.expecting`), or when a
client got a token who probably asks for the next one (`HeadBatcher.expect`), and how long it took the last time tells
when the row will be back. Otherwise two groups of sessions that were once apart would
stay so: one in the swarm while the other is in the head (docs/log.md has the measurement). Who is alone never waits.

A small head takes less time than the way to a thread and back: it is computed in the event loop, for all rows of
one turn.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from petals_chat.generation.sampling import Logprobs, TokenSampler, choose_tokens, logprobs_of
from petals_chat.head.modules import ClientModules

MAX_ROWS = 64
"""Bounds the memory of one batch's logits (float32: rows x vocabulary x 4 bytes, several times over)."""
INLINE_SECONDS = 0.001
"""A head whose row takes longer than this goes to the thread."""
LATE = 2.0
"""A step that has been away this many times as long as the session's last one is not waited for; nor one that is
a whole batch late."""

_Row = tuple[torch.Tensor, TokenSampler, asyncio.Future[int]]


class Trip:
    """A session's way from one token to the next: to the client, if that asks for each, and through the swarm."""

    def __init__(self) -> None:
        self.began = 0.0
        self.last_seconds: float | None = None
        """How long the last one took; None before there was one, which is taken to be as long as another session's."""


class HeadBatcher:
    """Turns last hidden states into tokens; use from one event loop.

    Args:
        row_seconds: how long one row takes, see `petals_chat.head.tuning`.
        threads: of torch, for the head alone.
    """

    def __init__(self, modules: ClientModules, *, row_seconds: float, threads: int = 1) -> None:
        self._modules = modules
        self._threads = threads
        self._waiting: list[_Row] = []
        self._is_scheduled = False
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="head") if row_seconds > INLINE_SECONDS else None
        )
        self._batch_task: asyncio.Task[None] | None = None
        self._last_seconds = collections.deque([row_seconds], maxlen=2)
        """What batches took: of two groups that take turns, the larger one's counts."""
        self._last_trip_seconds: float | None = None
        """Of any session."""
        self._under_way: set[Trip] = set()
        self._awaited: set[Trip] = set()
        """Of those under way, the ones that a batch waits for."""
        self._all_came = asyncio.Event()

    def expect(self, trip: Trip) -> None:
        """Announce a row of a client who just got a token, and will probably ask for the next one at once."""
        if self._thread is not None:
            trip.began = time.monotonic()
            self._under_way.add(trip)

    def forget(self, trip: Trip) -> None:
        """No row of this session will come, or it is there."""
        self._under_way.discard(trip)
        if trip in self._awaited:
            self._awaited.discard(trip)
            if not self._awaited:
                self._all_came.set()

    @contextlib.contextmanager
    def expecting(self, trip: Trip) -> Iterator[None]:
        """Announce that a row will come from the swarm at the end; `next_token` follows at once, or it failed."""
        if trip not in self._under_way:
            self.expect(trip)
        try:
            yield
            self._last_trip_seconds = trip.last_seconds = time.monotonic() - trip.began
        finally:
            self.forget(trip)

    async def next_token(self, hidden_state: torch.Tensor, sampler: TokenSampler) -> int:
        """The token that follows.

        Args:
            hidden_state: output of the last block for the session's last token, [hidden_size].
            sampler: how this session chooses.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[int] = loop.create_future()
        self._waiting.append((hidden_state, sampler, result))
        if len(self._waiting) >= MAX_ROWS:
            self._all_came.set()
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
            return logprobs_of(self._logits(hidden_states), tokens, count)

    def _compute_inline(self) -> None:
        self._is_scheduled = False
        while self._waiting:
            rows = self._next_batch()
            _finish(rows, self._compute(rows))

    async def _compute_in_thread(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            await self._await_companions()
            rows, began = self._next_batch(), time.monotonic()
            _finish(rows, await loop.run_in_executor(thread, self._compute, rows))
            self._last_seconds.append(time.monotonic() - began)
            if self._waiting:
                await asyncio.sleep(0)  # the sessions that just got a token announce their next step
        self._batch_task = None

    async def _await_companions(self) -> None:
        """Wait for rows that are about to come, at most as long as a batch takes.

        So long does a row have to wait anyway that comes when the batch has just begun.
        """
        limit = time.monotonic() + max(self._last_seconds)
        while len(self._waiting) < MAX_ROWS and (until := self._choose_awaited(limit)):
            self._all_came.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until - time.monotonic()):
                    await self._all_came.wait()
        self._awaited.clear()

    def _choose_awaited(self, limit: float) -> float | None:
        """Await those who should be back before ``limit``; returns until when, None if there are none."""
        now, until = time.monotonic(), 0.0
        self._awaited.clear()
        if now < limit:
            for trip in list(self._under_way):
                seconds = self._last_trip_seconds if trip.last_seconds is None else trip.last_seconds
                if seconds is None or trip.began + seconds > limit:
                    continue
                grace = min((LATE - 1) * seconds, max(self._last_seconds))
                if (late := trip.began + seconds + grace) > now:
                    self._awaited.add(trip)
                    until = max(until, late)
                else:
                    self._under_way.discard(trip)  # its client may not ask again for long
        return min(until, limit) if self._awaited else None

    def _next_batch(self) -> list[_Row]:
        batch, self._waiting = self._waiting[:MAX_ROWS], self._waiting[MAX_ROWS:]
        return batch

    def _compute(self, rows: Sequence[_Row]) -> Sequence[int | Exception]:
        """The rows' tokens. What cannot be computed together is computed row by row: a bad one fails alone."""
        try:
            with torch.inference_mode():
                hidden_states = torch.stack([hidden_state for hidden_state, _, _ in rows])
                return choose_tokens(self._logits(hidden_states), [sampler for _, sampler, _ in rows])
        except Exception as error:
            return [error] if len(rows) == 1 else [token for row in rows for token in self._compute([row])]

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with _threads(self._threads):
            return self._modules.logits(hidden_states)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads, and with one again afterwards.

    The number belongs to the calling thread. Sampling consists of small operations: several threads would spend more
    time with waiting for each other than with computing.
    """
    if count == 1:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def _finish(rows: Sequence[_Row], tokens: Sequence[int | Exception]) -> None:
    for (_, _, result), token in zip(rows, tokens, strict=True):
        if result.done():  # its session may have been cancelled meanwhile
            continue
        if isinstance(token, Exception):
            result.set_exception(token)
        else:
            result.set_result(token)
