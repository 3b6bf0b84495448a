"""A context: a token history, and its copy as attention caches in the swarm.

The history is the truth. The caches can be lost, given back while others wait for room, or outgrown at any
time, and come back by replaying the history; nobody but `Context` decides when.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import torch

from petals_chat.engine.rooms import Applicant, RoomQueue
from petals_chat.engine.turns import Turns
from petals_chat.errors import AttentionCacheFullError, MaximumLengthExceededError
from petals_chat.head.modules import ClientModules

Result = TypeVar("Result")

NEW_TOKENS_ROOM = 256
"""Room for new tokens that caches are opened with, unless fewer are asked for: what clients allow is often far
more than what comes."""
ROOMY_TOKENS = 1024
"""Size of caches where there are few others, so that a chat grows for some turns without a replay."""
PREFILLS_AT_ONCE = 2
"""Pieces of prompts that may be on their way: one that a server computes, and one that travels meanwhile. Steps
of a single token pass them, so a long prompt delays others by no more than these pieces."""
PREFILL_SECONDS = 10.0
"""A piece that takes longer is probably on its way to a server that does not answer: others go on without waiting."""

LAST_STEP_SECONDS = 1.0
"""How long a step may go on for an applicant who was cancelled; the caches are worth so much. A silent server would
keep the turn in the queue, and all that waits for the context's end, for minutes."""

DOUBTFUL_ROOM_SECONDS = 0.1
"""How long servers may wait for room of a size that there never was; if it is more than all they have, they say so."""


class Permit:
    """The right to send a piece of a prompt; nobody keeps it for longer than `PREFILL_SECONDS`."""

    def __init__(self, places: Turns, owner: str) -> None:
        self._places = places
        self._owner = owner
        self._expiry: asyncio.TimerHandle | None = None
        """While it is held."""

    @property
    def is_held(self) -> bool:
        """Whether it was taken, and not given back yet."""
        return self._expiry is not None

    async def take(self) -> None:
        """Hold it, as soon as there is a place."""
        await self._places.take(self._owner)
        self._expiry = asyncio.get_running_loop().call_later(PREFILL_SECONDS, self.give_back)

    def give_back(self) -> None:
        """Let others have the place; it may be given back already."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
            self._places.give_back()


class SwarmSession(Protocol):
    """Attention caches in the swarm; see `petals_chat.swarm.session.SwarmSession`."""

    max_length: int
    position: int

    async def step(self, hidden_states: torch.Tensor, permit: Permit | None = None) -> torch.Tensor:
        """Hidden states [1, tokens, hidden_size] through all blocks; a piece of a prompt comes with the permit held."""

    async def close(self) -> None:
        """Free the servers' memory."""


@dataclasses.dataclass
class Counts:
    """What a worker has done since it started."""

    tokens_generated: int = 0
    tokens_processed: int = 0
    """Sent through the swarm: prompts, generated tokens and replays."""
    tokens_replayed: int = 0
    """Sent again, because caches were lost, given back or outgrown."""
    prefix_hits: int = 0
    """Requests that went on from an idle context of the same owner."""
    prefix_tokens: int = 0
    """Tokens of these requests that did not have to be processed again."""
    caches_given_back: int = 0
    """Contexts that made room for others."""


class Swarm:
    """What all contexts of a worker share.

    Args:
        modules: for the embeddings.
        open_session: makes attention caches for a number of tokens; servers may wait for room for so many seconds.
        rooms: decides who may hold caches.
        prefill_chunk_tokens: longest piece of a prompt sent as one step.
    """

    def __init__(
        self,
        modules: ClientModules,
        open_session: Callable[[int, float], SwarmSession],
        rooms: RoomQueue,
        *,
        prefill_chunk_tokens: int,
    ) -> None:
        self.modules = modules
        self.open_session = open_session
        self.rooms = rooms
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.prefills = Turns(PREFILLS_AT_ONCE)
        self.counts = Counts()
        self.longest_caches = sys.maxsize
        """Tokens of the longest caches that servers allow, as far as that is known."""
        self.longest_held = 0
        """Tokens of the longest caches that there were."""


OnOutputs = Callable[[int, torch.Tensor], Awaitable[None]]
"""Takes the position of a piece's first token, and the hidden states [tokens, hidden_size] for the piece."""


class Context:
    """A token history of at most ``max_length`` tokens; one user at a time.

    Args:
        owner: whose it is, for a fair queue.
        spare_tokens: room for more tokens than are asked for, where room is scarce.
    """

    def __init__(self, swarm: Swarm, owner: str, max_length: int, *, spare_tokens: int = 0) -> None:
        self.tokens: list[int] = []
        self.owner = owner
        self.max_length = max_length
        self.on_outputs: OnOutputs | None = None
        """Awaited with each piece that came out of the swarm; a replay may bring a piece again."""
        self._swarm = swarm
        self._spare_tokens = spare_tokens
        self._caches: SwarmSession | None = None
        self._tokens_sent = 0
        """The longest part of the history that was ever in caches; sending it again is a replay."""

    @property
    def cached_tokens(self) -> int:
        """Length of the part of the history that is in the caches."""
        return 0 if self._caches is None else self._caches.position

    @property
    def lacks_one_token(self) -> bool:
        """Whether a step of one token brings the caches up to date."""
        return self._caches is not None and self._caches.position == len(self.tokens) - 1

    async def feed(self, new_tokens: int | None, applicant: Applicant) -> torch.Tensor | None:
        """Send what the caches do not hold of the history; waits for room if there is none.

        Args:
            new_tokens: how many more tokens will probably follow; None if that is not known.
            applicant: whom it is for.

        Returns:
            The hidden state [hidden_size] of the last token; None if the applicant was cancelled on the way to it.

        Raises:
            SwarmError: the swarm cannot do it now.
            AttentionCacheFullError: there was no room for too long, or too many wait.
            MaximumLengthExceededError: servers do not allow so long a history.
        """
        rooms = self._swarm.rooms
        if self._caches is not None:
            if rooms.gives_way(self):
                await self.evict()
            elif len(self.tokens) - self.cached_tokens > self._swarm.prefill_chunk_tokens:
                rooms.fills(self)
        try:
            return await self._feed(new_tokens, applicant)
        except _ApplicantLeft:
            await self.drop_caches()  # what they hold is not known
            return None

    async def _feed(self, new_tokens: int | None, applicant: Applicant) -> torch.Tensor | None:
        rooms = self._swarm.rooms
        while not applicant.cancelled:
            if self._caches is None or self._caches.max_length < len(self.tokens):
                start = 0
                await self.drop_caches()
                hidden = await rooms.admit(
                    self,
                    lambda is_scarce: self._open(new_tokens, is_scarce, applicant),
                    applicant,
                    is_return=self._tokens_sent > 0,
                )
                if hidden is None:
                    return None
            else:
                start = self._caches.position
                try:
                    hidden = await self._step(self._caches, applicant)
                except (AttentionCacheFullError, MaximumLengthExceededError):
                    # A server was lost, and its substitute has no room, or not for so long a session.
                    await self.drop_caches()
                    continue
            is_complete = self.cached_tokens == len(self.tokens)
            if is_complete:
                rooms.settled(self)
            if self.on_outputs is not None:
                await self.on_outputs(start, hidden[0])  # which may take long, and others the caches
            if is_complete:
                return hidden[0, -1]
        return None

    async def evict(self) -> None:
        """Make room for others; only while nobody feeds."""
        self._swarm.counts.caches_given_back += 1
        await self.drop_caches()

    async def drop_caches(self) -> None:
        """Free the servers' memory."""
        if self._caches is not None:
            caches, self._caches = self._caches, None
            self._swarm.rooms.leave(self)
            try:
                await caches.close()
            finally:
                self._swarm.rooms.freed()

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on; the caches must not hold them."""
        assert self.cached_tokens <= length
        del self.tokens[length:]
        self._tokens_sent = min(self._tokens_sent, length)

    async def _open(self, new_tokens: int | None, is_scarce: bool, applicant: Applicant) -> torch.Tensor:
        """New caches, with the first piece of the history in them; memory is taken in this first step."""
        room = min(new_tokens or NEW_TOKENS_ROOM, NEW_TOKENS_ROOM)
        size = len(self.tokens) + room
        if not is_scarce:
            # A power of two: what grows is replayed once for each doubling, not for each request.
            roomy = ROOMY_TOKENS // (1 + self._swarm.rooms.residents // 4)
            size = max(1 << (size - 1).bit_length(), roomy)
        else:
            roomy, held = len(self.tokens) + self._spare_tokens, self._swarm.longest_held
            size = max(size, roomy if size > held else min(roomy, held))
        short = self._swarm.modules.short_context
        if short is not None and len(self.tokens) <= short:  # its rotary embedding is the short one's so long
            size = min(size, short)
        size = min(size, self.max_length)
        if len(self.tokens) <= self._swarm.longest_caches:
            size = min(size, self._swarm.longest_caches)
        is_doubtful = is_scarce and size > self._swarm.longest_held
        caches = self._swarm.open_session(size, DOUBTFUL_ROOM_SECONDS if is_doubtful else 0.0)
        try:
            hidden = await self._step(caches, applicant)
        except MaximumLengthExceededError as error:
            await caches.close()
            if error.limit >= size:
                raise  # it does not keep its word
            self._swarm.longest_caches = error.limit
            if len(self.tokens) > error.limit:
                raise
            return await self._open(new_tokens, is_scarce, applicant)
        except BaseException:
            await caches.close()
            raise
        self._swarm.longest_caches = max(size, self._swarm.longest_caches)  # other servers may have come
        self._swarm.longest_held = max(size, self._swarm.longest_held)
        self._caches = caches
        return hidden

    async def _step(self, caches: SwarmSession, applicant: Applicant) -> torch.Tensor:
        """The next piece of the history through all blocks: hidden states [1, tokens, hidden_size].

        Raises:
            _ApplicantLeft: the applicant was cancelled, and the swarm did not answer for some time. The caches can
                only be closed.
        """
        start = caches.position
        end = min(start + self._swarm.prefill_chunk_tokens, len(self.tokens))
        hidden = self._swarm.modules.embed(self.tokens[start:end])
        permit = Permit(self._swarm.prefills, self.owner)
        try:
            if end - start > 1:
                await _unless_left(permit.take(), applicant)
            outputs = await _unless_left(caches.step(hidden, permit), applicant)
        finally:
            permit.give_back()
        counts = self._swarm.counts
        counts.tokens_processed += end - start
        counts.tokens_replayed += max(0, min(end, self._tokens_sent) - start)
        self._tokens_sent = max(self._tokens_sent, end)
        return outputs


class _ApplicantLeft(Exception):
    """The applicant was cancelled, and what it was for takes too long."""


async def _unless_left(work: Awaitable[Result], applicant: Applicant) -> Result:
    """What the work gives.

    Raises:
        _ApplicantLeft: the applicant was cancelled, and so was the work, which then did not end soon.
    """
    limit = asyncio.timeout(None)

    def leave() -> None:
        if limit.when() is None:
            limit.reschedule(asyncio.get_running_loop().time() + LAST_STEP_SECONDS)

    on_cancel, applicant.on_cancel = applicant.on_cancel, leave
    try:
        async with limit:
            if applicant.cancelled:  # while something else was waited for
                leave()
            return await work
    except TimeoutError:
        if limit.expired():
            raise _ApplicantLeft from None
        raise
    finally:
        applicant.on_cancel = on_cancel
