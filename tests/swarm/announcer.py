"""A member of a swarm that announces servers of all kinds, true or not: run as a program by the tests.

It prints its address as a line, and ends with its standard input.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from typing import Any

import base58

from petals_chat.swarm import compat

NUM_BLOCKS = 4
HONEST_SERVERS = 600
ONLINE, JOINING, OFFLINE = 2, 1, 0


def peer_id(number: int) -> str:
    """A valid one, of nobody."""
    digest = hashlib.sha256(str(number).encode()).digest()
    text: bytes = base58.b58encode(bytes([0x12, 32]) + digest)
    return text.decode()


def announcements() -> list[tuple[Any, Any]]:
    """Peer ids, and what stands in the DHT under them, for each block alike."""
    servers: list[tuple[Any, Any]] = [
        (peer_id(number), (ONLINE, 1.0, {"start_block": 0, "end_block": NUM_BLOCKS}))
        for number in range(HONEST_SERVERS)
    ]
    lies: list[Any] = [
        (OFFLINE, 1.0, {"start_block": 0, "end_block": NUM_BLOCKS}),
        (JOINING, 1.0, {"start_block": 10**12, "end_block": 10**15}),
        (ONLINE, float("inf"), {}),
        (ONLINE, float("nan"), {}),
        (ONLINE, -1.0, {}),
        (99, 1.0, {}),
        "words",
        None,
        (ONLINE, 1.0, {"start_block": 3, "end_block": 1}),
        (ONLINE, 1.0, {"public_name": "x" * 5000 + "\n\x1b[31m", "adapters": ["y" * 500] * 100}),
        (ONLINE, 1.0, {"inference_rps": 1e308, "cache_tokens_left": 10**18, "next_pings": {"z": 1.0}}),
        (ONLINE, 1.0, {"inference_rps": 0.0}),
    ]
    no_peer = (5, (ONLINE, 1.0, {"start_block": 0, "end_block": NUM_BLOCKS}))
    return [*servers, *((peer_id(10_000 + number), lie) for number, lie in enumerate(lies)), no_peer]


async def announce(_: Any, node: Any, *, prefix: str) -> None:
    """Runs in hivemind's DHT process."""
    from hivemind.utils import get_dht_time

    expiration = get_dht_time() + 600
    for subkey, value in announcements():
        keys = [f"{prefix}.{block}" for block in range(NUM_BLOCKS)]
        # At the same time hivemind would have to compare numbers with texts.
        until = expiration + isinstance(subkey, int)
        await node.store_many(keys, [value] * len(keys), until, subkeys=[subkey] * len(keys))
    models = {prefix: {"num_blocks": NUM_BLOCKS, "repository": "https://huggingface.co/org/model"}}
    lies: dict[Any, Any] = {"none": None, "huge": {"num_blocks": 10**9}, "text": {"num_blocks": "4"}}
    lies |= dict.fromkeys((5, "a.b", "a b"), models[prefix])
    for name, value in {**models, **lies}.items():
        await node.store("_petals.models", value, expiration + isinstance(name, int), subkey=name)


def main() -> None:
    """Announce, until standard input ends."""
    compat.install()
    from hivemind import DHT

    dht = DHT(host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True, nat_port_map=False, auto_nat=False)
    dht.run_coroutine(functools.partial(announce, prefix=sys.argv[1]))
    print(dht.get_visible_maddrs()[0], flush=True)
    sys.stdin.read()
    dht.shutdown()
    dht.join(5)


if __name__ == "__main__":
    main()
