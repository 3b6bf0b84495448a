"""Turns: which steps are computed together, and that each session gets what it would get alone."""

import asyncio
import gc
import inspect
import itertools
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_chat.head.precision import cpu_computes_bfloat16
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.swarm import adapters, families
from tests.swarm.test_families import SERVED_KINDS
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.usefixtures("petals", "one_thread")

CPU = torch.device("cpu")
FOREVER = 3600.0


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Blocks:
    """The blocks of a checkpoint with their pool, as a host has them. Plays handler and runtime, turn by turn."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        from hivemind.utils.tensor_descr import BatchTensorDescriptor
        from petals.utils.auto_config import AutoDistributedConfig
        from petals.utils.convert_block import QuantType, convert_block

        from petals_chat.swarm.backend import SwarmBackend, install_backend, load_block
        from petals_chat.swarm.batching import BatchingPool, use_batching_pool
        from petals_chat.swarm.memory_cache import AttentionCaches

        checkpoint = open_checkpoint(str(directory))
        families.register(families.family_of(checkpoint.model_type))
        install_backend(checkpoint, lambda: None)
        self.config: Any = AutoDistributedConfig.from_pretrained(directory)
        self.dtype = dtype
        self.memory = AttentionCaches(1 << 30)
        schema = (BatchTensorDescriptor(1, 2048, self.config.hidden_size, dtype=dtype),)
        self.backends = {}
        for index in range(checkpoint.num_blocks):
            block = load_block(checkpoint, index, self.config, dtype)
            self.backends[f"tiny.{index}"] = SwarmBackend(
                f"tiny.{index}",
                convert_block(block, index, self.config, [CPU], CPU, QuantType.NONE),
                config=self.config,
                memory_cache=self.memory,
                backend_dtype=dtype,
                max_chunk_size_bytes=1 << 20,
                args_schema=schema,
                kwargs_schema={},
                outputs_schema=schema,
                min_batch_size=1,
                max_batch_size=4096,
            )
        use_batching_pool(self.backends)
        self.pool = next(iter(self.backends.values())).inference_pool
        assert isinstance(self.pool, BatchingPool)
        self.futures: dict[tuple[int, int], Future[list[torch.Tensor]]] = {}
        self.pool.submitted_tasks.answer = self._answer  # type: ignore[method-assign]
        assert all(backend.inference_pool is self.pool for backend in self.backends.values())
        self._handles = itertools.count()
        self.numbers = itertools.count()

    def _answer(self, outcomes: Iterable[tuple[tuple[int, int], Any]]) -> None:
        for uid, outcome in outcomes:
            future = self.futures.pop(uid)
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def open(self, room: int = 256, rows: int = 1, blocks: int | None = None, adapter: str = "") -> "Session":
        """A session through the first of the blocks, or all."""
        handles, uids = [], list(self.backends)[:blocks]
        for uid in uids:
            descriptors = self.backends[uid].get_inference_cache_descriptors(rows, room)
            pair = tuple(next(self._handles) for _ in descriptors)
            self.memory._pipe_send.send((pair, descriptors))
            handles.append(pair)
        with self.memory.use_cache():  # which reads what was sent, before the pipe is full
            pass
        return Session(self, uids, handles, rows, adapter)

    def turn(self) -> list[int]:
        """Compute the next turn; returns how many tokens of a row it took of each step."""
        turn, batch = self.pool.load_batch_to_runtime()
        outputs = self.pool.process_func(*batch)
        assert outputs[0].size(0) == len(turn)  # hivemind's runtime reports it
        self.pool.send_outputs_from_runtime(turn, outputs)
        return [share.length for share in turn]

    def turns(self) -> list[list[int]]:
        """Compute all that waits."""
        lengths = []
        while not self.pool.empty:
            lengths.append(self.turn())
        return lengths

    def states(self, tokens: int, seed: int, rows: int = 1) -> torch.Tensor:
        """Hidden states [rows, tokens, hidden_size], the same each time."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, tokens, self.config.hidden_size, generator=generator).to(self.dtype)


class Session:
    """A client's session, as far as a pool knows of it."""

    def __init__(
        self, blocks: Blocks, uids: list[str], handles: list[tuple[int, ...]], rows: int, adapter: str
    ) -> None:
        self._blocks, self._uids, self._handles, self._adapter = blocks, uids, handles, adapter
        self._position = 0
        self.rows = rows

    def arguments(
        self,
        states: torch.Tensor,
        prompts: list[torch.Tensor | None] | None = None,
        hypo_ids: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        """What Petals' handler passes to a pool for the next step."""
        from petals.data_structures import InferenceMetadata
        from petals.utils.misc import DUMMY_INT64

        infos = tuple(
            InferenceMetadata(uid, self._position, handles, self._adapter)
            for uid, handles in zip(self._uids, self._handles, strict=True)
        )
        ids = DUMMY_INT64 if hypo_ids is None else hypo_ids
        return (states, ids, infos, *(prompts or [None] * len(infos)))

    def submit(
        self,
        states: torch.Tensor,
        *,
        came: float | None = None,
        prompts: list[torch.Tensor | None] | None = None,
        hypo_ids: torch.Tensor | None = None,
    ) -> Any:
        """Put a step into the pool as it comes from a handler; returns its future."""
        from petals_chat.swarm.exchange import Task

        arguments = self.arguments(states, prompts, hypo_ids)
        future: Future[list[torch.Tensor]] = Future()
        uid = (0, next(self._blocks.numbers))
        self._blocks.futures[uid] = future
        self._blocks.pool.add(Task(1.0, came or time.monotonic(), uid, arguments))
        self._position += states.shape[1]
        return future

    def step(self, states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Compute a step alone."""
        future = self.submit(states, **arguments)
        self._blocks.turns()
        return output_of(future)

    def end(self) -> None:
        """As a handler does when the client has gone."""
        for handles in self._handles:
            self._blocks.memory._pipe_send.send((handles, None))


def output_of(future: Any) -> torch.Tensor:
    (output,) = future.result(timeout=0)
    assert isinstance(output, torch.Tensor)
    return output


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], Path]) -> Blocks:
    return Blocks(tiny_model("llama"))


def test_steps_of_one_token_are_computed_together(llama: Blocks) -> None:
    sessions = [llama.open() for _ in range(3)]
    for session, tokens in zip(sessions, (1, 5, 40), strict=True):
        session.step(llama.states(tokens, seed=tokens))
    futures = [session.submit(llama.states(1, seed=0)) for session in sessions]
    assert llama.turns() == [[1, 1, 1]]
    for future, tokens in zip(futures, (1, 5, 40), strict=True):
        alone = llama.open()
        alone.step(llama.states(tokens, seed=tokens))
        torch.testing.assert_close(output_of(future), alone.step(llama.states(1, seed=0)))


@pytest.mark.skipif(not cpu_computes_bfloat16(), reason="hosts compute in float32 on such a CPU")
@pytest.mark.parametrize("kind", SERVED_KINDS.values())
def test_in_bfloat16_a_session_gets_the_same_bits_alone_and_beside_others(
    tiny_model: Callable[[str], Path], kind: str
) -> None:
    blocks = Blocks(tiny_model(kind), torch.bfloat16)
    steps = {seed: [blocks.states(n, seed + n, rows=seed) for n in (70, 1, 1, 33, 1)] for seed in (1, 2)}
    alone = {}
    for seed, states in steps.items():
        session = blocks.open(rows=seed)
        alone[seed] = [session.step(step) for step in states]
    sessions = {seed: blocks.open(rows=seed) for seed in steps}
    other = blocks.open(room=2000)
    for number in range(5):
        other.submit(blocks.states(1 if number == 2 else 150, seed=9))
        futures = {seed: sessions[seed].submit(steps[seed][number]) for seed in steps}
        blocks.turns()
        for seed, future in futures.items():
            assert torch.equal(output_of(future), alone[seed][number])


@pytest.mark.skipif(not cpu_computes_bfloat16(), reason="hosts compute in float32 on such a CPU")
def test_in_bfloat16_linear_layers_give_two_tokens_or_more_the_same_bits_whatever_is_beside_them() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(130, 4096, generator=generator).bfloat16()
    for outputs in (64, 1024, 6144):
        weight = torch.randn(outputs, 4096, generator=generator).bfloat16()
        expected = torch.nn.functional.linear(inputs, weight)
        for count in (2, 3, 5, 8, 9, 16, 31, 64, 129):
            assert torch.equal(torch.nn.functional.linear(inputs[-count:], weight), expected[-count:])


def test_long_steps_are_computed_in_pieces_between_which_others_get_their_tokens(llama: Blocks) -> None:
    short, long = llama.open(), llama.open(room=400)
    short.step(llama.states(5, seed=1))
    prompt = long.submit(llama.states(201, seed=2))
    assert llama.turn() == [128]
    for _ in range(2):
        token = short.submit(llama.states(1, seed=3))
        assert sorted(llama.turn()) == [1, 32]
        assert token.done()
        assert not prompt.done()
    assert llama.turns() == [[9]]
    alone = llama.open(room=400)
    torch.testing.assert_close(output_of(prompt), alone.step(llama.states(201, seed=2)))


def test_each_step_is_answered_once_however_late_its_turns_are_sent(llama: Blocks) -> None:
    long, short = llama.open(), llama.open()
    prompt = long.submit(llama.states(150, seed=1))
    turns = []
    for _ in range(2):
        turn, batch = llama.pool.load_batch_to_runtime()
        turns.append((turn, llama.pool.process_func(*batch)))
        if len(turns) == 1:
            token = short.submit(llama.states(1, seed=2))
    llama.pool.send_outputs_from_runtime(*turns[0])
    assert not prompt.done()
    llama.pool.send_outputs_from_runtime(*turns[1])
    assert prompt.done()
    assert token.done()


def test_a_short_prompt_does_not_wait_for_a_long_one_that_came_before(llama: Blocks) -> None:
    long = llama.open(room=1000).submit(llama.states(900, seed=1))
    short = llama.open().submit(llama.states(100, seed=2))
    assert [llama.turn(), llama.turn()] == [[128], [100, 32]]
    assert short.done()
    assert not long.done()
    llama.turns()
    assert long.done()


def test_rows_of_a_session_count_as_tokens(llama: Blocks) -> None:
    rows = llama.open(rows=3).submit(llama.states(100, seed=1, rows=3))
    assert llama.turns() == [[32], [32], [32], [4]]
    assert output_of(rows).shape == (3, 100, llama.config.hidden_size)


def test_sessions_that_need_other_blocks_or_adapters_have_turns_of_their_own(llama: Blocks) -> None:
    futures = [
        session.submit(llama.states(1, seed=1))
        for session in (llama.open(), llama.open(adapter="a"), llama.open(blocks=2), llama.open())
    ]
    assert llama.turns() == [[1, 1], [1], [1]]
    assert all(future.done() for future in futures)


def test_a_turn_takes_no_more_sessions_than_allowed_and_the_others_are_next(llama: Blocks) -> None:
    from petals_chat.swarm.batching import MAX_SESSIONS

    futures = [llama.open(room=1).submit(llama.states(1, seed=1)) for _ in range(MAX_SESSIONS + 3)]
    assert [len(turn) for turn in llama.turns()] == [MAX_SESSIONS, 3]
    assert all(future.done() for future in futures)


def test_an_adapter_changes_its_sessions_only(tiny_model: Callable[[str], Path]) -> None:
    blocks = Blocks(tiny_model("qwen3"))
    layer = adapters.LoraLinear(blocks.backends["tiny.0"].block.mlp.up_proj)
    blocks.backends["tiny.0"].block.mlp.up_proj = layer
    hidden_size, width = blocks.config.hidden_size, blocks.config.intermediate_size
    layer.add("a", torch.ones(1, hidden_size), torch.ones(width, 1))
    base, adapted, again = (
        blocks.open(adapter=name).submit(blocks.states(1, seed=1)) for name in ("", "a", "")
    )
    blocks.turns()
    assert torch.equal(output_of(base), output_of(again))
    assert not torch.allclose(output_of(base), output_of(adapted))


def test_a_step_that_is_announced_late_but_came_earlier_is_taken_first(llama: Blocks) -> None:
    now = time.monotonic()
    later = llama.open(blocks=1).submit(llama.states(1, seed=1), came=now)
    earlier = llama.open(blocks=2).submit(llama.states(1, seed=1), came=now - 1)
    llama.turn()
    assert earlier.done()
    assert not later.done()
    llama.turn()
    assert later.done()


def test_a_session_that_ended_meanwhile_does_not_disturb_the_others(llama: Blocks) -> None:
    sessions = [llama.open() for _ in range(3)]
    futures = [session.submit(llama.states(1, seed=1)) for session in sessions]
    sessions[1].end()
    llama.turns()
    with pytest.raises(KeyError, match="has ended"):
        futures[1].result(timeout=0)
    assert torch.equal(output_of(futures[0]), output_of(futures[2]))


def test_a_session_that_ends_in_the_middle_of_a_long_step_is_given_up(llama: Blocks) -> None:
    session = llama.open(room=1000)
    future = session.submit(llama.states(1000, seed=1))
    llama.turn()
    session.end()
    llama.turn()
    assert isinstance(future.exception(timeout=0), KeyError)
    assert llama.pool.empty


def test_a_step_that_cannot_be_computed_fails_alone(llama: Blocks, caplog: pytest.LogCaptureFixture) -> None:
    sessions = [llama.open() for _ in range(3)]
    states = [llama.states(1, seed=1) for _ in sessions]
    states[1] = states[1][:, :, :7]
    futures = [session.submit(step) for session, step in zip(sessions, states, strict=True)]
    llama.turns()
    assert futures[1].exception(timeout=0) is not None
    assert torch.equal(output_of(futures[0]), output_of(futures[2]))
    assert [record.getMessage() for record in caplog.records] == ["a step of a session failed"]


def test_a_step_has_as_many_rows_as_its_session(llama: Blocks) -> None:
    """So the memory that a turn takes is bounded by that of the caches."""
    sessions = [llama.open(room=1) for _ in range(3)]
    futures = [
        session.submit(llama.states(1, seed=1, rows=rows))
        for session, rows in zip(sessions, (1, 500, 1), strict=True)
    ]
    llama.turns()
    with pytest.raises(ValueError, match="a step of 500 rows, in a session with room for 1"):
        futures[1].result(timeout=0)
    assert torch.equal(output_of(futures[0]), output_of(futures[2]))


@pytest.mark.parametrize("numbers", [[0, 2], [-1, 0], [0], [[0, 1]], [0.0, 1.0]])
def test_caches_are_not_reordered_by_numbers_that_are_no_rows(llama: Blocks, numbers: list[Any]) -> None:
    session, token = llama.open(rows=2), llama.states(1, seed=2, rows=2)
    session.step(llama.states(20, seed=1, rows=2))
    with pytest.raises(ValueError, match="hypo_ids must be 2 numbers of rows"):
        session.step(token, hypo_ids=torch.tensor(numbers))
    session.step(token, hypo_ids=torch.tensor([0, 1]))


def test_a_turn_waits_for_a_session_that_is_about_to_come(llama: Blocks) -> None:
    from petals_chat.swarm.batching import _Absence

    first, second = llama.open(), llama.open()
    now = time.monotonic()
    llama.pool._turn_seconds = FOREVER
    llama.pool._absences[int(second._handles[0][0])] = _Absence(since=now, last=FOREVER / 100)
    first.submit(llama.states(1, seed=1))
    arrival = threading.Timer(0.05, second.submit, [llama.states(1, seed=1)])
    arrival.start()
    assert llama.turn() == [1, 1]
    arrival.join()


def test_a_turn_does_not_wait_for_sessions_that_are_away_for_longer(llama: Blocks) -> None:
    from petals_chat.swarm.batching import _Absence

    now = time.monotonic()
    llama.pool._turn_seconds = FOREVER
    llama.pool._absences = {
        -1: _Absence(since=now, last=None),  # whose habits are not known
        -2: _Absence(since=now - 10, last=1.0),  # overdue
        -3: _Absence(since=now, last=FOREVER),  # far away
    }
    future = llama.open().submit(llama.states(1, seed=1))
    assert llama.turn() == [1]
    assert future.done()


def test_caches_are_reordered_before_a_step_that_asks_for_it(llama: Blocks) -> None:
    states = llama.states(20, seed=1, rows=2)
    session, swapped = llama.open(rows=2), llama.open(rows=2)
    session.step(states)
    swapped.step(states.flip(0))
    token = llama.states(1, seed=2, rows=2)
    output = session.step(token, hypo_ids=torch.tensor([1, 0]))
    torch.testing.assert_close(output, swapped.step(token))


def test_prompts_for_each_block_are_added(llama: Blocks) -> None:
    states = llama.states(50, seed=1)
    prompts = [llama.states(3, seed=2 + index) for index in range(len(llama.backends))]
    expected = states.clone()
    for backend, prompt in zip(llama.backends.values(), prompts, strict=True):
        expected[:, :3] += prompt
        (expected,) = backend.block(expected)
    output = llama.open().step(states.clone(), prompts=[*prompts])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_caches_are_written_in_place(llama: Blocks) -> None:
    session = llama.open(room=64)
    session.step(llama.states(5, seed=1))
    handle = session._handles[0][0]
    before = llama.memory._allocated_tensors[handle]
    storage, past = before.data_ptr(), before[:, :, :5].clone()
    session.step(llama.states(1, seed=1))
    after = llama.memory._allocated_tensors[handle]
    assert after.data_ptr() == storage
    assert torch.equal(after[:, :, :5], past)
    assert after[:, :, 5].any()
    assert not after[:, :, 6:].any()


def test_petals_uses_what_is_put_in_the_place_of_its_own() -> None:
    """Fails when Petals gets its pools, or decides which steps go through one, in another way."""
    from petals.server import block_functions, server

    from petals_chat.swarm.batching import install_batching

    install_batching()
    assert "merge_inference_pools_inplace(blocks)" in inspect.getsource(server.ModuleContainer.create)
    assert "memory_cache = MemoryCache(" in inspect.getsource(server.ModuleContainer.create)
    steps = inspect.getsource(block_functions.iterate_rpc_inference)
    assert "can_merge_pools = batch_size * length_increment <= merge_max_tokens" in steps
    for name in ("MAX_SHORT_INFERENCE_TOKENS", "MAX_NF4_SHORT_INFERENCE_TOKENS"):
        assert name in steps
        assert getattr(block_functions, name) == float("inf")


def test_an_answer_of_many_tokens_does_not_hold_up_those_of_one(llama: Blocks) -> None:
    messages: list[list[int]] = []

    def answer(outcomes: Iterable[tuple[tuple[int, int], Any]]) -> None:
        messages.append([outcome[0].shape[1] for _, outcome in outcomes])

    for length in (5, 1, 7, 1):
        llama.open().submit(llama.states(length, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama.pool.submitted_tasks, "answer", answer)
        llama.turns()
    assert messages == [[1, 1], [5], [7]]


def test_the_runtime_is_told_of_a_step_that_comes_while_it_takes_one(llama: Blocks) -> None:
    """What comes while a turn is chosen is in it, or there is a signal for the next one; never one for nothing."""
    sessions = [llama.open(room=2000) for _ in range(4)]

    def submit(session: Session) -> None:
        for number in range(100):
            session.submit(llama.states(1, seed=number)).result(timeout=60)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=submit, args=(session,)) for session in sessions]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if not llama.pool.empty:
                llama.turn()
    finally:
        sys.setswitchinterval(interval)
    assert llama.pool.empty


def test_hivemind_loads_computes_and_sends_turns_one_after_the_other(llama: Blocks) -> None:
    """The real runtime, with steps that come while it computes."""
    from petals.server.server import RuntimeWithDeduplicatedPools

    runtime = RuntimeWithDeduplicatedPools(llama.backends, prefetch_batches=0, device=None)
    runtime.daemon = True
    runtime.start()
    try:
        sessions = [llama.open() for _ in range(6)]
        for number in range(8):
            tokens = 40 if number == 0 else 1
            futures = [session.submit(llama.states(tokens, seed=number)) for session in sessions]
            results = [future.result(timeout=60)[0] for future in futures]
            for result in results[1:]:
                torch.testing.assert_close(result, results[0])
    finally:
        runtime.shutdown()
        runtime.join(10)
    assert not runtime.is_alive()


def play_handler(blocks: Blocks, sessions: list[Session], report: Connection) -> None:
    """What Petals does in the process of a handler, for one token of each session and a step that is too long."""

    async def run() -> None:
        states = blocks.states(1, seed=1)
        outputs = await asyncio.gather(
            *(blocks.pool.submit_task(*each.arguments(states)) for each in sessions)
        )
        with pytest.raises(ValueError, match="a step of 4097 tokens is too large, at most 4096 are allowed"):
            blocks.pool.submit_task(*sessions[0].arguments(blocks.states(4097, seed=1)))
        report.send([output for (output,) in outputs])

    asyncio.run(run())


def test_steps_of_another_process_are_computed_and_answered_there(tiny_model: Callable[[str], Path]) -> None:
    from petals.server.server import RuntimeWithDeduplicatedPools

    blocks = Blocks(tiny_model("llama"))
    del blocks.pool.submitted_tasks.answer  # the real one
    sessions = [blocks.open() for _ in range(3)]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    gc.freeze()  # what is alive now may belong to threads that are not in the fork
    handler = multiprocessing.get_context("fork").Process(
        target=play_handler, args=(blocks, sessions, sender)
    )
    handler.start()
    runtime = RuntimeWithDeduplicatedPools(blocks.backends, prefetch_batches=0, device=None)
    runtime.daemon = True
    runtime.start()
    try:
        assert receiver.poll(60)
        outputs = receiver.recv()
    finally:
        handler.join(60)
        runtime.shutdown()
        runtime.join(10)
    assert not blocks.pool.is_alive()
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_wide_layers_are_served_in_bfloat16_with_the_same_bits(tmp_path: Path) -> None:
    """Layers so wide that one token alone may get other bits than two."""
    directory = write_tiny_model(tmp_path, "llama", num_layers=1, hidden_size=512, intermediate_size=4096)
    blocks = Blocks(directory, torch.bfloat16)
    tokens = [blocks.states(1, seed) for seed in range(60)]
    alone = [blocks.open(room=1).step(token) for token in tokens]
    futures = [blocks.open(room=1).submit(token) for token in tokens]
    blocks.turns()
    assert all(torch.equal(output_of(future), one) for future, one in zip(futures, alone, strict=True))
