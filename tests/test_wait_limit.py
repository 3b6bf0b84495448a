import asyncio

import pytest

from petals_chat.wait_limit import WaitLimit

SHORT, LONG = 0.05, 60.0


async def test_a_wait_that_lasts_too_long_is_ended() -> None:
    limit = WaitLimit(SHORT)
    with pytest.raises(TimeoutError), limit:
        await asyncio.Event().wait()
    with pytest.raises(TimeoutError), limit:
        await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_many_short_waits_may_last_longer_together() -> None:
    limit = WaitLimit(SHORT)
    loop = asyncio.get_running_loop()
    began = loop.time()
    while loop.time() < began + 4 * SHORT:
        with limit:
            await asyncio.sleep(0)


async def test_a_wait_after_the_timer_was_due_is_limited_too() -> None:
    limit = WaitLimit(SHORT)
    with limit:
        await asyncio.sleep(0)
    await asyncio.sleep(2 * SHORT)
    with pytest.raises(TimeoutError), limit:
        await asyncio.Event().wait()


async def test_the_error_can_be_chosen() -> None:
    with pytest.raises(ValueError, match="too slow"), WaitLimit(SHORT, lambda: ValueError("too slow")):
        await asyncio.Event().wait()


async def test_a_cancellation_from_elsewhere_stays_one() -> None:
    limit = WaitLimit(LONG)
    is_waiting = asyncio.Event()

    async def wait() -> None:
        with limit:
            is_waiting.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await is_waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with limit:  # it can be used again
        await asyncio.sleep(0)
    limit.close()


async def test_an_error_of_what_is_waited_for_passes_through() -> None:
    limit = WaitLimit(LONG)
    with pytest.raises(OSError, match="its own"), limit:
        raise OSError("its own")
    limit.close()


async def test_one_limit_within_another() -> None:
    outer, inner = WaitLimit(LONG), WaitLimit(SHORT)
    with pytest.raises(TimeoutError), outer, inner:
        await asyncio.Event().wait()
    outer.close()


async def test_after_its_end_it_limits_nothing() -> None:
    limit = WaitLimit(LONG)
    limit.close()
    limit.close()
    with pytest.raises(AssertionError, match="no more waits"), limit:
        pass
