"""What a host is told when it starts, and what it tells when it serves."""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
from pathlib import Path
from typing import Literal

import msgspec


class Quantization(enum.StrEnum):
    """How the weights of blocks are compressed when they are loaded."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """What to serve, to whom and how."""

    model: str
    """Hub name or local directory of the checkpoint."""
    revision: str | None
    """Branch, tag or commit on the hub."""
    initial_peers: tuple[str, ...] | Literal["public"]
    """Multiaddresses of members of the swarm to join; none = begin a new swarm."""
    dht_prefix: str | None
    """Name of the model's blocks in the swarm; None = Petals' own rule for the model."""
    blocks: tuple[int, int] | None
    """First block, and the first one after it that is not served; None = all, or what fits on the GPU."""
    device: str
    """A value of `petals_chat.settings.Device`."""
    dtype: str
    """A value of `petals_chat.settings.Dtype`."""
    quantization: Quantization
    adapters: tuple[str, ...]
    """PEFT repositories or local directories."""
    cache_tokens: int
    """Room of the attention caches, all sessions together."""
    max_session_length: int
    """Tokens that one session may reserve."""
    address: str
    """IP address to listen on."""
    port: int
    """0 = any free one."""
    identity: Path | None
    """File of the key that gives the host its peer id; made if it is missing. None = a new one each time."""
    name: str | None
    """What monitors of the swarm show."""
    threads: int
    """CPU threads; 0 = as torch chooses, one for a small model."""
    debug: bool
    """Show all that Petals and hivemind log."""
    ready_fd: int | None
    """File descriptor of a parent who wants to know when the host serves, as `HostReady`."""
    exit_with_stdin: bool
    """Stop when standard input ends, because the parent that held its other end is gone."""

    @property
    def listen_address(self) -> str:
        """Address and port as libp2p writes them."""
        version = ipaddress.ip_address(self.address).version
        return f"/ip{version}/{self.address}/tcp/{self.port}"


class HostReady(msgspec.Struct, frozen=True):
    """Written to ``ready_fd`` as one line of JSON when clients find the blocks and get answers.

    If the host cannot start, the line is ``{"error": {"code": ..., "message": ..., ...}}`` instead; if it was
    stopped before it was ready, there is no line.
    """

    peers: tuple[str, ...]
    """Multiaddresses at which the host is reached; initial peers for others."""
    dht_prefix: str
    start: int
    end: int
    """The first block after ``start`` that is not served."""
    num_blocks: int
    """Of the whole model."""
    dtype: str
    device: str
