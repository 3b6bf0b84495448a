"""Idle contexts whose next request may come without their session: a chat over stateless requests.

Such a request repeats the whole text of those before it. If its tokens extend those of an idle context of the
same owner, it goes on from there, and only what is new is processed.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from petals_chat.engine.contexts import Context

MAX_CONTEXTS = 256
MAX_CONTEXTS_OF_OWNER = 8


@dataclasses.dataclass(frozen=True, eq=False)
class _Parked:
    context: Context
    since: float


class PrefixStore:
    """The parked contexts of one worker; the longest parked ones go first when there are too many.

    Args:
        idle_timeout: seconds after which a context is forgotten; 0 = at once.
    """

    def __init__(self, *, idle_timeout: float) -> None:
        self._idle_timeout = idle_timeout
        self._parked: list[_Parked] = []

    def __len__(self) -> int:
        return len(self._parked)

    async def park(self, context: Context) -> None:
        """Keep a context that nobody uses for a request that extends it."""
        if not self._idle_timeout:
            await context.drop_caches()
            return
        now = asyncio.get_running_loop().time()
        self._parked.append(_Parked(context, now))
        of_owner = [parked for parked in self._parked if parked.context.owner == context.owner]
        excess = [
            *(parked for parked in self._parked if now - parked.since > self._idle_timeout),
            *of_owner[: max(0, len(of_owner) - MAX_CONTEXTS_OF_OWNER)],
            *self._parked[: max(0, len(self._parked) - MAX_CONTEXTS)],
        ]
        self._parked = [parked for parked in self._parked if parked not in excess]
        for parked in excess:
            await parked.context.drop_caches()

    def take(self, owner: str, tokens: Sequence[int], max_length: int) -> Context | None:
        """The owner's context whose caches hold the longest prefix of ``tokens``; None if there is none.

        At least one token is left to process, because its hidden state is what the next token is chosen from.
        """
        best: _Parked | None = None
        for parked in self._parked:
            context, length = parked.context, parked.context.cached_tokens
            if context.owner != owner or not 0 < length < len(tokens):
                continue
            if (best is None or length > best.context.cached_tokens) and context.tokens[:length] == list(
                tokens[:length]
            ):
                best = parked
        if best is None:
            return None
        self._parked.remove(best)
        best.context.max_length = max_length
        best.context.truncate(best.context.cached_tokens)
        return best.context

    async def clear(self) -> None:
        """Forget all."""
        parked, self._parked = self._parked, []
        for each in parked:
            await each.context.drop_caches()
