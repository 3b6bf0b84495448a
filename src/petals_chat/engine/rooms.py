"""Who may hold attention caches when the swarm has not room for all: a fair queue, and eviction.

Room is not counted here, because other gateways take of it too: servers say when they are full. Then whoever
needs room waits in a queue, round robin over clients, and over the owners of each. Its head gets the room of
contexts that are idle; or, if none is, of one that has had its time slice, which comes back by way of the queue.
Where others have all the room, it waits for them, but does not hold up those behind it who may need less.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import NoReturn, Protocol, TypeVar

from petals_chat.engine.interface import client_of
from petals_chat.errors import AttentionCacheFullError

Result = TypeVar("Result")

IDLE_GRACE_SECONDS = 1.0
"""A client that sends a request for each token has such pauses; without need nothing is taken from it."""
SLICE_SECONDS = 3.0
SLICE_PER_REPLAY = 4.0
"""A slice lasts at least this many times as long as it took to fill the caches, so that replays stay a small part."""
LOOK_AGAIN_SECONDS = 0.5
"""Other gateways do not say when they free memory."""
PATIENCE_SECONDS = 5.0
"""Whoever finds no room for this time, though nothing here holds any, lets the others in the queue try first."""
SPARING_SECONDS = 30.0
"""Whoever found no room though nothing here held any, takes none from others for this time."""
EXPIRY_CHECK_SECONDS = 5.0
RECALL_SECONDS = 5.0
"""Who has not given way for so long probably waits for a server that is silent: another is recalled too."""
WANTED_ELSEWHERE_SECONDS = 5.0
"""A worker whose contexts wait says so more often than that, and the others hear of it."""
OTHERS_FIRST_SECONDS = 3.0
"""For so long a worker that made room for another one's contexts leaves it to them. It is longer than from one of their
reports to the next, so that a large context gets the room of several."""


class Applicant(Protocol):
    """Who waits for room."""

    cancelled: bool
    """True = does not want it any more."""
    on_cancel: Callable[[], None] | None
    """Called when ``cancelled`` becomes true."""

    def queued(self, place: int) -> None:
        """The place in the queue, whenever it changes; 1 = next."""


class Resident(Protocol):
    """A context, as the queue sees it."""

    owner: str

    async def evict(self) -> None:
        """Give the caches back; called only while it is idle."""


@dataclasses.dataclass
class _Stay:
    """The time in which a context holds caches."""

    since: float
    replay_seconds: float | None = None
    """How long it took to fill the caches; None as long as that goes on."""
    idle_since: float | None = None
    recalled_at: float | None = None

    def evictable_at(self) -> float:
        """From when on the caches may be taken for others, if it stays as it is; busy or not."""
        if self.replay_seconds is None:
            return math.inf  # its replay would have been for nothing
        end_of_slice = self.since + max(SLICE_SECONDS, SLICE_PER_REPLAY * self.replay_seconds)
        if self.idle_since is None:
            return end_of_slice
        return min(end_of_slice, self.idle_since + IDLE_GRACE_SECONDS)


class _NoRoomForNow(Exception):
    """Others than this queue's contexts have the room."""


class _Waiter:
    def __init__(self, applicant: Applicant, *, is_return: bool) -> None:
        self.turn = asyncio.Event()
        """Set when it may try, when it wants no more, and when it was displaced."""
        self.is_displaced = False
        """Its place in the queue was given to somebody else's."""
        self.spares_residents_until = 0.0
        """Until then it takes nothing from residents."""
        self.is_return = is_return
        self._applicant = applicant
        self._place = 0

    def tell_place(self, place: int) -> None:
        if place != self._place:
            self._place = place
            self._applicant.queued(place)


class RoomQueue:
    """The contexts of one worker that hold caches, and those that wait for room.

    Args:
        max_waiting: how many may wait that have had no caches yet; who returns is never refused, and counts for
            nobody's places. When it is reached, one more of a client takes the place of the last one of the client
            who has the most there; or of the same client's owner who has, if clients have about as many.
        timeout: seconds that one may wait.
        idle_timeout: seconds after which caches that nobody uses are given back, waiting or not.
    """

    def __init__(self, *, max_waiting: int, timeout: float, idle_timeout: float) -> None:
        self._max_waiting = max_waiting
        self._timeout = timeout
        self._idle_timeout = idle_timeout
        self._stays: dict[Resident, _Stay] = {}
        self._queues: OrderedDict[str, OrderedDict[str, deque[_Waiter]]] = OrderedDict()
        """By client, and by owner; in the order of their next turns, none is empty."""
        self._head: _Waiter | None = None
        """The waiter that tries; it is not in its queue any more."""
        self._last_turn = ("", "")
        """The client and the owner whose it is, or was."""
        self._changed = asyncio.Event()
        """Somebody became idle or left, or the head wants no more."""
        self._is_freed = False
        self._wanted_elsewhere_until = self._stands_back_until = -math.inf

    @property
    def residents(self) -> int:
        """Contexts that hold caches."""
        return len(self._stays)

    @property
    def waiting(self) -> int:
        """Contexts that wait for room."""
        return sum(len(queue) for _, queue in self._by_owner()) + (self._head is not None)

    async def admit(
        self,
        resident: Resident,
        attempt: Callable[[bool], Awaitable[Result]],
        applicant: Applicant,
        *,
        is_return: bool = False,
    ) -> Result | None:
        """Take caches as soon as there is room; None if the applicant was cancelled before.

        Args:
            attempt: tries to take them, and raises `AttentionCacheFullError` if there is no room; its argument
                tells whether room is scarce.
            applicant: never told a place if there is room at once.
            is_return: it has had caches before, and so is never refused for the length of the queue.

        Raises:
            AttentionCacheFullError: too many wait, or it took too long.
            PetalsChatError: what else ``attempt`` raises.
        """
        if self.waiting == 0 and _now() >= self._stands_back_until:
            began = _now()
            with contextlib.suppress(AttentionCacheFullError):
                result = await attempt(False)
                self._stays[resident] = _Stay(began)
                return result
        if not is_return and self._newcomers() >= self._max_waiting:
            self._displace_for(resident.owner)
        return await self._admit_in_turn(resident, attempt, applicant, is_return=is_return)

    def settled(self, resident: Resident) -> None:
        """The caches hold the whole history: what that took is known now."""
        stay = self._stays[resident]
        if stay.replay_seconds is None:
            stay.replay_seconds = _now() - stay.since

    def fills(self, resident: Resident) -> None:
        """A long prompt goes into the caches, as if they were new."""
        self._stays[resident] = _Stay(_now())

    def gives_way(self, resident: Resident) -> bool:
        """Whether a busy context shall give its caches back before its next step; asked when it could.

        A recall is forgotten when nobody waits any more. If another worker's contexts wait, those of this one then
        leave them the first chance.
        """
        stay = self._stays[resident]
        if stay.recalled_at is None:
            return False
        if _now() < self._wanted_elsewhere_until:
            self._wanted_elsewhere_until = -math.inf
            self._stands_back_until = _now() + OTHERS_FIRST_SECONDS
        elif not self.waiting:
            stay.recalled_at = None
        return stay.recalled_at is not None

    async def make_room_elsewhere(self, *, recalls: bool) -> None:
        """Another worker's contexts wait: give back what is idle, unless some wait here as well.

        Args:
            recalls: this worker's contexts hold more than that one's: give back what is idle in any case, and if
                nothing is, recall a busy one whose slice is over.
        """
        if self.waiting and not recalls:
            return  # else each of the two would leave the room to the other
        before = len(self._stays)
        await self.evict_idle(IDLE_GRACE_SECONDS)
        if len(self._stays) < before:
            self._stands_back_until = _now() + OTHERS_FIRST_SECONDS
        elif recalls:
            self._wanted_elsewhere_until = _now() + WANTED_ELSEWHERE_SECONDS
            self._recall_one()

    def busy(self, resident: Resident) -> None:
        """The context is used from now on."""
        if stay := self._stays.get(resident):
            stay.idle_since = None

    def idle(self, resident: Resident) -> None:
        """Nobody uses the context for now."""
        if stay := self._stays.get(resident):
            stay.idle_since = _now()
            if stay.replay_seconds is None:  # it was cancelled on the way
                stay.replay_seconds = stay.idle_since - stay.since
            self._changed.set()

    def leave(self, resident: Resident) -> None:
        """The context gives its caches back; `freed` follows when that is done."""
        self._stays.pop(resident, None)

    def freed(self) -> None:
        """There may be room now."""
        self._is_freed = True
        self._changed.set()

    async def expire_idle(self) -> NoReturn:
        """Give back what nobody has used for ``idle_timeout``."""
        while True:
            await asyncio.sleep(min(EXPIRY_CHECK_SECONDS, self._idle_timeout))
            await self.evict_idle(self._idle_timeout)

    async def evict_idle(self, after_seconds: float) -> None:
        """Give back what nobody has used for so long."""
        for resident in list(self._stays):
            stay = self._stays.get(resident)  # it may be used again while others are evicted
            if stay and stay.idle_since is not None and _now() - stay.idle_since >= after_seconds:
                await resident.evict()

    def _displace_for(self, owner: str) -> None:
        """Make a place in the full queue, at the cost of a client who has at least two more there than the owner's.

        If there is none, it is at the cost of one of the client's own owners, who has at least two more than this.
        """
        places = {
            other: newcomers
            for other, queue in self._by_owner()
            if (newcomers := [waiter for waiter in queue if not waiter.is_return])
        }
        of_clients: Counter[str] = Counter()
        for other, newcomers in places.items():
            of_clients[client_of(other)] += len(newcomers)
        loser, least = max(of_clients, key=of_clients.__getitem__, default=""), 1
        if of_clients[loser] < of_clients[client_of(owner)] + 2:
            loser, least = client_of(owner), len(places.get(owner, ())) + 2
        places = {other: each for other, each in places.items() if client_of(other) == loser}
        most = max(reversed(places), key=lambda other: len(places[other]), default=owner)
        if len(places.get(most, ())) < least:
            raise AttentionCacheFullError(f"{self._newcomers()} others wait for room already")
        waiter = places[most][-1]
        waiter.is_displaced = True
        waiter.turn.set()
        self._remove(most, waiter)

    def _newcomers(self) -> int:
        queues = (queue for _, queue in self._by_owner())
        waiters = itertools.chain(*queues, () if self._head is None else (self._head,))
        return sum(not waiter.is_return for waiter in waiters)

    async def _admit_in_turn(
        self,
        resident: Resident,
        attempt: Callable[[bool], Awaitable[Result]],
        applicant: Applicant,
        *,
        is_return: bool,
    ) -> Result | None:
        waiter = _Waiter(applicant, is_return=is_return)

        def wake() -> None:
            waiter.turn.set()
            self._changed.set()

        applicant.on_cancel = wake
        self._queue_up(resident.owner, waiter)
        try:
            async with asyncio.timeout(self._timeout):
                while not applicant.cancelled:
                    await waiter.turn.wait()
                    if waiter.is_displaced:
                        raise AttentionCacheFullError(
                            "too many others wait for room, and more of yours already"
                        )
                    try:
                        return await self._take_turn(resident, attempt, applicant, waiter)
                    except _NoRoomForNow:
                        self._remove(resident.owner, waiter)
                        self._queue_up(resident.owner, waiter)
                return None
        except TimeoutError:
            raise AttentionCacheFullError(f"no room came free within {self._timeout:g} s") from None
        finally:
            applicant.on_cancel = None
            self._remove(resident.owner, waiter)
            self._advance()

    async def _take_turn(
        self,
        resident: Resident,
        attempt: Callable[[bool], Awaitable[Result]],
        applicant: Applicant,
        waiter: _Waiter,
    ) -> Result | None:
        """Try until there is room, taking it from residents; None if the applicant was cancelled.

        Residents whose room was not enough are left alone for a while.

        Raises:
            _NoRoomForNow: it is not residents who have the room.
        """
        last_resident = _now()
        while not applicant.cancelled:
            if (rest := self._stands_back_until - _now()) > 0:
                await self._wait_for_change(rest)
                continue
            began = _now()
            self._is_freed = False
            try:
                result = await attempt(True)
            except AttentionCacheFullError:
                if _now() < waiter.spares_residents_until:
                    await self._wait_for_free_room(applicant)
                    if self._queues:
                        raise _NoRoomForNow from None
                    continue
                if self._stays:
                    last_resident = _now()
                elif self._queues and _now() - last_resident > PATIENCE_SECONDS:
                    waiter.spares_residents_until = _now() + SPARING_SECONDS
                    raise _NoRoomForNow from None
                await self._make_room(applicant)
            else:
                self._stays[resident] = _Stay(began)
                return result
        return None

    async def _make_room(self, applicant: Applicant) -> None:
        """Take the caches of one context, or wait until there may be room in another way."""
        until = _now() + LOOK_AGAIN_SECONDS
        while not self._is_freed and not applicant.cancelled and (now := _now()) < until:
            idle = {resident: stay for resident, stay in self._stays.items() if stay.idle_since is not None}
            if idle:
                resident, stay = min(idle.items(), key=lambda item: item[1].evictable_at())
                if stay.evictable_at() <= now:
                    await resident.evict()
                    return
            self._recall_one()
            times = [time for stay in self._stays.values() if (time := stay.evictable_at()) > now]
            await self._wait_for_change(max(0.01, min([until, *times]) - now))

    async def _wait_for_free_room(self, applicant: Applicant) -> None:
        until = _now() + LOOK_AGAIN_SECONDS
        while not self._is_freed and not applicant.cancelled and (rest := until - _now()) > 0:
            await self._wait_for_change(rest)

    async def _wait_for_change(self, seconds: float) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _recall_one(self) -> None:
        """Have the busy context whose slice was over first give way, unless one is about to."""
        now = _now()
        busy = [stay for stay in self._stays.values() if stay.idle_since is None]
        if any(stay.recalled_at is not None and now - stay.recalled_at < RECALL_SECONDS for stay in busy):
            return
        others = [stay for stay in busy if stay.recalled_at is None and stay.evictable_at() <= now]
        if others:
            min(others, key=_Stay.evictable_at).recalled_at = now

    def _queue_up(self, owner: str, waiter: _Waiter) -> None:
        waiter.turn.clear()
        self._queues.setdefault(client_of(owner), OrderedDict()).setdefault(owner, deque()).append(waiter)
        self._put_last_turn_last()
        self._advance()

    def _advance(self) -> None:
        """Let the next waiter try, if none does, and tell the others their places."""
        if self._head is None and self._queues:
            client, owners = next(iter(self._queues.items()))
            owner, queue = next(iter(owners.items()))
            self._head = queue[0]
            self._take_out(owner, self._head)
            self._last_turn = client, owner
            self._put_last_turn_last()
            self._head.turn.set()
        if self._head is not None:
            for place, waiter in enumerate((self._head, *self._order()), 1):
                waiter.tell_place(place)

    def _put_last_turn_last(self) -> None:
        """Who comes while somebody has a turn has one before that somebody's next."""
        client, owner = self._last_turn
        if owners := self._queues.get(client):
            self._queues.move_to_end(client)
            if owner in owners:
                owners.move_to_end(owner)

    def _order(self) -> list[_Waiter]:
        """Those behind the head, in the order of their turns."""
        return list(_in_turns([_in_turns(owners.values()) for owners in self._queues.values()]))

    def _by_owner(self) -> Iterator[tuple[str, deque[_Waiter]]]:
        return itertools.chain.from_iterable(owners.items() for owners in self._queues.values())

    def _remove(self, owner: str, waiter: _Waiter) -> None:
        if self._head is waiter:
            self._head = None
        else:
            self._take_out(owner, waiter)

    def _take_out(self, owner: str, waiter: _Waiter) -> None:
        owners = self._queues.get(client_of(owner))
        if owners and waiter in owners.get(owner, ()):
            owners[owner].remove(waiter)
            if not owners[owner]:
                del owners[owner]
            if not owners:
                del self._queues[client_of(owner)]


def _now() -> float:
    return asyncio.get_running_loop().time()


def _in_turns(queues: Iterable[Iterable[_Waiter]]) -> Iterator[_Waiter]:
    """The first of each, then the second of each that has one, and so on."""
    for turn in itertools.zip_longest(*queues):
        yield from (waiter for waiter in turn if waiter is not None)
