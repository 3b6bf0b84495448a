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

from petals_chat.engine import contexts, tokenizer
from petals_chat.engine.contexts import PREFILLS_AT_ONCE, Context, Permit, Swarm
from petals_chat.engine.prefixes import PrefixStore
from petals_chat.engine.rooms import RoomQueue
from petals_chat.engine.sessions import Model, Session
from petals_chat.engine.tokenizer import Tokenizer
from petals_chat.errors import AttentionCacheFullError, MaximumLengthExceededError, MissingBlocksError
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
        for _ in range(PREFILLS_AT_ONCE):
            assert not swarm.prefills.locked()
            await swarm.prefills.acquire()
        assert swarm.prefills.locked()


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
    while not swarm.prefills.locked():
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
