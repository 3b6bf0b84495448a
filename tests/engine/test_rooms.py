"""The queue for attention caches, on a swarm of a fixed number of places."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import NoReturn

import pytest

from petals_chat.engine import rooms
from petals_chat.engine.rooms import RoomQueue
from petals_chat.engine.worker import STATUS_PERIOD_SECONDS
from petals_chat.errors import AttentionCacheFullError, SwarmUnreachableError


class Places:
    """A swarm with room for so many."""

    def __init__(self, count: int, queue: RoomQueue) -> None:
        self.free = count
        self.queue = queue
        self.log: list[str] = []


class Tenant:
    """Takes a place, holds it, and gives it back when asked."""

    def __init__(
        self,
        name: str,
        places: Places,
        owner: str | None = None,
        *,
        needs: int = 1,
        queue: RoomQueue | None = None,
    ) -> None:
        self.name = name
        self.needs = needs
        self.owner = owner or name
        self.places_told: list[int] = []
        self.attempts = 0
        self.cancelled = False
        self.on_cancel: Callable[[], None] | None = None
        self._places = places
        self._queue = queue or places.queue

    async def enter(self, *, is_return: bool = False) -> None:
        if await self._queue.admit(self, self._attempt, self, is_return=is_return):
            self._places.log.append(self.name)

    def queued(self, place: int) -> None:
        self.places_told.append(place)

    def cancel(self) -> None:
        self.cancelled = True
        if self.on_cancel:
            self.on_cancel()

    async def leave(self) -> None:
        self._queue.leave(self)
        self._places.free += self.needs
        self._queue.freed()

    async def evict(self) -> None:
        self._places.log.append(f"-{self.name}")
        await self.leave()

    async def _attempt(self, is_scarce: bool) -> bool:
        self.attempts += 1
        await asyncio.sleep(0)
        if self._places.free < self.needs:
            raise AttentionCacheFullError
        self._places.free -= self.needs
        return True


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "IDLE_GRACE_SECONDS", 0.05)
    monkeypatch.setattr(rooms, "SLICE_SECONDS", 0.2)
    monkeypatch.setattr(rooms, "LOOK_AGAIN_SECONDS", 0.02)


@pytest.fixture
async def queue() -> AsyncIterator[RoomQueue]:
    queue = RoomQueue(max_waiting=4, timeout=5, idle_timeout=60)
    yield queue
    assert queue.waiting == 0


@pytest.fixture
def places(queue: RoomQueue) -> Places:
    return Places(2, queue)


async def waiting_for(queue: RoomQueue, count: int) -> None:
    async with asyncio.timeout(5):
        while queue.waiting != count:
            await asyncio.sleep(0)


async def let_small_pass_large(places: Places) -> tuple[Tenant, Tenant, asyncio.Task[None]]:
    """Others have one of two places. Gives who waits for both, who came later and has one, and the first's entering."""
    places.free = 1
    large, small = Tenant("large", places, needs=2), Tenant("small", places)
    entering = asyncio.create_task(large.enter())
    await waiting_for(places.queue, 1)
    await small.enter()
    return large, small, entering


async def test_where_there_is_room_nobody_waits(places: Places) -> None:
    first, second = Tenant("a", places), Tenant("b", places)
    await asyncio.gather(first.enter(), second.enter())
    assert places.log == ["a", "b"]
    assert first.places_told == second.places_told == []


async def test_an_idle_tenant_makes_room_at_once_after_its_grace(places: Places, queue: RoomQueue) -> None:
    tenants = [Tenant(name, places) for name in "abc"]
    await tenants[0].enter()
    await tenants[1].enter()
    queue.idle(tenants[1])
    await tenants[2].enter()
    assert places.log == ["a", "b", "-b", "c"]
    assert tenants[2].places_told == [1]


async def test_who_was_idle_longest_goes_first(places: Places, queue: RoomQueue) -> None:
    tenants = [Tenant(name, places) for name in "abc"]
    for tenant in tenants[:2]:
        await tenant.enter()
        queue.idle(tenant)
        await asyncio.sleep(0.01)
    await tenants[2].enter()
    assert places.log == ["a", "b", "-a", "c"]


async def test_a_busy_tenant_is_recalled_after_its_slice_and_not_before(
    places: Places, queue: RoomQueue
) -> None:
    tenants = [Tenant(name, places) for name in "abc"]
    for tenant in tenants[:2]:
        await tenant.enter()
        queue.settled(tenant)
    entering = asyncio.create_task(tenants[2].enter())
    await waiting_for(queue, 1)
    assert not any(queue.gives_way(tenant) for tenant in tenants[:2])
    async with asyncio.timeout(5):
        while not queue.gives_way(tenants[0]):
            await asyncio.sleep(0.01)
    assert not queue.gives_way(tenants[1])
    await tenants[0].leave()
    await entering
    assert places.log == ["a", "b", "c"]


async def test_a_recall_lasts_until_the_tenant_looks_or_nobody_waits(
    places: Places, queue: RoomQueue
) -> None:
    tenants = [Tenant(name, places) for name in "abc"]
    for tenant in tenants[:2]:
        await tenant.enter()
        queue.settled(tenant)
    entering = asyncio.create_task(tenants[2].enter())
    await waiting_for(queue, 1)
    async with asyncio.timeout(5):
        while not queue.gives_way(tenants[0]):
            queue.busy(tenants[0])  # it goes on, as with each token
            await asyncio.sleep(0.01)
    queue.busy(tenants[0])
    assert queue.gives_way(tenants[0])
    tenants[2].cancel()
    await entering
    assert not queue.gives_way(tenants[0])


async def test_who_does_not_give_way_is_not_waited_for_alone(
    places: Places, queue: RoomQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "RECALL_SECONDS", 0.1)
    tenants = [Tenant(name, places) for name in "abc"]
    for tenant in tenants[:2]:
        await tenant.enter()
        queue.settled(tenant)
    entering = asyncio.create_task(tenants[2].enter())
    await waiting_for(queue, 1)
    async with asyncio.timeout(5):
        while not queue.gives_way(tenants[1]):
            await asyncio.sleep(0.01)
    await tenants[1].leave()
    await entering
    assert places.log == ["a", "b", "c"]


async def test_room_is_made_for_others_than_those_of_this_queue(
    places: Places, queue: RoomQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "WANTED_ELSEWHERE_SECONDS", 0.2)
    monkeypatch.setattr(rooms, "SLICE_SECONDS", 60)
    monkeypatch.setattr(rooms, "OTHERS_FIRST_SECONDS", 0.2)
    busy, idle = Tenant("a", places), Tenant("b", places)
    for tenant in (busy, idle):
        await tenant.enter()
        queue.settled(tenant)
    queue.idle(idle)
    await asyncio.sleep(2 * rooms.IDLE_GRACE_SECONDS)
    await queue.make_room_elsewhere(recalls=True)
    assert places.log == ["a", "b", "-b"]
    assert not queue.gives_way(busy)
    await queue.make_room_elsewhere(recalls=True)
    assert not queue.gives_way(busy)  # its slice is not over
    monkeypatch.setattr(rooms, "SLICE_SECONDS", 0)
    await queue.make_room_elsewhere(recalls=False)
    assert not queue.gives_way(busy)
    await queue.make_room_elsewhere(recalls=True)
    await asyncio.sleep(0.3)
    assert not queue.gives_way(busy)  # nobody says any more that he waits
    await queue.make_room_elsewhere(recalls=True)
    began = time.monotonic()
    assert queue.gives_way(busy)
    await busy.leave()
    await Tenant("c", places).enter()  # it leaves the others the first chance, though there is room
    assert time.monotonic() - began > 0.9 * rooms.OTHERS_FIRST_SECONDS
    assert places.log == ["a", "b", "-b", "c"]


async def test_a_large_context_gets_the_room_of_several_of_another_worker(
    places: Places, queue: RoomQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    period = STATUS_PERIOD_SECONDS / 20
    monkeypatch.setattr(rooms, "OTHERS_FIRST_SECONDS", rooms.OTHERS_FIRST_SECONDS / 20)
    monkeypatch.setattr(rooms, "SLICE_SECONDS", 0.02)

    async def stream(tenant: Tenant) -> NoReturn:
        await tenant.enter()
        while True:
            queue.settled(tenant)
            while not queue.gives_way(tenant):
                await asyncio.sleep(0.005)
            await tenant.evict()
            await tenant.enter(is_return=True)

    streaming = [asyncio.create_task(stream(Tenant(name, places))) for name in "ab"]
    other = RoomQueue(max_waiting=4, timeout=5, idle_timeout=60)
    entering = asyncio.create_task(Tenant("large", places, needs=2, queue=other).enter())
    while not entering.done():
        await queue.make_room_elsewhere(recalls=True)
        await asyncio.sleep(period)
    await entering
    for task in streaming:
        task.cancel()
    await asyncio.wait(streaming)


async def test_two_workers_whose_contexts_wait_do_not_both_leave_the_room_to_the_other(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "OTHERS_FIRST_SECONDS", 3600.0)
    queues = [RoomQueue(max_waiting=4, timeout=20, idle_timeout=60) for _ in range(2)]
    idle = [Tenant(name, places, queue=queue) for name, queue in zip("ab", queues, strict=True)]
    for tenant, queue in zip(idle, queues, strict=True):
        await tenant.enter()
        queue.settled(tenant)
    answers = asyncio.Event()

    async def attempt(is_scarce: bool) -> bool:
        if not places.free:
            if is_scarce:
                await answers.wait()
            raise AttentionCacheFullError
        places.free -= 1
        return True

    waiting = [Tenant(name, places, queue=queue) for name, queue in zip("cd", queues, strict=True)]
    entering = [
        asyncio.create_task(queue.admit(tenant, attempt, tenant))
        for tenant, queue in zip(waiting, queues, strict=True)
    ]
    for tenant, queue in zip(idle, queues, strict=True):
        queue.idle(tenant)
    await asyncio.sleep(2 * rooms.IDLE_GRACE_SECONDS)
    while not all(task.done() for task in entering):
        for queue, other in zip(queues, reversed(queues), strict=True):
            if other.waiting or not answers.is_set():
                await queue.make_room_elsewhere(recalls=False)
        answers.set()
        await asyncio.sleep(0.01)
    await asyncio.gather(*entering)


async def test_who_spares_residents_tries_again_when_there_is_room_and_not_for_their_pauses(
    places: Places, queue: RoomQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "PATIENCE_SECONDS", 0.05)
    large, small, entering = await let_small_pass_large(places)
    monkeypatch.setattr(rooms, "LOOK_AGAIN_SECONDS", 60.0)
    await asyncio.sleep(0.1)  # it waits for the last time as short as that
    attempts = large.attempts
    for _ in range(20):
        queue.busy(small)
        queue.idle(small)
        await asyncio.sleep(0)
    assert large.attempts <= attempts + 1
    places.free = 1
    queue.busy(small)
    await small.leave()
    await entering


async def test_room_that_comes_free_while_somebody_is_refused_is_seen(
    places: Places, queue: RoomQueue
) -> None:
    ends, stays, comes = (Tenant(name, places) for name in "abc")
    for tenant in (ends, stays):
        await tenant.enter()
        queue.settled(tenant)
    queue.idle(stays)
    await asyncio.sleep(2 * rooms.IDLE_GRACE_SECONDS)

    async def attempt(is_scarce: bool) -> bool:
        if places.free:
            places.free -= 1
            return True
        if is_scarce:
            await ends.leave()  # while the refusal is on its way
        raise AttentionCacheFullError

    assert await queue.admit(comes, attempt, comes)
    assert places.log == ["a", "b"]


async def test_who_gets_a_long_prompt_has_a_slice_from_then_on(places: Places, queue: RoomQueue) -> None:
    tenants = [Tenant(name, places) for name in "abc"]
    for tenant in tenants[:2]:
        await tenant.enter()
        queue.settled(tenant)
    await asyncio.sleep(rooms.SLICE_SECONDS)
    queue.fills(tenants[0])
    entering = asyncio.create_task(tenants[2].enter())
    async with asyncio.timeout(5):
        while not queue.gives_way(tenants[1]):
            await asyncio.sleep(0.01)
    assert not queue.gives_way(tenants[0])
    await tenants[1].leave()
    await entering


async def test_owners_take_turns(places: Places, queue: RoomQueue) -> None:
    first = [Tenant("x1", places, "x"), Tenant("x2", places, "x")]
    for tenant in first:
        await tenant.enter()
    later = [Tenant("x3", places, "x"), Tenant("x4", places, "x"), Tenant("y1", places, "y")]
    tasks = []
    for count, tenant in enumerate(later, 1):
        tasks.append(asyncio.create_task(tenant.enter()))
        await waiting_for(queue, count)
    assert [tenant.places_told[-1] for tenant in later] == [1, 3, 2]
    for tenant in (*first, later[0]):
        await tenant.leave()
        await asyncio.sleep(0.1)
    await asyncio.gather(*tasks)
    assert places.log == ["x1", "x2", "x3", "y1", "x4"]
    assert later[1].places_told == [2, 3, 2, 1]


async def test_clients_take_turns_whoever_they_pretend_to_be(places: Places, queue: RoomQueue) -> None:
    for name in ("v", "w"):
        await Tenant(name, places, f"x\n{name}").enter()
    queue = RoomQueue(max_waiting=6, timeout=5, idle_timeout=60)
    places.queue = queue
    later = [Tenant(name, places, f"x\n{name[:2]}") for name in ("x1", "x1 again", "x2")]
    later += [Tenant("x", places, "x"), Tenant("y1", places, "y"), Tenant("y2", places, "y")]
    tasks = []
    for count, tenant in enumerate(later, 1):
        tasks.append(asyncio.create_task(tenant.enter()))
        places.free = 0
        await waiting_for(queue, count)
    assert [tenant.places_told[-1] for tenant in later] == [1, 6, 3, 5, 2, 4]
    for _ in later:
        places.free += 1
        queue.freed()
        await asyncio.sleep(0.1)
    await asyncio.gather(*tasks)
    assert places.log == ["v", "w", "x1", "y1", "x2", "y2", "x", "x1 again"]


async def test_new_clients_do_not_pass_those_who_return_for_ever() -> None:
    queue = RoomQueue(max_waiting=9, timeout=5, idle_timeout=60)
    places = Places(0, queue)
    returns = Tenant("long answer", places)
    entering: list[asyncio.Task[None]] = []

    async def line_up(tenant: Tenant, *, is_return: bool = False) -> None:
        entering.append(asyncio.create_task(tenant.enter(is_return=is_return)))
        await waiting_for(queue, queue.waiting + 1)

    async def admit_one() -> None:
        count = queue.waiting
        places.free += 1
        queue.freed()
        await waiting_for(queue, count - 1)

    await line_up(returns)
    await line_up(Tenant("a", places))
    await admit_one()
    await line_up(Tenant("b", places))
    queue.leave(returns)
    await line_up(returns, is_return=True)
    for name in "cd":
        await line_up(Tenant(name, places))
    while queue.waiting:
        await admit_one()
    await asyncio.gather(*entering)
    assert places.log == ["long answer", "a", "b", "long answer", "c", "d"]


async def test_the_queue_has_an_end(places: Places, queue: RoomQueue) -> None:
    held = [Tenant("a", places), Tenant("b", places)]
    for tenant in held:
        await tenant.enter()
    tasks = [asyncio.create_task(Tenant(f"w{number}", places).enter()) for number in range(4)]
    await waiting_for(queue, 4)
    with pytest.raises(AttentionCacheFullError, match="4 others wait for room already"):
        await Tenant("z", places).enter()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_one_owner_cannot_fill_the_queue(places: Places, queue: RoomQueue) -> None:
    for name in "ab":
        await Tenant(name, places).enter()
    greedy = [Tenant(f"x{number}", places, "x") for number in range(4)]
    entering = [asyncio.create_task(tenant.enter()) for tenant in greedy]
    await waiting_for(queue, 4)
    other = Tenant("y", places)
    entering.append(asyncio.create_task(other.enter()))
    with pytest.raises(AttentionCacheFullError, match="more of yours"):
        await entering[3]
    assert other.places_told == [2]
    with pytest.raises(AttentionCacheFullError, match="4 others wait"):
        await Tenant("x4", places, "x").enter()
    for task in entering:
        task.cancel()
    await asyncio.wait(entering)


async def test_one_client_with_many_names_cannot_fill_the_queue(places: Places, queue: RoomQueue) -> None:
    for name in "ab":
        await Tenant(name, places).enter()
    entering = [
        asyncio.create_task(Tenant(f"x{number}", places, f"x\nvisitor {number}").enter())
        for number in range(4)
    ]
    await waiting_for(queue, 4)
    entering.append(asyncio.create_task(Tenant("y0", places, "y").enter()))
    with pytest.raises(AttentionCacheFullError, match="more of yours"):
        await entering[3]
    assert [task.done() for task in entering] == [False, False, False, True, False]
    for owner in ("y", "x\nvisitor 5"):
        with pytest.raises(AttentionCacheFullError, match="4 others wait"):
            await Tenant("late", places, owner).enter()
    for task in entering:
        task.cancel()
    await asyncio.wait(entering)


async def test_clients_with_as_many_places_take_none_from_each_other() -> None:
    """Whichever way they have spread them over visitors."""
    queue = RoomQueue(max_waiting=9, timeout=60, idle_timeout=60)
    places = Places(0, queue)
    owners = ["head", *["x"] * 4, *(f"y\nvisitor {number}" for number in range(4))]
    entering = []
    for count, owner in enumerate(owners, 1):
        entering.append(asyncio.create_task(Tenant(owner, places).enter()))
        await waiting_for(queue, count)
    for number in range(4, 8):
        with pytest.raises(AttentionCacheFullError, match="9 others wait"):
            await Tenant("late", places, f"y\nvisitor {number}").enter()
    assert not any(task.done() for task in entering)
    entering.append(asyncio.create_task(Tenant("z", places, "x\nvisitor").enter()))
    with pytest.raises(AttentionCacheFullError, match="more of yours"):
        await entering[4]
    assert [task.done() for task in entering].count(True) == 1
    for task in entering:
        task.cancel()
    await asyncio.wait(entering)


async def test_those_who_return_take_no_places_from_others(places: Places, queue: RoomQueue) -> None:
    for name in "ab":
        await Tenant(name, places).enter()
    entering = [
        asyncio.create_task(Tenant(f"x{number}", places, "x").enter(is_return=True)) for number in range(8)
    ]
    await waiting_for(queue, 8)
    entering += [asyncio.create_task(Tenant(name, places).enter()) for name in "pqrs"]
    await waiting_for(queue, 12)
    with pytest.raises(AttentionCacheFullError, match="4 others wait"):
        await Tenant("t", places).enter()
    for task in entering:
        task.cancel()
    await asyncio.wait(entering)


async def test_who_waits_for_others_than_these_does_not_hold_up_the_queue(
    places: Places, queue: RoomQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another gateway has most places, and gives them back at last."""
    monkeypatch.setattr(rooms, "PATIENCE_SECONDS", 0.1)
    large, small, entering = await let_small_pass_large(places)
    assert large.places_told == [1, 2, 1]
    assert small.places_told == [2, 1]
    places.free += 2
    await entering
    assert places.log == ["small", "large"]


async def test_those_who_all_wait_for_others_take_turns_until_one_is_cancelled(
    places: Places, queue: RoomQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "PATIENCE_SECONDS", 0.05)
    places.free = 0
    tenants = [Tenant("x1", places, "x"), Tenant("x2", places, "x"), Tenant("y1", places, "y")]
    entering = []
    for count, tenant in enumerate(tenants, 1):
        entering.append(asyncio.create_task(tenant.enter()))
        await waiting_for(queue, count)
    async with asyncio.timeout(5):
        while any(tenant.places_told.count(1) < 2 for tenant in tenants):
            await asyncio.sleep(0.01)
    for tenant in tenants:
        tenant.cancel()
    await asyncio.gather(*entering)
    assert places.log == []


async def test_who_waits_for_others_in_vain_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "PATIENCE_SECONDS", 0.02)
    queue = RoomQueue(max_waiting=4, timeout=0.2, idle_timeout=60)
    places = Places(0, queue)
    tenants = [Tenant(name, places) for name in "ab"]
    for result in await asyncio.gather(*(tenant.enter() for tenant in tenants), return_exceptions=True):
        assert isinstance(result, AttentionCacheFullError)
        assert "within 0.2 s" in result.message
    assert queue.waiting == 0


async def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "SLICE_SECONDS", 60)
    queue = RoomQueue(max_waiting=4, timeout=0.1, idle_timeout=60)
    places = Places(1, queue)
    await Tenant("a", places).enter()
    with pytest.raises(AttentionCacheFullError, match=r"within 0\.1 s"):
        await Tenant("b", places).enter()
    assert queue.waiting == 0


async def test_who_gives_up_leaves_the_queue_to_the_others(places: Places, queue: RoomQueue) -> None:
    held = [Tenant("a", places), Tenant("b", places)]
    for tenant in held:
        await tenant.enter()
    impatient, patient = Tenant("c", places), Tenant("d", places)
    first = asyncio.create_task(impatient.enter())
    await waiting_for(queue, 1)
    second = asyncio.create_task(patient.enter())
    await waiting_for(queue, 2)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert patient.places_told == [2, 1]
    await held[0].leave()
    await second


async def test_who_is_cancelled_stops_waiting_at_once(places: Places, queue: RoomQueue) -> None:
    for name in "ab":
        await Tenant(name, places).enter()
    waiting = [Tenant(name, places) for name in "cd"]
    tasks = []
    for count, tenant in enumerate(waiting, 1):
        tasks.append(asyncio.create_task(tenant.enter()))
        await waiting_for(queue, count)
    for tenant in reversed(waiting):  # one behind the head, then the head itself
        tenant.cancel()
    await asyncio.gather(*tasks)
    assert places.log == ["a", "b"]


async def test_another_error_goes_to_the_one_it_concerns(places: Places, queue: RoomQueue) -> None:
    async def fail(is_scarce: bool) -> NoReturn:
        raise SwarmUnreachableError("nobody there")

    tenant = Tenant("a", places)
    with pytest.raises(SwarmUnreachableError):
        await queue.admit(tenant, fail, tenant)
    await Tenant("b", places).enter()


async def test_what_is_not_used_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = RoomQueue(max_waiting=4, timeout=5, idle_timeout=0.05)
    places = Places(2, queue)
    idle, busy = Tenant("a", places), Tenant("b", places)
    await idle.enter()
    await busy.enter()
    queue.idle(idle)
    expiring = asyncio.create_task(queue.expire_idle())
    async with asyncio.timeout(5):
        while queue.residents == 2:
            await asyncio.sleep(0.01)
    expiring.cancel()
    assert places.log == ["a", "b", "-a"]


async def test_all_of_many_get_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "SLICE_SECONDS", 0.01)
    queue = RoomQueue(max_waiting=64, timeout=30, idle_timeout=60)
    places = Places(4, queue)

    async def work(tenant: Tenant) -> None:
        for _ in range(3):
            await tenant.enter()
            queue.settled(tenant)
            while not queue.gives_way(tenant) and queue.waiting:
                await asyncio.sleep(0.001)
            await tenant.leave()

    await asyncio.gather(*(work(Tenant(f"t{number}", places)) for number in range(32)))
    assert (places.free, queue.residents, len(places.log)) == (4, 0, 96)
