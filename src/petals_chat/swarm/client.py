"""The swarm as the engine sees it: sessions that turn hidden states into hidden states, and a list of servers.

Membership in the swarm and the choice of servers are Petals' own (`RemoteSequenceManager`); this module starts
and stops them, and bridges their blocking calls to asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal, NoReturn, TypeVar

import torch

from petals_chat.errors import SwarmUnreachableError
from petals_chat.protocol.messages import Reachability, SwarmStatus
from petals_chat.swarm import compat

compat.install()

from hivemind.dht.node import DHTNode
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils import MSGPackSerializer
from hivemind.utils.multiaddr import Multiaddr
from petals.client.config import ClientConfig
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.constants import PUBLIC_INITIAL_PEERS
from petals.data_structures import CHAIN_DELIMITER, RemoteSpanInfo
from petals.server.handler import TransformerConnectionHandler

from petals_chat.swarm.monitor import SwarmMonitor
from petals_chat.swarm.session import SwarmSession
from petals_chat.swarm.tied import TiedDHT

Result = TypeVar("Result")

REJOIN_PERIOD_SECONDS = 2.0
WIRE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""In which servers take hidden states."""


@dataclasses.dataclass(frozen=True)
class SwarmOptions:
    """Which swarm, which blocks in it, and how patient to be; times in seconds."""

    initial_peers: Literal["public"] | tuple[str, ...]
    dht_prefix: str
    num_blocks: int
    active_adapter: str | None
    max_retries: int
    request_timeout: float
    connect_timeout: float
    update_period: float


class SwarmClient:
    """A member of the swarm that serves no blocks. Forks a process: create it before threads are started.

    Raises:
        SwarmUnreachableError: none of the initial peers answered.
    """

    def __init__(self, options: SwarmOptions) -> None:
        # For p2pd, hivemind's daemon, which is written in Go: with more threads, those that are woken for each message,
        # and then look for more to do, take a third of its time.
        os.environ["GOMAXPROCS"] = "1"
        public = options.initial_peers == "public"
        peers = tuple(PUBLIC_INITIAL_PEERS) if public else tuple(options.initial_peers)
        try:
            self._dht = TiedDHT(
                own_group=False,
                initial_peers=peers,
                client_mode=True,
                num_workers=min(32, options.num_blocks),
                start=True,
                use_auto_relay=public,
                use_relay=public,
                auto_nat=public,
                nat_port_map=public,
            )
        except Exception as error:
            raise SwarmUnreachableError(
                f"no initial peer of the swarm answers: {', '.join(peers)}"
            ) from error
        self._manager = RemoteSequenceManager(
            ClientConfig(
                initial_peers=peers,
                dht_prefix=options.dht_prefix,
                active_adapter=options.active_adapter,
                max_retries=options.max_retries,
                request_timeout=options.request_timeout,
                connect_timeout=options.connect_timeout,
                update_period=options.update_period,
                show_route=False,
            ),
            tuple(f"{options.dht_prefix}.{block}" for block in range(options.num_blocks)),
            dht=self._dht,
        )
        self._monitor = SwarmMonitor(
            self._dht,
            self._manager.state.p2p,
            dht_prefix=options.dht_prefix,
            num_blocks=options.num_blocks,
            initial_peers=peers,
            active_adapter=options.active_adapter,
            period=options.update_period,
        )
        self._routing = SwarmRouting(self._manager, on_failure=self._monitor.look_again)
        self._initial_peers = peers

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run ``work`` in hivemind's event loop, where the swarm's sessions live; blocks until it is done."""
        result: Result = RemoteExpertWorker.run_coroutine(work)
        return result

    async def refresh(self) -> None:
        """Fetch the list of servers for the first time; later it is refreshed in the background."""
        await asyncio.gather(self._routing.refresh(), self._monitor.read())

    async def watch(self) -> NoReturn:
        """Keep `status` up to date."""
        await self._monitor.run()

    async def stay_joined(self) -> NoReturn:
        """Look for the initial peers again while blocks are missing.

        hivemind forgets peers that do not answer. When all were away for a while, a client knows nobody whom it
        could ask, and would not notice that they are back.
        """
        while True:
            await asyncio.sleep(REJOIN_PERIOD_SECONDS)
            if self._routing.misses_blocks():
                rejoin = functools.partial(_greet_peers, addresses=self._initial_peers)
                if await asyncio.to_thread(self._dht.run_coroutine, rejoin):
                    self._manager.update(wait=False)

    def open_session(self, max_length: int, patience: float) -> SwarmSession:
        """A session with room for ``max_length`` tokens; servers are chosen and memory taken at its first step.

        Args:
            patience: seconds that servers may wait for room; see `SwarmSession`.
        """
        return SwarmSession(self._routing, max_length, patience)

    @property
    def is_connected(self) -> bool:
        """Whether the process that talks to the swarm lives; it ends with its p2pd. Without it nothing can be done."""
        return bool(self._dht.is_alive())

    @property
    def status(self) -> SwarmStatus:
        """The servers of the model's blocks, as they were seen last. Never waits."""
        return self._monitor.status

    async def check_reachability(self, peer_id: str) -> Reachability:
        """See `SwarmMonitor.check_reachability`."""
        return await self._monitor.check_reachability(peer_id)

    def close(self) -> None:
        """Leave the swarm; every session must be closed before. The order keeps hivemind's destructors quiet."""
        self._monitor.close()
        self._manager.shutdown()
        RemoteExpertWorker.run_coroutine(self._manager.state.p2p.shutdown())
        self._dht.shutdown()
        self._dht.join(5)


class SwarmRouting:
    """Petals' `RemoteSequenceManager` for asyncio: what may block there runs in a thread here.

    Args:
        on_failure: called when a server failed.
    """

    def __init__(self, manager: RemoteSequenceManager, on_failure: Callable[[], None]) -> None:
        self._manager = manager
        self._on_failure = on_failure
        self.num_blocks = len(manager)
        self.max_attempts: int = manager.config.max_retries
        self.connect_timeout: float = manager.config.connect_timeout
        self.request_timeout: float = manager.config.request_timeout
        self.p2p = manager.state.p2p
        self._tensor_schema: Any = None

    async def refresh(self) -> None:
        """Wait until the list of servers has been fetched."""

        def first_refresh() -> None:
            with self._manager._thread_start_lock:  # as its own methods start the thread
                if not self._manager.is_alive():
                    self._manager._thread.start()
            self._manager.ready.wait()

        await asyncio.to_thread(first_refresh)

    async def find_servers(self, start: int, end: int, cache_tokens: int) -> list[RemoteSpanInfo]:
        """The chain of servers for the blocks from ``start`` up to ``end`` that promises the shortest step."""
        spans: list[RemoteSpanInfo] = await asyncio.to_thread(
            self._manager.make_sequence, start, end, mode="min_latency", cache_tokens_needed=cache_tokens
        )
        spans[-1].end = min(spans[-1].end, end)  # the last server may hold more
        return spans

    async def tensor_schema(self, span: RemoteSpanInfo) -> Any:
        """How servers want hidden states; the server of ``span`` is asked, for all and for ever, as Petals does.

        A failure is noted, so that the next one who is asked is another.
        """
        if self._tensor_schema is None:
            try:
                self._tensor_schema = await self._ask_for_schema(span)
            except Exception:
                self.note_failure(span)
                raise
        return self._tensor_schema

    async def _ask_for_schema(self, span: RemoteSpanInfo) -> Any:
        stub = TransformerConnectionHandler.get_stub(self.p2p, span.peer_id)
        request = runtime_pb2.ExpertUID(uid=self._manager.block_uids[span.start])
        async with asyncio.timeout(self.connect_timeout):
            response = await stub.rpc_info(request)
        schema, _ = MSGPackSerializer.loads(response.serialized_info)["inference_schema"]
        hidden_states = schema[0]
        if (
            hidden_states.dtype not in WIRE_DTYPES
            or hidden_states.compression not in CompressionType.values()
        ):
            raise ValueError("the server wants hidden states in a form that does not exist")
        return schema

    def request_metadata(self, span: RemoteSpanInfo, uids: str) -> dict[str, Any]:
        """What a server wants to know when a session begins: adapter and points."""
        metadata: dict[str, Any] = self._manager.get_request_metadata(
            "rpc_inference", uids, peer_id=span.peer_id
        )
        return metadata

    def uids(self, span: RemoteSpanInfo) -> str:
        """The names of the blocks of ``span``."""
        uids: str = CHAIN_DELIMITER.join(self._manager.block_uids[span.start : span.end])
        return uids

    def note_failure(self, span: RemoteSpanInfo) -> None:
        """Avoid the server for a while; without servers left for a block, look for others."""
        self._manager.on_request_failure(span.peer_id)
        # Petals takes the server out of its list, but goes on choosing from spans that it computed before.
        with self._manager.lock_changes:
            info = self._manager.state.sequence_info
            info.spans_by_priority, info.spans_containing_block = info._sort_spans(info.block_infos)
        self._on_failure()

    def note_full(self, span: RemoteSpanInfo) -> None:
        """Prefer other servers, if there are any with room, until the list of servers is fetched again."""
        with self._manager.lock_changes:
            for known in self._manager.state.sequence_info.spans_by_priority:
                if known.peer_id == span.peer_id:
                    known.server_info.cache_tokens_left = 0

    def misses_blocks(self) -> bool:
        """Whether there is a block that no known server holds."""
        return not all(self._manager.state.sequence_info.spans_containing_block)

    def note_success(self, span: RemoteSpanInfo) -> None:
        """Forget the server's failures."""
        self._manager.on_request_success(span.peer_id)

    def retry_delay(self, attempt: int) -> float:
        """Seconds to wait after the failed attempt number ``attempt``, counted from 0."""
        return float(self._manager.get_retry_delay(attempt))


async def _greet_peers(_: TiedDHT, node: DHTNode, *, addresses: Sequence[str]) -> int:
    """Runs in hivemind's DHT process: put those peers that answer into its list; returns how many did."""

    async def greet(address: str) -> bool:
        transport, _, peer = address.rpartition("/p2p/")
        peer_id = PeerID.from_base58(peer)
        with contextlib.suppress(Exception):
            await node.protocol.p2p._client.connect(peer_id, [Multiaddr(transport)])
            if await node.protocol.call_ping(peer_id):
                node.blacklist.register_success(peer_id)
                return True
        return False

    return sum(await asyncio.gather(*map(greet, addresses)))
