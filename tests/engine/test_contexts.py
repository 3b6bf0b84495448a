"""Contexts on servers that are lost, silent or too small are no burden to the others."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch

from petals_chat.engine import contexts, rooms, tokenizer
from petals_chat.engine.contexts import PREFILLS_AT_ONCE, Context, Permit, Swarm
from petals_chat.engine.prefixes import PrefixStore
from petals_chat.engine.rooms import RoomQueue
from petals_chat.engine.sessions import Model, Session
from petals_chat.engine.tokenizer import Tokenizer
from petals_chat.errors import AttentionCacheFullError, MaximumLengthExceededError, MissingBlocksError
from petals_chat.generation.detokenize import IncrementalDetokenizer
from petals_chat.head.batcher import HeadBatcher
from petals_chat.head.modules import ClientModules, load_client_modules
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.protocol.messages import ChatPrompt, GenerationRequest
from petals_chat.swarm.session import SwarmSession

PROMPT = [1, 2, 3, 4]
TIMEOUT_SECONDS = 60


class Applicant:
    cancelled = False
    on_cancel: Callable[[], None] | None = None
    may_wait = False

    def queued(self, place: int) -> None:
        assert self.may_wait, "there is room for all"


class NoServers:
    """The routing of a swarm without servers; who looks for them in vain tries again tomorrow."""

    num_blocks = 1
    max_attempts = 2
    connect_timeout = request_timeout = 1.0
    p2p: Any = None
    tries = 0

    async def find_servers(self, start: int, end: int, cache_tokens: int) -> Any:
        self.tries += 1
        raise MissingBlocksError([start])

    def retry_delay(self, attempt: int) -> float:
        return 24 * 3600.0


class Echo:
    """Caches in a swarm that answers at once."""

    def __init__(self, max_length: int, patience: float) -> None:
        self.max_length = max_length
        self.position = 0

    async def step(self, hidden_states: torch.Tensor, permit: Permit | None = None) -> torch.Tensor:
        self.position += hidden_states.shape[1]
        return hidden_states

    async def close(self) -> None:
        pass


class Silent(Echo):
    """Caches on a server that never answers."""

    async def step(self, hidden_states: torch.Tensor, permit: Permit | None = None) -> torch.Tensor:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.fixture(scope="module")
def modules(model: Path) -> ClientModules:
    return load_client_modules(open_checkpoint(str(model)), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
async def swarm(modules: ClientModules) -> AsyncIterator[Swarm]:
    rooms = RoomQueue(max_waiting=4, timeout=TIMEOUT_SECONDS, idle_timeout=TIMEOUT_SECONDS)
    swarm = Swarm(modules, Echo, rooms, prefill_chunk_tokens=2)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        yield swarm
        # All places are free again, and no more than there were.
        assert swarm.prefills.free == PREFILLS_AT_ONCE


def begin(swarm: Swarm) -> asyncio.Task[torch.Tensor | None]:
    context = Context(swarm, "somebody", 100)
    context.tokens += PROMPT
    return asyncio.create_task(context.feed(1, Applicant()))


async def end(tasks: list[asyncio.Task[torch.Tensor | None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_who_waits_to_try_again_lets_others_send_their_prompts(swarm: Swarm) -> None:
    routing = NoServers()
    swarm.open_session = functools.partial(SwarmSession, routing)  # type: ignore[arg-type]
    waiting = [begin(swarm) for _ in range(2 * PREFILLS_AT_ONCE)]
    while routing.tries < len(waiting):
        await asyncio.sleep(0)
    swarm.open_session = Echo
    assert await begin(swarm) is not None
    await end(waiting)


async def test_a_server_that_does_not_answer_holds_others_up_for_a_while_only(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "PREFILL_SECONDS", 0.05)
    swarm.open_session = Silent
    waiting = [begin(swarm) for _ in range(PREFILLS_AT_ONCE)]
    while swarm.prefills.free:
        await asyncio.sleep(0)
    swarm.open_session = Echo
    assert await begin(swarm) is not None
    await end(waiting)


class SmallServer(Echo):
    """Caches on a server with room for five tokens, all of which others have; it says so only if it may wait."""

    SIZE = 5
    opened: ClassVar[list[tuple[int, bool]]] = []

    def __init__(self, max_length: int, patience: float) -> None:
        super().__init__(max_length, patience)
        self.opened.append((max_length, patience > 0))
        self._may_wait = patience > 0

    async def step(self, hidden_states: torch.Tensor, permit: Permit | None = None) -> torch.Tensor:
        if self._may_wait and self.max_length > self.SIZE:
            raise MaximumLengthExceededError("too long", limit=self.SIZE)
        raise AttentionCacheFullError


class Resident:
    owner = "somebody else"

    async def evict(self) -> None:
        raise AssertionError("it has no room to give")


async def test_what_no_server_can_hold_is_refused_at_once_and_costs_others_nothing(swarm: Swarm) -> None:
    resident, applicant = Resident(), Applicant()
    await swarm.rooms.admit(resident, lambda _: asyncio.sleep(0, True), applicant)
    swarm.rooms.settled(resident)
    swarm.rooms.idle(resident)
    swarm.open_session = SmallServer
    context = Context(swarm, "somebody", 100)
    context.tokens += range(1, SmallServer.SIZE + 2)
    applicant.may_wait = True
    with pytest.raises(MaximumLengthExceededError, match="too long"):
        await context.feed(1, applicant)
    assert [may_wait for _, may_wait in SmallServer.opened] == [False, True]
    assert (swarm.rooms.waiting, swarm.rooms.residents) == (0, 1)


class Consumer(Applicant):
    is_slow = False

    async def take(self, *_: object, **__: object) -> None:
        pass


class OnePlace(Echo):
    """Caches on a server with room for one session."""

    is_taken: ClassVar[bool] = False
    _has_place = False

    async def step(self, hidden_states: torch.Tensor, permit: Permit | None = None) -> torch.Tensor:
        if not self._has_place:
            if OnePlace.is_taken:
                raise AttentionCacheFullError
            OnePlace.is_taken = self._has_place = True
        return await super().step(hidden_states, permit)

    async def close(self) -> None:
        if self._has_place:
            OnePlace.is_taken = self._has_place = False


class Listener(Consumer):
    """Counts what comes, until it has had enough."""

    may_wait = True
    tokens = 0

    async def take(self, *chunk: object, **__: object) -> None:
        self.tokens += cast(int, chunk[1])

    async def hear(self, tokens: int) -> None:
        """Wait for so many tokens more."""
        enough = self.tokens + tokens
        while self.tokens < enough:
            await asyncio.sleep(0.001)


async def test_a_long_stream_makes_room_for_others_after_its_slice_and_goes_on(
    swarm: Swarm, modules: ClientModules, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "SLICE_SECONDS", 0.1)
    monkeypatch.setattr(IncrementalDetokenizer, "holds_tokens", False)  # each token is a chunk
    swarm.open_session = OnePlace
    texts = Tokenizer(str(model), None, {})
    monkeypatch.setattr(texts, "end_of_sequence_ids", frozenset())  # it never ends by itself
    shared = Model(texts, HeadBatcher(modules, row_seconds=0.0), swarm, PrefixStore(idle_timeout=60))
    session, endless = Session(shared, "somebody", 100_000), Listener()
    streaming = asyncio.create_task(session.generate(GenerationRequest("Hi", chunk_tokens=1), endless))
    await endless.hear(3)
    for owner in ("another", "a third"):
        other = Session(shared, owner, 100)
        await other.generate(GenerationRequest("Hello", max_new_tokens=3), Listener())
        await other.close()
        await endless.hear(3)
    assert swarm.counts.caches_given_back >= 1  # and not only where it had outgrown them
    endless.cancelled = True
    await streaming
    await session.close()
    assert not OnePlace.is_taken


class FewPlaces(Echo):
    """Caches on a server with room for so many tokens; longer ones than all of it are refused for ever."""

    TOTAL = 3400
    taken: ClassVar[int] = 0
    opened: ClassVar[list[int]] = []
    _has_place = False

    async def step(self, hidden_states: torch.Tensor, permit: Permit | None = None) -> torch.Tensor:
        if not self._has_place:
            if FewPlaces.taken + self.max_length > self.TOTAL:
                raise AttentionCacheFullError
            FewPlaces.taken += self.max_length
            self._has_place = True
            self.opened.append(self.max_length)
        return await super().step(hidden_states, permit)

    async def close(self) -> None:
        if self._has_place:
            FewPlaces.taken -= self.max_length
            self._has_place = False


async def test_who_asks_token_by_token_has_room_for_more_than_one_though_it_is_scarce(swarm: Swarm) -> None:
    swarm.open_session, swarm.prefill_chunk_tokens = FewPlaces, 512
    applicant = Applicant()
    applicant.may_wait = True
    contexts = [Context(swarm, f"user {number}", 8000, spare_tokens=64) for number in range(3)]
    for context, length in zip(contexts, (700, 700, 950), strict=True):
        context.tokens += [1] * length
        assert await context.feed(1, applicant) is not None  # the first two are busy from now on
    FewPlaces.opened.clear()
    for _ in range(200):
        context.tokens.append(1)
        assert await context.feed(1, applicant) is not None
    assert FewPlaces.opened == [1089, 1154]
    for context in contexts:
        await context.drop_caches()
    assert FewPlaces.taken == 0


class SlowReader(Consumer):
    """Takes the log probabilities of a few tokens, and no more until it goes on."""

    may_wait = True

    def __init__(self) -> None:
        self.taken = 0
        self.goes_on = asyncio.Event()

    @property
    def is_slow(self) -> bool:  # type: ignore[override]
        return self.taken >= 2 and not self.goes_on.is_set()

    async def take(self, *_: object, **more: object) -> None:
        if self.is_slow:
            await self.goes_on.wait()
        self.taken += len(cast(tuple[object, ...], more.get("prompt_logprobs", ())))


async def test_others_may_have_the_caches_of_who_does_not_read_the_prompt_s_log_probabilities(
    swarm: Swarm, modules: ClientModules, model: Path
) -> None:
    swarm.open_session = OnePlace
    shared = Model(
        Tokenizer(str(model), None, {}),
        HeadBatcher(modules, row_seconds=0.0),
        swarm,
        PrefixStore(idle_timeout=60),
    )
    reader, prompt = SlowReader(), "Hello there, how are you?"
    session = Session(shared, "somebody", 100)
    request = GenerationRequest(prompt, max_new_tokens=0, prompt_logprobs=0)
    generating = asyncio.create_task(session.generate(request, reader))
    while not reader.is_slow:
        await asyncio.sleep(0)
    other = Session(shared, "another", 100)
    await other.generate(GenerationRequest("Hello", max_new_tokens=3), Listener())
    await other.close()
    reader.goes_on.set()
    await generating
    assert reader.taken == len(shared.tokenizer.encode(prompt, at_start=True))
    await session.close()
    assert not OnePlace.is_taken


async def test_who_leaves_a_silent_server_is_not_waited_for(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "LAST_STEP_SECONDS", 0.05)
    swarm.open_session = OnePlace
    answers = asyncio.Event()
    step = OnePlace.step

    async def step_when_it_answers(
        self: OnePlace, hidden_states: torch.Tensor, permit: Permit | None = None
    ) -> torch.Tensor:
        await answers.wait()
        return await step(self, hidden_states, permit)

    monkeypatch.setattr(OnePlace, "step", step_when_it_answers)
    applicant = Applicant()
    holder = Context(swarm, "somebody", 100)
    holder.tokens += PROMPT
    answers.set()
    assert await holder.feed(1, applicant) is not None

    # In a step: the caches are given up; the history is not.
    holder.tokens.append(5)
    answers.clear()
    feeding = asyncio.create_task(holder.feed(1, applicant))
    await leave(applicant)
    assert await feeding is None
    assert (swarm.rooms.residents, OnePlace.is_taken) == (0, False)
    answers.set()
    applicant.cancelled = False
    assert await holder.feed(1, applicant) is not None
    assert holder.cached_tokens == len(PROMPT) + 1

    # As the head of the queue, while it tries: the next one has its turn.
    applicants = [Applicant(), Applicant()]
    feedings = []
    for applicant in applicants:
        applicant.may_wait = True
        waiting = Context(swarm, "another", 100)
        waiting.tokens += PROMPT
        feedings.append(asyncio.create_task(waiting.feed(1, applicant)))
        while swarm.rooms.waiting < len(feedings):
            await asyncio.sleep(0)
    answers.clear()
    await asyncio.sleep(2 * rooms.LOOK_AGAIN_SECONDS)
    await leave(applicants[0])
    assert await feedings[0] is None
    assert swarm.rooms.waiting == 1
    answers.set()
    await holder.drop_caches()
    assert await feedings[1] is not None
    await waiting.drop_caches()
    assert not OnePlace.is_taken


async def test_who_leaves_while_he_waits_for_others_prompts_is_not_waited_for_in_the_step(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "LAST_STEP_SECONDS", 0.2)
    swarm.open_session = Silent
    for _ in range(PREFILLS_AT_ONCE):
        await swarm.prefills.take("somebody")
    context, applicant = Context(swarm, "another", 100), Applicant()
    context.tokens += PROMPT
    feeding = asyncio.create_task(context.feed(1, applicant))
    await leave(applicant)
    for _ in range(PREFILLS_AT_ONCE):
        swarm.prefills.give_back()
    assert await feeding is None


async def leave(applicant: Applicant) -> None:
    """Be cancelled, twice, in the middle of a step."""
    while applicant.on_cancel is None:
        await asyncio.sleep(0)
    applicant.cancelled = True
    for _ in range(2):
        applicant.on_cancel()


async def test_others_may_have_the_caches_of_who_waits_for_the_tokenizer(
    swarm: Swarm, modules: ClientModules, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "IN_LOOP_SIZE", 2)
    texts = Tokenizer(str(model), None, {})
    encode, is_begun, go_on = texts.encode, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def waiting_encode(inputs: str | ChatPrompt | tuple[int, ...], *, at_start: bool) -> list[int]:
        if len(cast(str, inputs)) > 2:
            loop.call_soon_threadsafe(is_begun.set)
            assert go_on.wait(TIMEOUT_SECONDS)
        return encode(inputs, at_start=at_start)

    monkeypatch.setattr(texts, "encode", waiting_encode)
    batcher = HeadBatcher(modules, row_seconds=0.0)
    session = Session(Model(texts, batcher, swarm, PrefixStore(idle_timeout=60)), "somebody", 100)
    await session.generate(GenerationRequest("Hi", max_new_tokens=1), Consumer())
    assert swarm.rooms.residents == 1
    generating = asyncio.create_task(
        session.generate(GenerationRequest("Hello", max_new_tokens=1), Consumer())
    )
    await is_begun.wait()
    await swarm.rooms.evict_idle(0)
    assert swarm.rooms.residents == 0
    go_on.set()
    await generating
    assert swarm.rooms.residents == 1
    assert swarm.counts.tokens_replayed > 0
    await session.close()
