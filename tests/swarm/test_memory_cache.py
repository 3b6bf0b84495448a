"""What handlers allocate and free is taken in at once, also while nobody wants a step."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from petals_chat.swarm.memory_cache import AttentionCaches

pytestmark = pytest.mark.usefixtures("petals")

TIMEOUT_SECONDS = 60
BLOCKS = 40
SESSIONS = 300


@pytest.fixture
def caches() -> Iterator[AttentionCaches]:
    from petals_chat.swarm.memory_cache import AttentionCaches

    caches = AttentionCaches(1 << 40)
    caches.start_reading()
    yield caches
    caches.stop_reading()


def in_handler(work: Callable[[], None]) -> None:
    """Do the work in a process, as Petals' handlers are, and wait for its end."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    try:
        process.join(TIMEOUT_SECONDS)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_many_sessions_can_end_though_no_step_follows(caches: AttentionCaches) -> None:
    from hivemind.utils.tensor_descr import TensorDescriptor

    def work() -> None:
        async def open_and_close() -> None:
            descriptors = [TensorDescriptor((1, 1, 8, 8), dtype=torch.float32, device=torch.device("cpu"))]
            async with contextlib.AsyncExitStack() as sessions:
                for _ in range(SESSIONS):
                    session = caches.allocate_cache(*descriptors * 2 * BLOCKS, timeout=0.0)
                    await sessions.enter_async_context(session)

        asyncio.run(open_and_close())

    in_handler(work)
    wait_for(lambda: not caches._allocated_tensors)
    assert caches.current_size_bytes == 0


def test_a_session_for_which_there_is_no_memory_does_not_disturb_the_next(
    caches: AttentionCaches, caplog: pytest.LogCaptureFixture
) -> None:
    from hivemind.utils.tensor_descr import TensorDescriptor

    impossible = TensorDescriptor((1 << 50,), dtype=torch.float32, device=torch.device("cpu"))
    caches._pipe_send.send(((0,), [impossible]))
    wait_for(lambda: bool(caplog.records))
    caches._pipe_send.send(((1,), [TensorDescriptor((8,), dtype=torch.float32, device=torch.device("cpu"))]))
    wait_for(lambda: 1 in caches._allocated_tensors)
    with pytest.raises(KeyError), caches.use_cache(0):
        pass
    with caches.use_cache(1) as (tensor,):
        assert torch.equal(tensor, torch.zeros(8))
