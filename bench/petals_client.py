"""Petals' own client, as far as the contenders need it that are not this gateway: membership and routing."""

# ruff: noqa: E402 - compat.install() comes before petals

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from petals_chat.swarm import compat

compat.install()

from hivemind import DHT
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from petals.client.config import ClientConfig
from petals.client.inference_session import InferenceSession, _ServerInferenceSession
from petals.client.routing.sequence_manager import RemoteSequenceManager
from safetensors import safe_open

from petals_chat.head.precision import resolve_device, resolve_dtype
from petals_chat.models.checkpoint import Checkpoint

__all__ = ["InferenceSession", "join_swarm", "model_dtype", "read_tensor"]

MAX_RETRIES = 3

# A session that was left open, and that Python happens to collect in the thread of hivemind's event loop, waits there
# for that event loop, and with it all other sessions do. Who uses sessions here closes them.
for _session in (InferenceSession, _ServerInferenceSession):
    del _session.__del__


@contextlib.contextmanager
def join_swarm(peers: Sequence[str], dht_prefix: str, num_blocks: int) -> Iterator[RemoteSequenceManager]:
    """A member of the swarm that serves no blocks. Forks: enter it before threads are started."""
    dht = DHT(
        initial_peers=list(peers),
        client_mode=True,
        num_workers=num_blocks,
        start=True,
        use_relay=False,
        use_auto_relay=False,
    )
    config = ClientConfig(
        initial_peers=tuple(peers), dht_prefix=dht_prefix, max_retries=MAX_RETRIES, show_route=False
    )
    manager = RemoteSequenceManager(
        config, tuple(f"{dht_prefix}.{block}" for block in range(num_blocks)), dht=dht
    )
    try:
        yield manager
    finally:
        manager.shutdown()
        RemoteExpertWorker.run_coroutine(manager.state.p2p.shutdown())
        dht.shutdown()
        dht.join(5)


def model_dtype(requested: str) -> torch.dtype:
    """The precision in which this gateway computes too."""
    return resolve_dtype(requested, resolve_device("cpu"))


def read_tensor(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the checkpoint, mapped from its file if it is stored in ``dtype``."""
    with safe_open(checkpoint.fetch([name])[name], framework="pt", device="cpu") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.to(dtype)
