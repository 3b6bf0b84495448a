"""Limits in time of what a request does."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from petals_chat.errors import DeadlineExceededError
from petals_chat.gateway.deadlines import ClientDisconnectedError, deadline, while_connected


class Client:
    """The receiving end of a request whose body was read."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def test_what_ends_in_time_is_left_alone() -> None:
    async with deadline(20):
        await asyncio.sleep(0)


async def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(DeadlineExceededError, match=r"longer than the 0.01 s"):
        async with deadline(0.01):
            await asyncio.Event().wait()


async def test_a_timeout_of_another_making_is_not_the_deadline() -> None:
    with pytest.raises(TimeoutError):
        async with deadline(20):
            raise TimeoutError


async def test_work_gives_its_result_while_the_client_is_there() -> None:
    async def work() -> int:
        return 7

    assert await while_connected(Client().receive, work()) == 7


async def test_work_raises_its_error_while_the_client_is_there() -> None:
    async def work() -> int:
        raise LookupError

    with pytest.raises(LookupError):
        await while_connected(Client().receive, work())


@pytest.mark.parametrize("who_leaves", ["client", "server"])
async def test_work_is_ended_before_its_owner_goes_on(who_leaves: str) -> None:
    client = Client()
    began, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.set()

    owner = asyncio.create_task(while_connected(client.receive, work()))
    await began.wait()
    if who_leaves == "client":
        client.gone.set()
    else:
        owner.cancel()
    with pytest.raises((ClientDisconnectedError, asyncio.CancelledError)):
        await owner
    assert ended.is_set()
