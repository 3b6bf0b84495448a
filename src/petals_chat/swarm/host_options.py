"""What a host is told when it starts, and what it tells when it serves."""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
from pathlib import Path
from typing import Literal

import msgspec

from petals_chat.swarm.join_token import JoinToken


class Quantization(enum.StrEnum):
    """How the weights of blocks are compressed when they are loaded."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


class Relay(enum.StrEnum):
    """Whether others reach a host of the public swarm by way of members that relay; private swarms have none."""

    AUTO = "auto"
    """If a test finds that the host cannot be reached directly."""
    ALWAYS = "always"
    NEVER = "never"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """What to serve, to whom and how."""

    model: str | None
    """Hub name or local directory of the checkpoint; None = the one that the swarm of ``join`` serves."""
    revision: str | None
    """Branch, tag or commit on the hub."""
    initial_peers: tuple[str, ...] | Literal["public"]
    """Multiaddresses of members of the swarm to join; none = begin a new swarm."""
    join: JoinToken | None
    """The swarm to join, in place of ``initial_peers`` and ``dht_prefix``."""
    dht_prefix: str | None
    """Name of the model's blocks in the swarm; None = Petals' own rule for the model."""
    blocks: tuple[int, int] | None
    """First block, and the first one after it that is not served; None = those that the swarm needs most."""
    num_blocks: int | None
    """How many blocks to serve at most; None = as many as fit into the memory."""
    memory_bytes: int | None
    """Memory for blocks and attention caches; None = what is free, less a margin."""
    device: str
    """A value of `petals_chat.settings.Device`."""
    dtype: str
    """A value of `petals_chat.settings.Dtype`."""
    quantization: Quantization
    adapters: tuple[str, ...]
    """PEFT repositories or local directories."""
    cache_tokens: int | None
    """Room of the attention caches, all sessions together; None = what fits."""
    max_session_length: int
    """Tokens that one session may reserve."""
    address: str
    """IP address to listen on."""
    port: int
    """0 = any free one."""
    public_ip: str | None
    """IP address under which others reach the port, where it is not one of this machine's own."""
    relay: Relay
    identity: Path | None
    """File of the key that gives the host its peer id; made if it is missing. None = a new one each time."""
    name: str | None
    """What monitors of the swarm show."""
    threads: int
    """CPU threads; 0 = as many as there are CPUs that the host may use, one for a small model."""
    json: bool
    """Print one line of JSON when the host serves, as `HostReady`, and nothing else."""
    debug: bool
    """Show all that Petals and hivemind log."""
    ready_fd: int | None
    """File descriptor of a parent who wants to know when the host serves, as `HostReady`."""
    exit_with_stdin: bool
    """Stop when standard input ends, because the parent that held its other end is gone."""

    @property
    def listen_address(self) -> str:
        """Address and port as libp2p writes them."""
        return _multiaddress(self.address, self.port)

    @property
    def announced_address(self) -> str | None:
        """The one under which others reach the host, if it is not the one on which it listens."""
        return _multiaddress(self.public_ip, self.port) if self.public_ip else None


class HostReady(msgspec.Struct, frozen=True):
    """One line of JSON for programs, when clients find the blocks and get answers: see ``json``, ``ready_fd``.

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
    join_token: str | None = None
    """With which other machines join the swarm; None = it is the public one."""


class HostLoad(msgspec.Struct, frozen=True):
    """What a host is doing."""

    start: int
    end: int
    num_blocks: int
    """Of the whole model."""
    sessions: int
    """Inference sessions that are open."""
    tokens: int
    """That went through the host's blocks since it started."""
    cache_used: float
    """Share of the attention caches that sessions have reserved: 0 to 1."""


def _multiaddress(address: str, port: int) -> str:
    return f"/ip{ipaddress.ip_address(address).version}/{address}/tcp/{port}"
