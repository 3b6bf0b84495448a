"""A time-out for many short waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType


class WaitLimit:
    """Ends waits that last longer than ``seconds``; for one wait after the other, in any tasks of one event loop.

        with limit:
            await something()

    ``asyncio.timeout`` sets a timer for each wait and takes it back, which is more work than a short wait itself. Here
    a timer goes on from one wait to the next; when it is due, it looks how long the present one has lasted.

    Args:
        error: makes what is raised from the ``with`` statement, in place of the cancellation of what it waited for.
    """

    def __init__(self, seconds: float, error: Callable[[], Exception] = TimeoutError) -> None:
        self._seconds = seconds
        self._error = error
        self._waiting: asyncio.Task[object] | None = None
        self._cancellations = 0
        """How often the task had been cancelled when it began to wait."""
        self._until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False
        self._is_closed = False

    def __enter__(self) -> None:
        assert not self._is_closed, "there are no more waits"
        assert self._waiting is None, "one wait after the other"
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._waiting, self._cancellations = task, task.cancelling()
        self._until = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(self._until, self._look)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        task, self._waiting = self._waiting, None
        if self._is_over and task is not None:
            self._is_over = False
            if task.uncancel() <= self._cancellations and kind is asyncio.CancelledError:
                raise self._error() from error

    def close(self) -> None:
        """Give the timer up; there are no more waits. Closing twice is no error."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._waiting is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._until:
            self._timer = loop.call_at(self._until, self._look)
        else:
            self._is_over = True
            self._waiting.cancel()
