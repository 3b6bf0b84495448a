"""What a private swarm says of its model: published in its DHT by every host, read by machines that join.

A record is believed only if it has the digest that the join token names: members of a swarm can write anything into
its DHT.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from petals_chat.errors import ConfigurationError, SwarmUnreachableError
from petals_chat.models.checkpoint import Checkpoint
from petals_chat.swarm.join_token import DIGEST_BYTES, JoinToken

if TYPE_CHECKING:
    from hivemind.dht import DHT

MAX_RECORD_BYTES = 1024
START_TIMEOUT_SECONDS = 30.0
FETCH_TIMEOUT_SECONDS = 30.0

_HubName = Annotated[
    str,
    msgspec.Meta(max_length=192, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?\Z"),
]
_Revision = Annotated[str, msgspec.Meta(max_length=192, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*\Z")]
_ModelType = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[a-z0-9_]+\Z")]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class SwarmRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A swarm's model."""

    model: _HubName | None
    """Its name on the hub; None = a directory, of which each host must have a copy."""
    revision: _Revision | None
    """Branch, tag or commit on the hub."""
    model_type: _ModelType
    num_blocks: _Count
    hidden_size: _Count

    def encode(self) -> bytes:
        """As it is published."""
        return msgspec.json.encode(self)

    @property
    def digest(self) -> bytes:
        """What a join token says of it."""
        return _digest(self.encode())

    def require_same(self, other: SwarmRecord, model: str) -> None:
        """Raise `ConfigurationError` unless ``other``, of the checkpoint ``model``, can serve in this swarm."""
        for field in ("model_type", "num_blocks", "hidden_size"):
            here, there = getattr(other, field), getattr(self, field)
            if here != there:
                raise ConfigurationError(
                    f"{model} is not the model of this swarm: its {field} is {here!r}, that of the swarm {there!r}"
                )


def record_of(checkpoint: Checkpoint, model: str, revision: str | None) -> SwarmRecord:
    """The record of a swarm that serves the checkpoint which was opened as ``model``."""
    is_directory = Path(model).is_absolute() or Path(model).is_dir()
    record = SwarmRecord(
        model=None if is_directory else model,
        revision=None if is_directory else revision,
        model_type=checkpoint.model_type,
        num_blocks=checkpoint.num_blocks,
        hidden_size=_hidden_size(checkpoint.config),
    )
    return _decode(record.encode())  # the limits hold for what is published too


def publish_record(dht: DHT, name: str, record: SwarmRecord, valid_seconds: float) -> None:
    """Store the record in the DHT of the swarm ``name``; waits for the answers of its members."""
    from hivemind.utils import get_dht_time

    dht.store(
        key=_key(name),
        subkey=dht.peer_id.to_base58(),
        value=record.encode(),
        expiration_time=get_dht_time() + valid_seconds,
    )


def fetch_record(token: JoinToken) -> SwarmRecord:
    """Ask the members that the token names. Starts p2pd for a moment.

    Raises:
        SwarmUnreachableError: none of them answers, or they do not know the record.
    """
    try:
        values = asyncio.run(asyncio.wait_for(_fetch_values(token), FETCH_TIMEOUT_SECONDS))
    except TimeoutError:
        values = []
    for value in values:
        if isinstance(value, bytes) and len(value) <= MAX_RECORD_BYTES and _digest(value) == token.digest:
            return _decode(value)
    raise SwarmUnreachableError(
        f"{', '.join(token.peers)}: the swarm there does not serve what the join token was made for. Take a new "
        "token: every host of a private swarm prints one when it starts"
    )


async def _fetch_values(token: JoinToken) -> list[Any]:
    from hivemind.dht.node import DHTNode
    from hivemind.p2p import P2PDaemonError

    try:
        node = await DHTNode.create(
            initial_peers=token.peers,
            client_mode=True,
            no_listen=True,
            auto_nat=False,
            nat_port_map=False,
            startup_timeout=START_TIMEOUT_SECONDS,
        )
    except P2PDaemonError as error:
        raise SwarmUnreachableError(
            f"none of the hosts that the join token names can be reached: {', '.join(token.peers)}. Is one of them "
            "running, and its port open?"
        ) from error
    try:
        found = await node.get(_key(token.name), latest=True)
    finally:
        await node.shutdown()
    entries = found.value if found is not None else None
    return [entry.value for entry in entries.values()] if isinstance(entries, dict) else []


def _key(name: str) -> str:
    return f"petals-chat.record.{name}"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def _decode(content: bytes) -> SwarmRecord:
    try:
        return msgspec.json.decode(content, type=SwarmRecord)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"what the swarm says of its model cannot be used: {error}") from None


def _hidden_size(config: dict[str, Any]) -> int:
    size = config.get("hidden_size", config.get("n_embed"))  # the word of BLOOM's first checkpoints
    if not isinstance(size, int):
        raise ConfigurationError("config.json does not say the model's hidden_size")
    return size
