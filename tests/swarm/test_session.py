"""What servers' errors mean for a session; they come as Petals' own caches word them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from petals_chat.errors import AttentionCacheFullError, MaximumLengthExceededError

pytestmark = pytest.mark.usefixtures("petals")

CACHE_TOKENS = 100
TOKEN_BYTES = 8
PATIENCE_SECONDS = 0.05


@pytest.fixture
def cache(petals: None) -> Any:
    """A server's room for so many tokens, as a handler sees it, which is in another process than the caches."""
    from petals.server.memory_cache import MemoryCache

    cache = MemoryCache(CACHE_TOKENS * TOKEN_BYTES, max_alloc_timeout=60)
    cache.runtime_pid = -1
    return cache


def caches_of(tokens: int) -> Any:
    from hivemind.utils import TensorDescriptor

    return TensorDescriptor((tokens, TOKEN_BYTES // 4), dtype=torch.float32, device=torch.device("cpu"))


async def refusal_of(cache: Any, tokens: int, patience: float) -> Exception | None:
    from hivemind.p2p import P2PHandlerError
    from petals.server.memory_cache import AllocationFailed

    from petals_chat.swarm.session import refusal_in

    with pytest.raises(AllocationFailed) as raised:
        async with cache.allocate_cache(caches_of(tokens), timeout=patience):
            pass
    return refusal_in(P2PHandlerError(str(raised.value)), tokens)


async def test_a_full_server_is_full_whether_it_waited_or_not(cache: Any) -> None:
    async with cache.allocate_cache(caches_of(60), timeout=0):
        for patience in (0, PATIENCE_SECONDS):
            assert isinstance(await refusal_of(cache, 50, patience), AttentionCacheFullError)


async def test_what_is_larger_than_a_server_is_too_long(cache: Any) -> None:
    async with cache.allocate_cache(caches_of(60), timeout=0):
        refusal = await refusal_of(cache, CACHE_TOKENS + 50, PATIENCE_SECONDS)
    assert isinstance(refusal, MaximumLengthExceededError)
    assert refusal.limit == CACHE_TOKENS


@pytest.mark.parametrize("wanted", [0, 5])
async def test_a_server_that_has_room_and_gives_none_is_full(wanted: int) -> None:
    from hivemind.p2p import P2PHandlerError

    from petals_chat.swarm.session import refusal_in

    error = P2PHandlerError(f"Could not allocate {wanted} bytes, max cache size = 5 bytes")
    assert isinstance(refusal_in(error, 10), AttentionCacheFullError)


async def test_other_errors_are_no_refusal() -> None:
    from hivemind.p2p import P2PHandlerError

    from petals_chat.swarm.session import refusal_in

    for error in (P2PHandlerError("a block failed"), ValueError("Could not allocate 2 bytes")):
        assert refusal_in(error, 10) is None
