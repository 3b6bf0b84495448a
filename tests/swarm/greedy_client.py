"""A client that asks a swarm by Petals' own parts alone, to test hosts with: greedy tokens for each request.

Reads requests as lines of JSON, writes answers as such. A process of its own, because hivemind forks.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from petals_chat.head.modules import ClientModules, load_client_modules
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.swarm import compat


def generate(ends: ClientModules, manager: Any, prompt: list[int], new_tokens: int, chunk: int) -> list[int]:
    """Greedy continuation of ``prompt``, sent in pieces of ``chunk`` tokens."""
    from petals.client.inference_session import InferenceSession

    tokens: list[int] = []

    def choose_token(hidden_states: torch.Tensor) -> None:
        tokens.append(int(ends.logits(hidden_states[0, -1:]).argmax()))

    with torch.inference_mode(), InferenceSession(manager, max_length=len(prompt) + new_tokens) as session:
        for start in range(0, len(prompt), chunk):
            output = session.step(ends.embed(prompt[start : start + chunk]))
        choose_token(output)
        while len(tokens) < new_tokens:
            choose_token(session.step(ends.embed(tokens[-1:])))
    return tokens


def answer(request: dict[str, Any]) -> list[list[int]]:
    """Run all prompts of a request at once, each in a session of its own."""
    from hivemind import DHT
    from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
    from petals.client.config import ClientConfig
    from petals.client.routing import RemoteSequenceManager

    checkpoint = open_checkpoint(request["model"])
    ends = load_client_modules(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    peers, prefix = tuple(request["peers"]), request["dht_prefix"]
    uids = tuple(f"{prefix}.{block}" for block in range(checkpoint.num_blocks))
    config = ClientConfig(
        initial_peers=peers,
        dht_prefix=prefix,
        max_retries=2,
        request_timeout=request["request_timeout"],
        show_route=False,
        active_adapter=request["adapter"],
    )
    dht = DHT(initial_peers=peers, client_mode=True, start=True, use_relay=False, use_auto_relay=False)
    manager = RemoteSequenceManager(config, uids, dht=dht)
    try:
        with ThreadPoolExecutor(16) as threads:
            futures = [
                threads.submit(generate, ends, manager, prompt, request["new_tokens"], request["chunk"])
                for prompt in request["prompts"]
            ]
            return [future.result() for future in futures]
    finally:
        manager.shutdown()
        RemoteExpertWorker.run_coroutine(manager.state.p2p.shutdown())
        dht.shutdown()
        dht.join(5)


def disarm_destructor() -> None:
    """Keep Petals' client from waiting for itself.

    A session whose server has gone first cannot be closed in order; its destructor tries again and waits for
    hivemind's event loop, also when the garbage collector calls it in the very thread of that loop.
    """
    from petals.client.inference_session import _ServerInferenceSession

    del _ServerInferenceSession.__del__


if __name__ == "__main__":
    compat.install()
    disarm_destructor()
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            reply: dict[str, object] = {"tokens": answer(json.loads(line))}
        except Exception as error:
            reply = {"error": repr(error)}
        print(json.dumps(reply), flush=True)
    os._exit(0)  # not held up by sessions whose servers have gone first
