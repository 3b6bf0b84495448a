"""Steps on their way from the processes that talk to clients to the runtime, and what becomes of them on the way back.

hivemind's futures and Petals' queue do the same for any task. For a step of one token they cost more than the step:
each future has shared memory and an answer of its own, whose arrival wakes a thread and an event loop. Here a process
passes a pipe once, and what a turn has completed for its clients comes back in one message.

Sources, Petals 2.2.0 and hivemind 1.1.12: ``petals/server/task_pool.py``, ``hivemind/utils/mpfuture.py``.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import logging
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

logger = logging.getLogger(__name__)

TaskId = tuple[int, int]
"""The process of a task, and its number there."""
Outcome = Sequence[torch.Tensor] | BaseException


@dataclasses.dataclass(frozen=True, order=True)
class Task:
    """What the runtime shall compute; the most urgent is the smallest."""

    priority: float
    time_submitted: float
    uid: TaskId = dataclasses.field(compare=False)
    args: Sequence[Any] = dataclasses.field(compare=False)


class Exchange:
    """Made in the runtime's process before the others are forked from it."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Task | tuple[int, Connection] | None] = multiprocessing.SimpleQueue()
        self._inbox: _Inbox | None = None
        """Of the process that has passed its pipe last; another one if this object was forked since."""
        self._pipes: dict[int, Connection] = {}
        """In the runtime's process: to the others, by their ids."""

    def submit(self, args: Sequence[Any], priority: float) -> asyncio.Future[Sequence[torch.Tensor]]:
        """Send a task to the runtime. Called in the event loop of another process, where the future is settled."""
        inbox = self._inbox
        if inbox is None or inbox.process_id != os.getpid():
            inbox, sender = _Inbox.open()
            with sender:  # what is passed is a duplicate
                self._queue.put((inbox.process_id, sender))
            self._inbox = inbox
        number, future = inbox.expect_outcome()
        self._queue.put(Task(priority, time.monotonic(), (inbox.process_id, number), args))
        return future

    def get(self) -> Task | None:
        """Wait for the next task; None = there are no more."""
        while True:
            try:
                item = self._queue.get()
            except (EOFError, ConnectionError, FileNotFoundError):
                continue  # a process had gone before its pipe was taken over
            if not isinstance(item, tuple):
                return item
            process_id, self._pipes[process_id] = item

    def put(self, _: None) -> None:
        """End the tasks, as Petals' pool does."""
        self._queue.put(None)

    def answer(self, outcomes: Iterable[tuple[TaskId, Outcome]]) -> None:
        """Send back what became of tasks, in one message for each process."""
        by_process: dict[int, list[tuple[int, Outcome]]] = collections.defaultdict(list)
        for (process_id, number), outcome in outcomes:
            by_process[process_id].append((number, _portable(outcome)))
        for process_id, answers in by_process.items():
            try:
                self._pipes[process_id].send(answers)
            except (OSError, KeyError):  # KeyError: so it was before
                logger.debug("process %d has gone before its %d answers", process_id, len(answers))
                if pipe := self._pipes.pop(process_id, None):
                    pipe.close()


class _Inbox:
    """Where outcomes for one process come in."""

    def __init__(self, receiver: Connection) -> None:
        self.process_id = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._futures: dict[int, asyncio.Future[Sequence[torch.Tensor]]] = {}
        threading.Thread(target=self._receive, args=(receiver,), daemon=True, name="outcomes").start()

    @classmethod
    def open(cls) -> tuple[_Inbox, Connection]:
        """An inbox, and the pipe to it."""
        receiver, sender = multiprocessing.Pipe(duplex=False)
        return cls(receiver), sender

    def expect_outcome(self) -> tuple[int, asyncio.Future[Sequence[torch.Tensor]]]:
        """The number of a new task, and what it will come to."""
        number, future = next(self._numbers), self._loop.create_future()
        self._futures[number] = future
        return number, future

    def _receive(self, receiver: Connection) -> None:
        while True:
            try:
                answers = receiver.recv()
            except (EOFError, OSError):  # the runtime has gone
                return
            except Exception:
                logger.exception("answers of the runtime cannot be read")
                continue
            try:
                self._loop.call_soon_threadsafe(self._settle, answers)
            except RuntimeError:  # the event loop has ended
                return

    def _settle(self, answers: Sequence[tuple[int, Outcome]]) -> None:
        for number, outcome in answers:
            future = self._futures.pop(number)
            if future.done():  # its client has gone
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


def _portable(outcome: Outcome) -> Outcome:
    """The same, or another exception with its text, if that one cannot be sent to another process."""
    if isinstance(outcome, BaseException):
        try:
            pickle.loads(pickle.dumps(outcome))  # noqa: S301 - our own
        except Exception:
            return RuntimeError(f"{type(outcome).__name__}: {outcome}")
    return outcome
