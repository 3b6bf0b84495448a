"""The swarm as the engine sees it: sessions that turn hidden states into hidden states, and a list of peers.

Wraps Petals' own client: its routing (`RemoteSequenceManager`) and its fault-tolerant `InferenceSession`, which
moves to another server and replays its inputs when one is lost. Knows nothing of tokens, text or requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch

from petals_chat.errors import AttentionCacheFullError, MissingBlocksError, SwarmError, SwarmUnreachableError
from petals_chat.protocol.messages import SwarmPeer
from petals_chat.swarm import compat

compat.install()

import petals.client.routing.sequence_manager as petals_routing
from hivemind import DHT
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from petals.client.config import ClientConfig
from petals.client.inference_session import InferenceSession
from petals.constants import PUBLIC_INITIAL_PEERS
from petals.data_structures import ServerState

MAX_CONCURRENT_STEPS = 128
"""Petals' session blocks a thread for each step that is on its way."""


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
        peers = (
            tuple(PUBLIC_INITIAL_PEERS) if options.initial_peers == "public" else options.initial_peers
        )
        try:
            self._dht = DHT(
                initial_peers=peers,
                client_mode=True,
                num_workers=min(32, options.num_blocks),
                start=True,
                use_auto_relay=options.initial_peers == "public",
                use_relay=options.initial_peers == "public",
            )
        except Exception as error:
            raise SwarmUnreachableError(f"no initial peer of the swarm answers ({', '.join(peers)})") from error
        self._options = options
        self._routing = petals_routing.RemoteSequenceManager(
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
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT_STEPS, thread_name_prefix="swarm-step")

    def refresh(self) -> None:
        """Fetch the list of servers now; blocks until it is there."""
        with self._routing._thread_start_lock:
            if not self._routing.is_alive():
                self._routing._thread.start()
        self._routing.update(wait=True)

    def open_session(self, max_length: int) -> SwarmSession:
        """A session with room for ``max_length`` tokens; servers are chosen and memory taken at its first step."""
        return SwarmSession(InferenceSession(self._routing, max_length), max_length, self._threads)

    def peers(self) -> tuple[SwarmPeer, ...]:
        """The servers of the model's blocks as the last refresh found them. Never waits."""
        return tuple(
            SwarmPeer(
                peer_id=span.peer_id.to_base58(),
                start=span.start,
                end=span.end,
                state=ServerState(span.server_info.state).name.lower(),
                throughput=span.server_info.throughput,
                public_name=span.server_info.public_name,
                version=span.server_info.version,
                cache_tokens_left=span.server_info.cache_tokens_left,
                torch_dtype=span.server_info.torch_dtype,
                quant_type=span.server_info.quant_type,
                adapters=tuple(span.server_info.adapters),
                using_relay=span.server_info.using_relay,
            )
            for span in list(self._routing.state.sequence_info.spans_by_priority)
        )

    def close(self) -> None:
        """Leave the swarm; every session must be closed before. The order keeps hivemind's destructors quiet."""
        self._threads.shutdown()
        self._routing.shutdown()
        RemoteExpertWorker.run_coroutine(self._routing.state.p2p.shutdown())
        self._dht.shutdown()
        self._dht.join(5)


class SwarmSession:
    """The attention caches of one session, spread over the swarm's servers.

    One step at a time. A step that was begun is finished: it cannot be taken back, since servers have
    advanced their caches.
    """

    def __init__(self, session: InferenceSession, max_length: int, threads: ThreadPoolExecutor) -> None:
        self._session = session
        self._threads = threads
        self.max_length = max_length
        self.position = 0
        """Tokens that the caches hold."""

    async def step(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Send hidden states through all blocks.

        Args:
            hidden_states: [1, tokens, hidden_size], following those of the steps before.

        Returns:
            [1, tokens, hidden_size], of the same dtype and on the same device.

        Raises:
            SwarmError, AttentionCacheFullError: the session must be closed, its caches are lost.
        """
        loop = asyncio.get_running_loop()
        try:
            outputs = await loop.run_in_executor(self._threads, self._step, hidden_states)
        except Exception as error:
            raise _translate(error) from error
        self.position += hidden_states.shape[1]
        return outputs

    def _step(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            outputs: torch.Tensor = self._session.step(hidden_states)
        return outputs

    async def close(self) -> None:
        """Free the servers' memory for this session."""
        await asyncio.get_running_loop().run_in_executor(
            self._threads, self._session.__exit__, None, None, None
        )


def _translate(error: Exception) -> SwarmError | AttentionCacheFullError:
    """Petals' exceptions, of which remote ones arrive as text only, in terms of our own."""
    if isinstance(error, petals_routing.MissingBlocksError):
        return MissingBlocksError(_block_numbers(str(error)))
    text = str(error)
    if "AllocationFailed" in text or "Could not allocate" in text:
        return AttentionCacheFullError()
    return SwarmUnreachableError(f"a server of the swarm failed: {type(error).__name__}")


def _block_numbers(message: str) -> list[int]:
    """The blocks in "No servers holding blocks [1, 2] are online ..." or "... blocks 3 are online ..."."""
    listed = re.search(r"holding blocks (\[[\d, ]*\]|\d+)", message)
    return [int(number) for number in re.findall(r"\d+", listed.group(1))] if listed else []
