"""What a batch of the LM head waits for, and what not."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

from petals_chat.generation.sampling import TokenSampler
from petals_chat.head.batcher import HeadBatcher, Trip
from petals_chat.head.modules import ClientModules, Norm
from petals_chat.protocol.messages import SamplingParameters

VOCAB_SIZE, HIDDEN_SIZE = 50, 16
LONG_SECONDS = 600.0
"""Longer than any test runs: what waits for it has waited for ever."""
SOON = LONG_SECONDS / 10


class NotingModules(ClientModules):
    """Notes what is computed; waits before it as long as `may_compute` is not set."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
        super().__init__(weights, None, Norm(torch.ones(HIDDEN_SIZE), None, 1e-5), weights)
        object.__setattr__(self, "batches", [])
        object.__setattr__(self, "threads", [])
        object.__setattr__(self, "may_compute", threading.Event())
        self.may_compute.set()

    batches: list[int]
    threads: list[int]
    may_compute: threading.Event

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(hidden_states))
        self.threads.append(torch.get_num_threads())
        assert self.may_compute.wait(LONG_SECONDS)
        if hidden_states.isnan().any():
            raise ValueError("not a number")
        return super().logits(hidden_states)


class User:
    """A session as the batcher sees it; its last step took ``last_seconds``."""

    def __init__(self, batcher: HeadBatcher, number: int, last_seconds: float | None = SOON) -> None:
        self.batcher = batcher
        self.trip = Trip()
        self.trip.last_seconds = last_seconds
        self.state = torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(number))
        self.sampler = TokenSampler(SamplingParameters(), VOCAB_SIZE, [])

    async def ask(self) -> int:
        return await self.batcher.next_token(self.state, self.sampler)

    async def step_and_ask(self, is_back: asyncio.Event) -> int:
        with self.batcher.expecting(self.trip):
            await is_back.wait()
        return await self.ask()

    def likeliest(self, modules: ClientModules) -> int:
        return int(ClientModules.logits(modules, self.state[None]).argmax())


@pytest.fixture
def modules() -> NotingModules:
    return NotingModules()


@pytest.fixture
def batcher(modules: NotingModules) -> Iterator[HeadBatcher]:
    batcher = HeadBatcher(modules, row_seconds=LONG_SECONDS)
    yield batcher
    batcher.close()


async def let_it_begin() -> None:
    """As many turns of the loop as a batch needs to begin, if it is to begin."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_row_waits_for_those_that_are_about_to_come(
    batcher: HeadBatcher, modules: NotingModules
) -> None:
    users = [User(batcher, number) for number in range(3)]
    back = [asyncio.Event() for _ in users]
    asked = [
        asyncio.create_task(user.step_and_ask(is_back)) for user, is_back in zip(users, back, strict=True)
    ]
    for is_back in back:
        await let_it_begin()
        assert modules.batches == []
        is_back.set()
    assert await asyncio.gather(*asked) == [user.likeliest(modules) for user in users]
    assert modules.batches == [3]


async def test_the_first_step_of_a_session_is_taken_to_be_as_long_as_another_sessions(
    batcher: HeadBatcher, modules: NotingModules
) -> None:
    one, other = User(batcher, 1), User(batcher, 2, last_seconds=None)
    batcher._last_trip_seconds = SOON
    is_back = asyncio.Event()
    asked = [asyncio.create_task(other.step_and_ask(is_back)), asyncio.create_task(one.ask())]
    await let_it_begin()
    assert modules.batches == []
    is_back.set()
    assert await asyncio.gather(*asked) == [user.likeliest(modules) for user in (other, one)]
    assert modules.batches == [2]


async def test_a_row_waits_for_clients_who_ask_for_each_token(
    batcher: HeadBatcher, modules: NotingModules
) -> None:
    one, other, leaving = User(batcher, 1), User(batcher, 2), User(batcher, 3)
    for user in (other, leaving):
        batcher.expect(user.trip)
    asked = [asyncio.create_task(one.ask())]
    await let_it_begin()
    is_back = asyncio.Event()
    is_back.set()
    asked.append(asyncio.create_task(other.step_and_ask(is_back)))
    await let_it_begin()
    assert modules.batches == []
    batcher.forget(leaving.trip)
    assert await asyncio.gather(*asked) == [user.likeliest(modules) for user in (one, other)]
    assert modules.batches == [2]


async def test_a_row_does_not_wait_for_a_step_that_failed(
    batcher: HeadBatcher, modules: NotingModules
) -> None:
    one, other = User(batcher, 1), User(batcher, 2)
    fails = asyncio.Event()

    async def step() -> None:
        with batcher.expecting(other.trip):
            await fails.wait()
            raise ConnectionError

    stepping = asyncio.create_task(step())
    await let_it_begin()
    asked = asyncio.create_task(one.ask())
    await let_it_begin()
    assert modules.batches == []
    fails.set()
    assert await asked == one.likeliest(modules)
    assert other.trip.last_seconds == SOON
    with pytest.raises(ConnectionError):
        await stepping


async def test_a_row_does_not_wait_for_a_session_that_was_cancelled(
    batcher: HeadBatcher, modules: NotingModules
) -> None:
    one, other = User(batcher, 1), User(batcher, 2)
    stepping = asyncio.create_task(other.step_and_ask(asyncio.Event()))
    await let_it_begin()
    asked = asyncio.create_task(one.ask())
    await let_it_begin()
    assert modules.batches == []
    stepping.cancel()
    assert await asked == one.likeliest(modules)


@pytest.mark.parametrize(
    "last_seconds",
    [
        pytest.param(None, id="its first one"),
        pytest.param(0.0, id="late"),
        pytest.param(10 * LONG_SECONDS, id="far"),
    ],
)
async def test_a_row_does_not_wait_for_a_step_that_will_not_be_back_soon(
    last_seconds: float | None, batcher: HeadBatcher, modules: NotingModules
) -> None:
    one, other = User(batcher, 1), User(batcher, 2, last_seconds)
    with batcher.expecting(other.trip):
        assert await one.ask() == one.likeliest(modules)


async def test_a_row_waits_no_longer_than_a_batch_takes(modules: NotingModules) -> None:
    batcher = HeadBatcher(modules, row_seconds=0.01)
    one, other = User(batcher, 1), User(batcher, 2, last_seconds=0.009)
    with batcher.expecting(other.trip):
        assert await one.ask() == one.likeliest(modules)
    batcher.close()


async def test_who_is_alone_never_waits(batcher: HeadBatcher, modules: NotingModules) -> None:
    user = User(batcher, 1)
    for _ in range(3):
        with batcher.expecting(user.trip):
            await asyncio.sleep(0)
        assert await user.ask() == user.likeliest(modules)
    assert modules.batches == [1, 1, 1]


async def test_two_who_took_turns_come_together(batcher: HeadBatcher, modules: NotingModules) -> None:
    one, other = User(batcher, 1), User(batcher, 2)
    modules.may_compute.clear()

    async def two_tokens() -> None:
        await one.ask()
        with batcher.expecting(one.trip):
            await let_it_begin()
        await one.ask()

    asked = asyncio.create_task(two_tokens())
    await let_it_begin()
    other_asked = asyncio.create_task(other.ask())
    await let_it_begin()
    modules.may_compute.set()
    await asyncio.gather(asked, other_asked)
    assert modules.batches == [1, 2]


@pytest.mark.parametrize("row_seconds", [0.0, 1.0], ids=["in the loop", "in the thread"])
async def test_a_row_that_fails_fails_alone(modules: NotingModules, row_seconds: float) -> None:
    batcher = HeadBatcher(modules, row_seconds=row_seconds)
    broken, whole = User(batcher, 1), User(batcher, 2)
    broken.state.fill_(torch.nan)
    asked = [asyncio.create_task(user.ask()) for user in (broken, whole)]
    with pytest.raises(ValueError, match="not a number"):
        await asked[0]
    assert await asked[1] == whole.likeliest(modules)
    assert 2 in modules.batches
    batcher.close()


async def test_a_small_head_waits_for_nobody(modules: NotingModules) -> None:
    batcher = HeadBatcher(modules, row_seconds=0.0)
    users = [User(batcher, number) for number in range(3)]
    with batcher.expecting(users[2].trip):
        asked = [user.ask() for user in users[:2]]
        assert await asyncio.gather(*asked) == [user.likeliest(modules) for user in users[:2]]
    assert modules.batches == [2]


async def test_several_threads_compute_the_head_and_one_the_rest(modules: NotingModules) -> None:
    threads: list[int] = []

    class NotingMask:
        def allowed(self) -> torch.Tensor:
            threads.append(torch.get_num_threads())
            return torch.ones(VOCAB_SIZE, dtype=torch.bool)

        def add(self, token: int) -> None:
            """Any may come."""

    here = torch.get_num_threads()
    batcher = HeadBatcher(modules, row_seconds=LONG_SECONDS, threads=3)
    user = User(batcher, 1)
    user.sampler = TokenSampler(SamplingParameters(), VOCAB_SIZE, [], NotingMask())
    assert await user.ask() == user.likeliest(modules)
    batcher.close()
    assert (modules.threads, threads, torch.get_num_threads()) == ([3], [1], here)
