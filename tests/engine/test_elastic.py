"""More users than the swarm has room for, caches that come and go, and contexts that are used again: on a real host."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from operator import sub
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from petals_chat.engine.sessions import CONTINUED_TOKENS
from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.errors import AttentionCacheFullError, MaximumLengthExceededError, WorkerLostError
from petals_chat.protocol.messages import FinishReason, GenerationRequest, StatusReported
from petals_chat.settings import (
    ChatSettings,
    Dtype,
    EngineSettings,
    LimitSettings,
    ModelSettings,
    Settings,
    SwarmSettings,
)
from petals_chat.swarm.host_options import HostReady
from tests.engine.generating import collect, text_of
from tests.swarm_processes import running_host
from tests.tiny_models import greedy_tokens, load_reference
from tests.tiny_tokenizers import save_tokenizer

USERS = 12
NEW_TOKENS = 24
CACHE_TOKENS = 256
"""Room for four contexts of 64 tokens."""
TIMEOUT_SECONDS = 120

Serve = Callable[..., AbstractAsyncContextManager[ProcessEngine]]


@pytest.fixture(scope="module")
def host(model: Path) -> Iterator[HostReady]:
    with running_host(model, f"--cache-tokens={CACHE_TOKENS}") as host:
        yield host


@pytest.fixture(scope="module")
def serve(model: Path, host: HostReady, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    @asynccontextmanager
    async def serve(
        *,
        limits: LimitSettings | None = None,
        cache_idle_timeout_seconds: float = 120,
        workers: int = 1,
        reuse_prefixes: bool = True,
    ) -> AsyncIterator[ProcessEngine]:
        settings = Settings(
            models=(
                ModelSettings(
                    key="model",
                    repository=str(model),
                    name="model",
                    initial_peers=host.peers,
                    dht_prefix=host.dht_prefix,
                    chat=ChatSettings(max_session_length=CACHE_TOKENS),
                ),
            ),
            limits=limits or LimitSettings(),
            swarm=SwarmSettings(
                prefill_chunk_tokens=16, cache_idle_timeout_seconds=cache_idle_timeout_seconds
            ),
            engine=EngineSettings(
                dtype=Dtype.FLOAT32,
                threads=1,
                workers=workers,
                reuse_prefixes=reuse_prefixes,
                data_dir=tmp_path_factory.mktemp("data"),
            ),
        )
        async with asyncio.timeout(TIMEOUT_SECONDS), ProcessEngine(settings) as engine:
            await engine.wait_until_settled()
            yield engine

    return serve


class Reference:
    """What local transformers would say."""

    def __init__(self, model: Path) -> None:
        self.model = load_reference(model)
        self.tokenizer: PreTrainedTokenizerFast = save_tokenizer("byte_level", model)

    def continue_greedily(self, text: str, new_tokens: int) -> str:
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        tokens += greedy_tokens(self.model, tokens, new_tokens)
        whole: str = self.tokenizer.decode(tokens)
        return whole[len(text) :]


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


def prompt_of(user: int) -> str:
    return f"User {user} asks: how many machines does the swarm have today?"


def printable(text: str) -> str:
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


class Counts(NamedTuple):
    tokens_processed: int
    tokens_replayed: int
    prefix_hits: int
    prefix_tokens: int


async def counts_of(engine: ProcessEngine) -> Counts:
    report = await report_of(engine, "reciting")
    return Counts(report.tokens_processed, report.tokens_replayed, report.prefix_hits, report.prefix_tokens)


async def report_of(engine: ProcessEngine, model: str = "model") -> StatusReported:
    """A report that was sent after this was called."""
    before = engine.statuses[model].report
    while (report := engine.statuses[model].report) is before or report is None:
        await asyncio.sleep(0.05)
    return report


async def test_all_are_served_where_only_some_have_room(serve: Serve, reference: Reference) -> None:
    places: list[int] = []

    async def talk(engine: ProcessEngine, user: int) -> str:
        session = await engine.open_session("model", 128, owner=f"user {user}")
        request = GenerationRequest(prompt_of(user), max_new_tokens=NEW_TOKENS, chunk_tokens=1)
        chunks = await collect(session, request)
        places.extend(chunk.queue_place for chunk in chunks if chunk.queue_place is not None)
        await session.close()
        return text_of(chunks)

    async with serve() as engine:
        texts = await asyncio.gather(*(talk(engine, user) for user in range(USERS)))
        report = await report_of(engine)
    assert [printable(text) for text in texts] == [
        printable(reference.continue_greedily(prompt_of(user), NEW_TOKENS)) for user in range(USERS)
    ]
    assert max(places) >= USERS - 6
    assert min(places) == 1
    assert (report.resident_sessions, report.waiting_generations, report.open_sessions) == (0, 0, 0)


async def test_clients_that_ask_token_by_token_take_turns_too(serve: Serve, reference: Reference) -> None:
    async def talk(engine: ProcessEngine, user: int) -> str:
        session = await engine.open_session("model", 128, owner=f"user {user}")
        text = text_of(await collect(session, GenerationRequest(prompt_of(user), max_new_tokens=1)))
        for _ in range(NEW_TOKENS - 1):
            text += text_of(await collect(session, GenerationRequest(None, max_new_tokens=1)))
        return text  # its session stays open, as those of slow readers do

    async with serve() as engine:
        texts = await asyncio.gather(*(talk(engine, user) for user in range(USERS)))
        report = await report_of(engine)
    assert [printable(text) for text in texts] == [
        printable(reference.continue_greedily(prompt_of(user), NEW_TOKENS)) for user in range(USERS)
    ]
    assert report.caches_given_back > 0
    assert report.tokens_replayed < 4 * USERS * NEW_TOKENS  # with each second token it would be 14 times
    assert report.open_sessions == USERS


async def test_a_session_whose_caches_were_given_back_goes_on_identically(
    serve: Serve, reference: Reference
) -> None:
    async with serve(cache_idle_timeout_seconds=0.2) as engine:
        session = await engine.open_session("model", 200)
        text = prompt_of(0)
        answer = text_of(await collect(session, GenerationRequest(text, max_new_tokens=10)))
        while (report := await report_of(engine)).resident_sessions:
            pass
        assert report.caches_given_back == 1
        answer += text_of(await collect(session, GenerationRequest(None, max_new_tokens=10)))
        assert (await report_of(engine)).tokens_replayed > 0
        await session.close()
    assert printable(answer) == printable(reference.continue_greedily(text, 20))


async def test_who_waits_too_long_is_told_so_and_can_try_again(serve: Serve) -> None:
    async with serve(limits=LimitSettings(queue_timeout_seconds=0.5)) as engine:
        holder = await engine.open_session("model", CACHE_TOKENS)
        stream = holder.generate(GenerationRequest("Hello", chunk_tokens=1))
        await anext(stream)  # and takes no more: it holds all there is, in the middle of a generation
        other = await engine.open_session("model", CACHE_TOKENS)
        with pytest.raises(AttentionCacheFullError, match=r"within 0\.5 s"):
            await collect(other, GenerationRequest(prompt_of(1) * 10, max_new_tokens=1))
        await stream.aclose()
        await holder.close()
        assert text_of(await collect(other, GenerationRequest(prompt_of(1) * 3, max_new_tokens=1)))
        await other.close()


async def test_who_leaves_while_waiting_is_out_of_the_queue_at_once(serve: Serve) -> None:
    async with serve() as engine:
        holder = await engine.open_session("model", CACHE_TOKENS)
        stream = holder.generate(GenerationRequest(prompt_of(0), chunk_tokens=1))
        await anext(stream)
        other = await engine.open_session("model", CACHE_TOKENS)
        waiting = other.generate(GenerationRequest(prompt_of(1) * 3, chunk_tokens=1))
        first = await anext(waiting)
        assert first.queue_place == 1
        await waiting.aclose()
        async with asyncio.timeout(2):
            await other.close()
        assert (await report_of(engine)).waiting_generations == 0
        await stream.aclose()
        await holder.close()


async def test_a_stateless_chat_processes_only_what_is_new(engine: ProcessEngine) -> None:
    """Ten turns on the model with scripts, whose answers have the tokens that a tokenizer gives their text."""

    async def chat(owners: Iterator[str]) -> tuple[list[str], list[tuple[int, int]], Counts]:
        before = await counts_of(engine)
        text, answers, usages = "", [], []
        for owner in itertools.islice(owners, 10):
            text += "A"
            session = await engine.open_session("reciting", 250, owner=owner, is_stateless=True)
            chunks = await collect(session, GenerationRequest(text, max_new_tokens=11))
            await session.close()
            answers.append(text_of(chunks))
            text += answers[-1]
            usages.append((chunks[-1].prompt_tokens, chunks[-1].cached_tokens))
        return answers, usages, Counts(*(map(sub, await counts_of(engine), before)))

    answers, usages, with_reuse = await chat(itertools.repeat("somebody"))
    plain_answers, plain_usages, without_reuse = await chat(f"stranger {number}" for number in range(10))
    assert answers == plain_answers
    assert set(answers) == {"😀世界 machine"}
    assert [prompt for prompt, _ in usages] == [prompt for prompt, _ in plain_usages]
    assert {cached for _, cached in plain_usages} == {0}
    # From the second turn on: the new token, and the one before it, of which nobody needed the successor yet.
    assert [prompt - cached for prompt, cached in usages] == [1] + 9 * [2]
    assert with_reuse == Counts(usages[-1][0] + 11 - 1, 0, 9, sum(cached for _, cached in usages))
    assert without_reuse == Counts(sum(prompt + 11 - 1 for prompt, _ in plain_usages), 0, 0, 0)


async def test_what_is_reused_is_what_transformers_would_have_there(
    serve: Serve, reference: Reference
) -> None:
    """Ten turns on a model whose answers depend on all that was said, as tokens, whose text need not be exact."""
    async with serve() as engine:
        tokens: list[int] = reference.tokenizer(prompt_of(0))["input_ids"]
        answered = 0
        for turn in range(10):
            session = await engine.open_session("model", CACHE_TOKENS, owner="somebody", is_stateless=True)
            chunks = await collect(session, GenerationRequest(tuple(tokens), max_new_tokens=5))
            await session.close()
            assert chunks[-1].cached_tokens == max(0, answered - 1)
            said = reference.tokenizer.decode(tokens)
            tokens += greedy_tokens(reference.model, tokens, 5)
            assert printable(text_of(chunks)) == printable(reference.tokenizer.decode(tokens)[len(said) :])
            answered = len(tokens)
            tokens += reference.tokenizer(f" {turn}")["input_ids"]
        report = await report_of(engine)
    assert (report.prefix_hits, report.tokens_replayed) == (9, 0)


async def test_reuse_can_be_switched_off(serve: Serve) -> None:
    async with serve(reuse_prefixes=False) as engine:
        for text in ("one", "one two three"):
            session = await engine.open_session("model", 100, owner="somebody", is_stateless=True)
            chunks = await collect(session, GenerationRequest(text, max_new_tokens=1))
            await session.close()
            assert chunks[-1].cached_tokens == 0
        assert (await report_of(engine)).resident_sessions == 0


async def test_a_gateway_waits_for_the_room_of_another_and_gets_that_of_one_that_was_killed(
    serve: Serve, reference: Reference
) -> None:
    children = set(psutil.Process().children())
    async with serve() as first:
        (worker,) = [child for child in set(psutil.Process().children()) - children if is_worker(child)]
        async with serve() as second:
            holder = await first.open_session("model", CACHE_TOKENS)
            stream = holder.generate(GenerationRequest(prompt_of(0), chunk_tokens=1))
            await anext(stream)  # it has all the room, in the middle of a generation
            other = await second.open_session("model", CACHE_TOKENS)
            waiting = other.generate(GenerationRequest(prompt_of(1) * 3, max_new_tokens=4))
            assert (await anext(waiting)).queue_place == 1
            worker.kill()
            text = text_of([chunk async for chunk in waiting])
            with pytest.raises(WorkerLostError):
                async for _ in stream:
                    pass
    assert printable(text) == printable(reference.continue_greedily(prompt_of(1) * 3, 4))


async def test_what_hosts_allow_for_one_session_limits_those_of_a_gateway(
    model: Path, reference: Reference, tmp_path: Path
) -> None:
    """The gateway would allow more than its hosts do."""
    with running_host(model, f"--cache-tokens={CACHE_TOKENS}", "--max-session-length=100") as host:
        settings = ModelSettings(
            key="model",
            repository=str(model),
            name="model",
            initial_peers=host.peers,
            dht_prefix=host.dht_prefix,
        )
        engine_settings = EngineSettings(dtype=Dtype.FLOAT32, threads=1, data_dir=tmp_path)
        async with (
            asyncio.timeout(TIMEOUT_SECONDS),
            ProcessEngine(Settings(models=(settings,), engine=engine_settings)) as engine,
        ):
            await engine.wait_until_settled()
            session = await engine.open_session("model", 400)
            chunks = await collect(session, GenerationRequest(prompt_of(0)))
            prompt_tokens = len(reference.tokenizer(prompt_of(0))["input_ids"])
            assert chunks[-1].finish_reason is FinishReason.CONTEXT_FULL
            assert chunks[-1].context_limit == 100
            new_tokens = sum(chunk.token_count for chunk in chunks)
            assert prompt_tokens + new_tokens == 101  # the last one has not been to the hosts
            assert printable(text_of(chunks)) == printable(
                reference.continue_greedily(prompt_of(0), new_tokens)
            )
            with pytest.raises(MaximumLengthExceededError, match="allow 100 tokens"):
                await collect(session, GenerationRequest(None, max_new_tokens=1))
            await session.close()


async def test_workers_make_room_for_each_other(serve: Serve) -> None:
    """An idle session of one worker that fills the host keeps that of another waiting, but not for long."""
    async with serve(workers=2) as engine:
        first, second = [await engine.open_session("model", CACHE_TOKENS) for _ in range(2)]
        await collect(first, GenerationRequest(prompt_of(0) * 3, max_new_tokens=250))
        async with asyncio.timeout(30):  # far less than the idle time-out of caches
            chunks = await collect(second, GenerationRequest(prompt_of(1) * 3, max_new_tokens=250))
        assert chunks[0].queue_place == 1
        await first.close()
        await second.close()


async def test_sessions_are_spread_over_workers_and_stay_where_they_are(
    serve: Serve, reference: Reference
) -> None:
    children = set(psutil.Process().children())
    async with serve(workers=2) as engine:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            workers: list[psutil.Process] = []
            while len(workers) < 2:
                await asyncio.sleep(0.1)
                workers = [child for child in set(psutil.Process().children()) - children if is_worker(child)]
        sessions = [await engine.open_session("model", 64, owner=f"user {user}") for user in range(4)]
        before = [cpu_seconds(worker) for worker in workers]
        texts = [""] * len(sessions)
        for request in (
            GenerationRequest("Hello there", max_new_tokens=8),
            GenerationRequest(None, max_new_tokens=8),
        ):
            parts = await asyncio.gather(*(collect(session, request) for session in sessions))
            texts = [text + text_of(part) for text, part in zip(texts, parts, strict=True)]
        assert {printable(text) for text in texts} == {
            printable(reference.continue_greedily("Hello there", 16))
        }
        while (await report_of(engine)).open_sessions != len(sessions):
            await asyncio.sleep(0.05)  # it may be the sum of a new and an old report
        assert all(cpu_seconds(worker) > start for worker, start in zip(workers, before, strict=True))


def is_worker(process: psutil.Process) -> bool:
    return "petals_chat.engine.worker" in process.cmdline()


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def test_500_sessions_dropped_in_every_state_leave_nothing(serve: Serve) -> None:
    """States: never used, finished, without a session's end, in mid-generation, in prefill, while it waits, failed,
    grown beyond its room, while a long text is tokenised, paused since nobody takes what was generated.

    Meanwhile those of all states take the room from each other.
    """

    async def drop(engine: ProcessEngine, number: int) -> None:
        state = number % 10
        session = await engine.open_session("model", 200, owner=f"user {number % 5}", is_stateless=state == 2)
        request = GenerationRequest(prompt_of(number), max_new_tokens=2, chunk_tokens=1)
        stream = session.generate(request)
        if state in (1, 2):
            await collect(session, request)
        elif state == 3:
            async for chunk in stream:
                if chunk.text:
                    break
        elif state in (4, 5):
            with suppress(TimeoutError):
                async with asyncio.timeout(0.01 * state):
                    await anext(stream)
        elif state == 6:
            with pytest.raises(MaximumLengthExceededError):
                await collect(session, GenerationRequest(prompt_of(number) * 20, max_new_tokens=1))
        elif state == 7:
            await collect(session, request)
            new_tokens = CONTINUED_TOKENS + 1 if number < 100 else 1
            await collect(session, GenerationRequest(None, max_new_tokens=new_tokens))
        elif state == 8:
            stream = session.generate(GenerationRequest("word " * 10_000, max_new_tokens=1))
            with suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    await anext(stream)
        elif state == 9:
            stream = session.generate(GenerationRequest(prompt_of(number), max_new_tokens=50, chunk_tokens=1))
            await anext(stream)
            await asyncio.sleep(0.1)
        await stream.aclose()
        await session.close()

    async def drop_some(engine: ProcessEngine, numbers: range) -> None:
        for number in numbers:
            await drop(engine, number)

    children = set(psutil.Process().children())
    async with serve() as engine:
        (worker,) = [child for child in set(psutil.Process().children()) - children if is_worker(child)]
        await drop_some(engine, range(10))  # what is made once is there now
        tasks = len(asyncio.all_tasks())
        before = (worker.num_threads(), worker.num_fds())
        await asyncio.gather(*(drop_some(engine, range(start, 500, 10)) for start in range(10)))
        report = await report_of(engine)
        while report.running_generations:
            report = await report_of(engine)
        assert (report.open_sessions, report.waiting_generations) == (0, 0)
        assert len(asyncio.all_tasks()) <= tasks
        # All of the host's room can be had, once what was kept for requests that extend it is given back.
        session = await engine.open_session("model", CACHE_TOKENS)
        await collect(session, GenerationRequest(prompt_of(0) * 3, max_new_tokens=250))
        await session.close()
        report = await report_of(engine)
        assert report.resident_sessions == 0
        threads, descriptors = worker.num_threads(), worker.num_fds()
        assert threads <= before[0] + 4  # those of an executor, which are made when they are needed
        assert descriptors <= before[1]
