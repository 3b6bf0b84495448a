"""What a host will serve: asks the swarm that it joins, opens the checkpoint, and fits blocks and caches to the memory.

Everything that can be refused is refused here, before the host is a member of the swarm.
"""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import Checkpoint, open_checkpoint
from petals_chat.swarm.families import Family, family_of
from petals_chat.swarm.host_options import HostOptions, Quantization
from petals_chat.swarm.join_token import JoinToken
from petals_chat.swarm.record import SwarmRecord, fetch_record, record_of

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class HostPlan:
    """What is served, with everything decided but for which blocks: the swarm may need others by then."""

    options: HostOptions
    """With the model, the size of the caches, and either the blocks or their number."""
    checkpoint: Checkpoint
    family: Family
    device: torch.device
    record: SwarmRecord
    """What the swarm says of its model."""


def make_plan(options: HostOptions) -> HostPlan:
    """Decide. Imports what the host needs, which takes seconds; what can be checked before is checked before.

    Raises:
        ConfigurationError: the options cannot be served.
        SwarmUnreachableError: the swarm that the host is to join does not answer.
    """
    _require_free_port(options)
    opened = _open(options, options.model) if options.model else None

    from petals_chat.head.precision import resolve_device
    from petals_chat.swarm import compat

    device = resolve_device(options.device)
    if options.quantization is not Quantization.NONE and device.type != "cuda":
        raise ConfigurationError(
            f"--quantization {options.quantization}: blocks can be quantised on a CUDA device only"
        )
    compat.install()
    compat.log_to_stderr(debug=options.debug)

    record = None
    if options.join:
        record = fetch_record(options.join)
        options = _joining(options, options.join, record)
    assert options.model is not None, "the command line takes no options without a model or a token"
    checkpoint, family = opened or _open(options, options.model)
    own_record = record_of(checkpoint, options.model, options.revision)
    if record:
        record.require_same(own_record, options.model)
    options = _fitted(options, checkpoint, family, device, own_record.hidden_size)
    return HostPlan(options, checkpoint, family, device, record or own_record)


def _open(options: HostOptions, model: str) -> tuple[Checkpoint, Family]:
    checkpoint = open_checkpoint(model, options.revision)
    family = family_of(checkpoint.model_type)
    blocks, num_blocks = options.blocks, checkpoint.num_blocks
    if blocks and not 0 <= blocks[0] < blocks[1] <= num_blocks:
        raise ConfigurationError(
            f"--blocks {blocks[0]}:{blocks[1]}: the model has blocks 0:{num_blocks}; "
            "give the first one to serve, and the first one after it not to serve"
        )
    return checkpoint, family


def _joining(options: HostOptions, token: JoinToken, record: SwarmRecord) -> HostOptions:
    model, revision = options.model, options.revision
    if model is None:
        if record.model is None:
            raise ConfigurationError(
                "the model of this swarm is a directory on the machine that started it. Copy the directory to this "
                "machine, and name it: petals-chat host DIRECTORY --join TOKEN"
            )
        if Path(record.model).exists():  # the swarm must not choose among the files of this machine
            raise ConfigurationError(
                f"the swarm's model is {record.model} on the hub, but there is a file or directory of this name "
                f"here. Start the host elsewhere, or name your copy: petals-chat host ./{record.model} --join TOKEN"
            )
        model, revision = record.model, revision or record.revision
    return dataclasses.replace(
        options, model=model, revision=revision, initial_peers=token.peers, dht_prefix=token.name
    )


def _fitted(
    options: HostOptions, checkpoint: Checkpoint, family: Family, device: torch.device, hidden_size: int
) -> HostOptions:
    """The options with the size of the caches, and with the number of blocks unless the blocks are chosen."""
    from petals_chat.swarm.adapters import estimate_adapter_memory_per_block
    from petals_chat.swarm.memory import DEFAULT_CACHE_TOKENS, block_cost, fit_blocks, usable_memory
    from petals_chat.swarm.server import block_dtype

    dtype = block_dtype(options, checkpoint, device)
    adapter_bytes = estimate_adapter_memory_per_block(None, dtype, options.adapters)
    if options.blocks:
        # Who chooses blocks knows his machine: weights that are stored as they are computed need not all be in memory.
        return dataclasses.replace(options, cache_tokens=options.cache_tokens or DEFAULT_CACHE_TOKENS)
    cost = block_cost(checkpoint, family, dtype, options.quantization)
    fit = fit_blocks(
        dataclasses.replace(cost, weight_bytes=cost.weight_bytes + adapter_bytes),
        options.memory_bytes or usable_memory(device, hidden_size),
        wanted=min(options.num_blocks or checkpoint.num_blocks, checkpoint.num_blocks),
        cache_tokens=options.cache_tokens,
        grow_cache=device.type == "cuda",
    )
    return dataclasses.replace(options, num_blocks=fit.num_blocks, cache_tokens=fit.cache_tokens)


def _require_free_port(options: HostOptions) -> None:
    """libp2p would share the port with another libp2p process, and each get half of the connections."""
    address, port = options.address, options.port
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {address} port {port}: {error.strerror}. "
                "Choose another with --port, or another address of this machine with --address"
            ) from None
