"""The limits in time of what a request does: a deadline, and the presence of the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.types import Receive

from petals_chat.errors import DeadlineExceededError

Result = TypeVar("Result")


class ClientDisconnectedError(Exception):
    """The client went away; there is nobody to answer."""


@asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """End what runs inside after ``seconds``.

    Raises:
        DeadlineExceededError: it took longer. A TimeoutError of its own passes through as such.
    """
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError:
        if scope.expired():
            raise DeadlineExceededError(seconds) from None
        raise


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled if the HTTP client goes away before it is done.

    Args:
        receive: the request's; its body must have been read.
        work: owned from here on; it has ended, in any case, when this returns or raises.

    Raises:
        ClientDisconnectedError: the client went away first.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
    if working.cancelled():
        raise ClientDisconnectedError
    return working.result()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
