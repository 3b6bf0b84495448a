"""Who holds which blocks, and answers: read from the swarm's DHT, and asked of the servers themselves.

Petals' own list of servers is for choosing a route: it leaves out who is not online yet or was lost in a request,
and keeps who is gone until the DHT has forgotten it. This one is for people and for the model's state. Nothing
waits for it: it is as old as its last round, and who wants it newer says so (`SwarmMonitor.look_again`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from petals_chat.protocol.messages import Reachability, SwarmPeer, SwarmStatus
from petals_chat.swarm import compat

compat.install()

from hivemind import DHT
from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils import MSGPackSerializer
from petals.data_structures import RemoteSpanInfo, ServerInfo, ServerState
from petals.server.handler import CACHE_TOKENS_AVAILABLE, TransformerConnectionHandler
from petals.utils.dht import compute_spans, get_remote_module_infos

logger = logging.getLogger(__name__)

MAX_SERVERS = 512
"""Rows of a status."""
MAX_ASKED = 256
"""Peers that are asked in a round; of a larger swarm others have their turn in the next one."""
MAX_TEXT_CHARS = 100
"""Of what strangers write into the DHT."""
MAX_ADAPTERS = 16
MAX_INITIAL_PEERS = 32
ASKED_AT_ONCE = 32
ANSWER_TIMEOUT_SECONDS = 5.0
FAILURES_UNTIL_OFFLINE = 2
"""One answer may come late because a machine is busy."""
REMEMBERED_PINGS = 5
RETRY_SECONDS = 2.0
"""Time between rounds while something is wrong."""
ASKED_PER_SECOND = 16
"""Then too, no more, so that a large swarm is left in peace."""
SHORTEST_PAUSE_SECONDS = 0.5
MAX_AGE_SECONDS = 120.0
"""An announcement in the DHT is valid for half this time, by Petals' defaults; what is older says nothing any more.
(Or three periods, if that is longer.)"""
SMALLEST_ROOM_TOKENS = 64
"""A server with less room takes no context but very short ones: it counts as full."""


@dataclasses.dataclass
class _Contact:
    """What is known of a peer from asking it."""

    asked_at: float = -math.inf
    pings: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=REMEMBERED_PINGS))
    failures: int = 0
    """In a row."""
    block_tokens: int | None = None
    """Room of its attention caches, in tokens of one block."""

    @property
    def answers(self) -> bool:
        """Whether it does, or has not been asked yet."""
        return self.failures < FAILURES_UNTIL_OFFLINE

    @property
    def ping_seconds(self) -> float | None:
        """The shortest of the last pings: what is longer was spent in connecting or queueing."""
        return min(self.pings) if self.pings and not self.failures else None


class SwarmMonitor:
    """Watches the servers of one model's blocks. Lives in hivemind's event loop.

    Args:
        dht: the swarm.
        p2p: for asking its members.
        dht_prefix: name of the model's blocks.
        num_blocks: how many it has.
        initial_peers: multiaddresses, whose answers are noted too.
        active_adapter: only servers with this adapter count; None = all.
        period: seconds between two rounds while all is well.
    """

    def __init__(
        self,
        dht: DHT,
        p2p: P2P,
        *,
        dht_prefix: str,
        num_blocks: int,
        initial_peers: Sequence[str] = (),
        active_adapter: str | None = None,
        period: float = 15.0,
    ) -> None:
        self._dht = dht
        self._p2p = p2p
        self._uids = [f"{dht_prefix}.{block}" for block in range(num_blocks)]
        ids = dict.fromkeys(address.rpartition("/p2p/")[2] for address in initial_peers)
        self._initial_peers = [PeerID.from_base58(peer_id) for peer_id in ids][:MAX_INITIAL_PEERS]
        self._active_adapter = active_adapter
        self._period = period
        self._contacts: dict[PeerID, _Contact] = {}
        self._slots = asyncio.Semaphore(ASKED_AT_ONCE)
        self._is_wanted = asyncio.Event()
        # Of its own: who looks for servers must not queue behind a DHT that does not answer.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="swarm-monitor")
        self._status = self._describe({}, time.time())

    @property
    def status(self) -> SwarmStatus:
        """What the last round saw. Never waits."""
        seen_at = self._status.seen_at
        is_valid = time.time() - seen_at <= max(MAX_AGE_SECONDS, 3 * self._period)
        return self._status if is_valid else self._describe({}, seen_at)

    def look_again(self) -> None:
        """Begin the next round soon, because something seems to have changed."""
        self._is_wanted.set()

    async def run(self) -> NoReturn:
        """Look again and again."""
        while True:
            try:
                await self.look()
            except Exception as error:  # whatever strangers announce: the next round may be better
                logger.warning("the swarm could not be looked at: %r", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._is_wanted.wait()
                await asyncio.sleep(SHORTEST_PAUSE_SECONDS)
            self._is_wanted.clear()

    async def read(self) -> None:
        """A quick first look: read the DHT, and believe it. If it cannot be read, nothing is known yet."""
        with contextlib.suppress(Exception):
            self._status = self._describe(await self._read_dht(), time.time())

    async def look(self) -> None:
        """One round: read the DHT, ask the servers.

        Raises:
            Exception: hivemind's own, if the DHT cannot be read.
        """
        spans = await self._read_dht()
        servers = [peer_id for peer_id, span in spans.items() if span.state is not ServerState.OFFLINE]
        present = {*servers, *self._initial_peers}
        self._contacts = {peer_id: self._contacts.get(peer_id, _Contact()) for peer_id in present}
        longest_ago = sorted(present, key=lambda peer_id: self._contacts[peer_id].asked_at)
        await asyncio.gather(*map(self._ask, longest_ago[:MAX_ASKED]))
        self._status = self._describe(spans, time.time())

    async def look_closely(self) -> None:
        """Two rounds: the first also connects, so that the second's pings are right. Raises like `look`."""
        await self.look()
        await self.look()

    async def check_reachability(self, peer_id: str) -> Reachability:
        """Ask any member of the swarm; it need not be a server of the model.

        Args:
            peer_id: a valid one, see `petals_chat.swarm.naming.is_peer_id`.
        """
        try:
            seconds, _ = await self._call(PeerID.from_base58(peer_id))
        except Exception as error:  # the connection's edge
            return Reachability(False, _why_unreachable(error))
        return Reachability(True, f"it answered within {math.ceil(1000 * seconds)} ms")

    def close(self) -> None:
        """Let the thread go; it may still wait for the DHT."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _pause(self) -> float:
        """Seconds until the next round."""
        # Somebody has not answered, but may only be busy.
        is_doubtful = any(
            0 < contact.failures < FAILURES_UNTIL_OFFLINE for contact in self._contacts.values()
        )
        if not (is_doubtful or self._status.missing_blocks or self._status.full_blocks):
            return self._period
        return min(max(RETRY_SECONDS, len(self._contacts) / ASKED_PER_SECOND), self._period)

    async def _read_dht(self) -> Mapping[PeerID, RemoteSpanInfo]:
        fetch = functools.partial(
            get_remote_module_infos, self._dht, self._uids, active_adapter=self._active_adapter, latest=True
        )
        infos = await asyncio.get_running_loop().run_in_executor(self._thread, fetch)
        spans = compute_spans(infos, min_state=ServerState.OFFLINE)
        return {peer_id: span for peer_id, span in spans.items() if span.start < span.end}

    async def _ask(self, peer_id: PeerID) -> None:
        contact = self._contacts[peer_id]
        async with self._slots:
            contact.asked_at = time.monotonic()
            try:
                seconds, contact.block_tokens = await self._call(peer_id)
            except Exception:  # the connection's edge
                contact.failures += 1
                contact.block_tokens = None
            else:
                contact.failures = 0
                contact.pings.append(seconds)

    async def _call(self, peer_id: PeerID) -> tuple[float, int | None]:
        """Seconds until the answer, and the room of the server's caches in tokens of one block, if it says so."""
        stub = TransformerConnectionHandler.get_stub(self._p2p, peer_id)
        began = time.perf_counter()
        info: dict[str, Any] = {}
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                answer = await stub.rpc_info(runtime_pb2.ExpertUID())
            info = MSGPackSerializer.loads(answer.serialized_info)
        except Exception as error:
            # Of a member that serves no blocks, or none yet, libp2p says "protocols not supported: [...]".
            if "not supported" not in str(error):
                raise
        room = info.get(CACHE_TOKENS_AVAILABLE) if isinstance(info, dict) else None
        is_sensible = isinstance(room, int) and room >= 0
        return time.perf_counter() - began, room if is_sensible else None

    def _describe(self, spans: Mapping[PeerID, RemoteSpanInfo], seen_at: float) -> SwarmStatus:
        servers = [_server(span, self._contact(peer_id)) for peer_id, span in spans.items()]
        servers.sort(key=lambda server: (server.state != "online", server.start, server.end, server.peer_id))
        online = [server for server in servers if server.state == "online"]
        held = _count_blocks(online)
        with_room = _count_blocks([server for server in online if _has_room(server)])
        blocks = range(len(self._uids))
        shown = sorted(servers[:MAX_SERVERS], key=lambda server: (server.start, server.end, server.peer_id))
        return SwarmStatus(
            servers=tuple(shown),
            block_servers=tuple(held[block] for block in blocks),
            full_blocks=tuple(block for block in blocks if held[block] and not with_room[block]),
            initial_peers={
                peer_id.to_base58(): self._contact(peer_id).answers for peer_id in self._initial_peers
            },
            seen_at=seen_at,
        )

    def _contact(self, peer_id: PeerID) -> _Contact:
        return self._contacts.get(peer_id, _Contact())


def _why_unreachable(error: Exception) -> str:
    """libp2p's words, in ours where it is an ordinary case."""
    text = " ".join(str(error).split())
    if isinstance(error, TimeoutError):
        return f"it did not answer within {ANSWER_TIMEOUT_SECONDS:g} s. A firewall may be in the way"
    if "routing: not found" in text:
        return "no member of the swarm knows an address of it"
    if "dial to self" in text:
        return "this is the server's own peer id"
    if "connection refused" in text or "dial backoff" in text:
        return "no connection to it can be made: its address is known, but nobody listens there"
    return f"no connection to it can be made: {text[:MAX_TEXT_CHARS] or type(error).__name__}"


def _server(span: RemoteSpanInfo, contact: _Contact) -> SwarmPeer:
    info: ServerInfo = span.server_info
    state = ServerState(info.state)
    if not contact.answers:
        state = ServerState.OFFLINE
    is_measured = any((info.inference_rps, info.forward_rps, info.network_rps))
    return SwarmPeer(
        peer_id=span.peer_id.to_base58(),
        start=span.start,
        end=span.end,
        state=state.name.lower(),
        # Without measurements it is a number that somebody made up.
        throughput=info.throughput if is_measured else None,
        inference_rps=info.inference_rps,
        forward_rps=info.forward_rps,
        network_rps=info.network_rps,
        public_name=_short(info.public_name),
        version=_short(info.version),
        cache_tokens_left=_cache_tokens_left(span, contact) if state is ServerState.ONLINE else None,
        torch_dtype=_short(info.torch_dtype),
        quant_type=_short(info.quant_type),
        adapters=tuple(str(name)[:MAX_TEXT_CHARS] for name in itertools.islice(info.adapters, MAX_ADAPTERS)),
        using_relay=info.using_relay,
        ping_seconds=contact.ping_seconds,
    )


def _cache_tokens_left(span: RemoteSpanInfo, contact: _Contact) -> int | None:
    """Tokens of a session through all blocks of the server; its own answer is newer than its announcement."""
    announced: int | None = span.server_info.cache_tokens_left
    num_blocks: int = span.length
    if contact.block_tokens is not None:
        return contact.block_tokens // num_blocks
    # Announced are keys and values of each block separately.
    return None if announced is None else announced // (2 * num_blocks)


def _has_room(server: SwarmPeer) -> bool:
    return server.cache_tokens_left is None or server.cache_tokens_left >= SMALLEST_ROOM_TOKENS


def _count_blocks(servers: Sequence[SwarmPeer]) -> Counter[int]:
    """How many of the servers hold each block."""
    return Counter(block for server in servers for block in range(server.start, server.end))


def _short(text: str | None) -> str | None:
    return None if text is None else text[:MAX_TEXT_CHARS]
