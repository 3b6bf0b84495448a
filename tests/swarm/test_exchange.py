"""Steps to the runtime and outcomes back, between real processes."""

import asyncio
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from petals_chat.swarm.exchange import Exchange

pytestmark = pytest.mark.usefixtures("petals")

TIMEOUT_SECONDS = 60
FORK = multiprocessing.get_context("fork")


def forked(target: Callable[..., None], *arguments: object) -> Any:
    # What is alive now must not be collected in the child: it may belong to threads that are not there.
    gc.freeze()
    process = FORK.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def ask(exchange: Exchange, numbers: list[int], report: Any) -> None:
    """A handler: asks for all numbers at once, and reports what comes."""

    async def run() -> None:
        futures = [exchange.submit((torch.tensor([number]), "more"), float(number)) for number in numbers]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        report.send([str(each) if isinstance(each, BaseException) else each[0].item() for each in outcomes])

    asyncio.run(run())


def test_what_becomes_of_tasks_comes_back_to_the_processes_that_sent_them() -> None:
    exchange = Exchange()
    ends = [FORK.Pipe(duplex=False) for _ in range(2)]
    asking = [
        forked(ask, exchange, [10 * index + digit for digit in range(3)], sender)
        for index, (_, sender) in enumerate(ends)
    ]
    tasks = [exchange.get() for _ in range(6)]
    assert all(task is not None and task.args[1] == "more" for task in tasks)
    outcomes: list[Any] = []
    for task in tasks:
        assert task is not None
        number = task.args[0].item()
        assert task.priority == number
        outcomes.append((task.uid, ValueError(f"no {number}") if number % 10 == 1 else [2 * task.args[0]]))
    exchange.answer(outcomes)
    for (receiver, _), expected in zip(ends, [[0, "no 1", 4], [20, "no 11", 24]], strict=True):
        assert receiver.poll(TIMEOUT_SECONDS)
        assert receiver.recv() == expected
    for process in asking:
        process.join(TIMEOUT_SECONDS)
        assert process.exitcode == 0


class Secretive(Exception):
    """Cannot be sent to another process."""

    def __init__(self, secret: threading.Lock) -> None:
        super().__init__(secret)

    def __str__(self) -> str:
        return "not a word"


def test_an_error_that_cannot_be_sent_is_told_and_disturbs_no_other_answer() -> None:
    exchange = Exchange()
    receiver, sender = FORK.Pipe(duplex=False)
    asking = forked(ask, exchange, [1, 2], sender)
    first, second = exchange.get(), exchange.get()
    assert first is not None
    assert second is not None
    exchange.answer([(first.uid, Secretive(threading.Lock())), (second.uid, [torch.ones(1)])])
    assert receiver.poll(TIMEOUT_SECONDS)
    assert receiver.recv() == ["Secretive: not a word", 1]
    asking.join(TIMEOUT_SECONDS)


class Unreadable:
    """Fails where it is received."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return int, ("no number",)


async def test_after_a_message_that_cannot_be_read_others_are(caplog: pytest.LogCaptureFixture) -> None:
    exchange = Exchange()
    future = exchange.submit((), 0.0)
    task = await asyncio.to_thread(exchange.get)
    assert task is not None
    (pipe,) = exchange._pipes.values()
    pipe.send(Unreadable())
    exchange.answer([(task.uid, [torch.ones(1)])])
    (output,) = await asyncio.wait_for(future, TIMEOUT_SECONDS)
    assert output == 1
    assert [record.getMessage() for record in caplog.records] == ["answers of the runtime cannot be read"]


def submit_and_leave(exchange: Exchange, may_leave: Any) -> None:
    async def run() -> None:
        exchange.submit((), 0.0)
        may_leave.wait(TIMEOUT_SECONDS)

    asyncio.run(run())


@pytest.mark.parametrize(
    "leaves_early", [True, False], ids=["before its pipe is taken", "before the outcome"]
)
def test_a_process_that_has_gone_does_not_disturb_the_others(leaves_early: bool) -> None:
    exchange, may_leave = Exchange(), FORK.Event()
    gone = forked(submit_and_leave, exchange, may_leave)
    if leaves_early:
        may_leave.set()
        gone.join(TIMEOUT_SECONDS)
    task = exchange.get()
    assert task is not None
    may_leave.set()
    gone.join(TIMEOUT_SECONDS)
    outcome = [torch.zeros(1)]
    exchange.answer([(task.uid, outcome)])
    exchange.answer([(task.uid, outcome)])
    receiver, sender = FORK.Pipe(duplex=False)
    asking = forked(ask, exchange, [3], sender)
    other = exchange.get()
    assert other is not None
    exchange.answer([(task.uid, outcome), (other.uid, [other.args[0]])])
    assert receiver.poll(TIMEOUT_SECONDS)
    assert receiver.recv() == [3]
    asking.join(TIMEOUT_SECONDS)


async def test_an_outcome_that_nobody_waits_for_any_more_is_dropped() -> None:
    exchange = Exchange()
    futures = [exchange.submit((), 0.0) for _ in range(2)]
    futures[0].cancel()
    tasks = [await asyncio.to_thread(exchange.get) for _ in futures]
    assert all(task is not None and task.uid[0] == os.getpid() for task in tasks)
    await asyncio.to_thread(exchange.answer, [(task.uid, [torch.ones(1)]) for task in tasks if task])
    (output,) = await futures[1]
    assert output == 1


def test_there_are_no_more_tasks_when_the_pool_ends() -> None:
    exchange = Exchange()
    threading.Timer(0.01, exchange.put, [None]).start()
    assert exchange.get() is None
