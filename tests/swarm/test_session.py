"""What servers' errors mean for a session, as Petals' own caches word them; and how it goes on without a server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
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


class Chain:
    """The routing of a swarm in which one server at a time holds all blocks."""

    num_blocks = 2
    max_attempts = 3
    connect_timeout = request_timeout = 1.0
    p2p: Any = None
    serving = "first"

    async def find_servers(self, start: int, end: int, cache_tokens: int) -> list[Any]:
        return [SimpleNamespace(peer_id=self.serving, start=start, end=end)]

    async def tensor_schema(self, span: Any) -> Any:
        return [SimpleNamespace(dtype=torch.float32, compression=0)]

    def uids(self, span: Any) -> str:
        return "blocks"

    def retry_delay(self, attempt: int) -> float:
        return 0.0


class Place:
    """The right to send a prompt."""

    def __init__(self) -> None:
        self.is_held = False

    async def take(self) -> None:
        assert not self.is_held
        self.is_held = True

    def give_back(self) -> None:
        assert self.is_held
        self.is_held = False


async def test_the_past_of_a_lost_server_is_sent_as_a_prompt_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, with those of other sessions: all lose the server at the same time."""
    from petals_chat.swarm import session as module

    routing, place = Chain(), Place()
    sent: list[tuple[str, int, bool]] = []

    async def step(self: Any, inputs: torch.Tensor, step_id: str, followers: object) -> torch.Tensor:
        if self.span.peer_id != routing.serving:
            raise ConnectionError
        sent.append((self.span.peer_id, inputs.shape[1], place.is_held))
        self.past_inputs.append(inputs)
        return inputs

    monkeypatch.setattr(module._ServerSession, "step", step)
    monkeypatch.setattr(module, "REPLAY_TOKENS", 4)
    session = module.SwarmSession(routing, 100)  # type: ignore[arg-type]
    await place.take()
    await session.step(torch.zeros(1, 5, 8), place)
    place.give_back()
    await session.step(torch.zeros(1, 1, 8), place)
    routing.serving = "second"
    await session.step(torch.zeros(1, 1, 8), place)
    assert sent == [
        ("first", 5, True),
        ("first", 1, False),
        ("second", 4, True),
        ("second", 2, True),
        ("second", 1, False),
    ]
    assert not place.is_held
    await place.take()
    routing.serving = "third"
    await session.step(torch.zeros(1, 2, 8), place)
    assert {is_held for server, _, is_held in sent if server == "third"} == {True}
    assert place.is_held
    await session.close()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"\x00" + (1 << 60).to_bytes(8, "big") + b"endless", "at most 100 make sense"),
        (b"\x01" + (1 << 60).to_bytes(8, "big") + b"endless", "at most 100 make sense"),
        (b"\x07" + (2).to_bytes(8, "big") + b"??", "no message"),
    ],
)
async def test_what_is_no_answer_is_not_read(message: bytes, reason: str) -> None:
    from hivemind.p2p import P2P

    from petals_chat.swarm.session import _Stream

    assert (P2P.HEADER_LEN, P2P.BYTEORDER, P2P.MESSAGE_MARKER, P2P.ERROR_MARKER) == (
        8,
        "big",
        b"\x00",
        b"\x01",
    )
    reader = asyncio.StreamReader()
    reader.feed_data(message)
    async with asyncio.timeout(20):
        with pytest.raises(ValueError, match=reason):
            await _Stream(reader, None).receive(100)  # type: ignore[arg-type]
