"""The servers of a private swarm that are there.

Records of servers that were killed stay in the DHT for a minute: a host that looks at them alone would leave their
blocks to the dead, or, started again under its own name, to itself.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Collection, Sequence
from typing import Any

from hivemind.dht import DHT
from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from petals.data_structures import RemoteModuleInfo
from petals.utils.dht import get_remote_module_infos

PING_TIMEOUT_SECONDS = 3.0


def living_servers(dht: DHT, uids: Sequence[str], *, without_self: bool, **_: Any) -> list[RemoteModuleInfo]:
    """What the DHT says of the blocks ``uids``, of members that answer a ping.

    Args:
        without_self: leave out what this peer announced in an earlier life.
    """
    records: list[RemoteModuleInfo] = get_remote_module_infos(dht, uids, latest=True)
    others = {peer for record in records for peer in record.servers} - {dht.peer_id}
    living = dht.run_coroutine(functools.partial(_answering, peers=others)) if others else set()
    if not without_self:
        living.add(dht.peer_id)
    for record in records:
        record.servers = {peer: info for peer, info in record.servers.items() if peer in living}
    return records


async def _answering(_: DHT, node: DHTNode, *, peers: Collection[PeerID]) -> set[PeerID]:
    """Runs in hivemind's DHT process."""

    async def answers(peer: PeerID) -> bool:
        try:
            return bool(await asyncio.wait_for(node.protocol.call_ping(peer), PING_TIMEOUT_SECONDS))
        except TimeoutError:
            return False

    replies = await asyncio.gather(*map(answers, peers))
    return {peer for peer, is_there in zip(peers, replies, strict=True) if is_there}
