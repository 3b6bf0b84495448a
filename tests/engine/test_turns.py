"""Places that clients take in turns."""

from __future__ import annotations

import asyncio

from petals_chat.engine.turns import Turns

TIMEOUT_SECONDS = 5


async def run(turns: Turns, log: list[str], *owners: str) -> list[asyncio.Task[None]]:
    """Tasks that want a place, in this order; each notes its owner when it has it."""

    async def work(owner: str) -> None:
        async with turns.turn(owner):
            log.append(owner)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work(owner)) for owner in owners]
    await asyncio.sleep(0)
    return tasks


async def test_clients_take_turns_whatever_their_owners_are_called() -> None:
    turns, log = Turns(1), list[str]()
    await turns.take("holder")
    tasks = await run(turns, log, "a\n1", "a\n2", "a\n3", "b", "b", "c")
    turns.give_back()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await asyncio.gather(*tasks)
    assert log == ["a\n1", "b", "c", "a\n2", "b", "a\n3"]
    assert turns.free == 1


async def test_a_place_is_never_lost() -> None:
    """Those who wait are cancelled before their turn, at the same time as it comes, and while they have it."""
    turns, log = Turns(2), list[str]()
    for _ in range(2):
        await turns.take("holder")
    tasks = await run(turns, log, "a", "a", "b", "c")
    tasks[0].cancel()
    await asyncio.sleep(0)
    turns.give_back()  # to the second of a, or to b
    for task in tasks[1:3]:
        task.cancel()
    turns.give_back()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await asyncio.gather(*tasks, return_exceptions=True)
    assert log == ["c"]
    assert turns.free == 2
    working = await run(turns, log, "d", "e", "f")
    working[0].cancel()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await asyncio.gather(*working, return_exceptions=True)
    assert log[1:] == ["d", "e", "f"]
    assert turns.free == 2
