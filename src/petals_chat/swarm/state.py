"""The state of swarms as programs read it: the shape of the public Petals health monitor, with additions.

The gateway and ``petals-chat swarm status`` give the same. Needs neither torch nor Petals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec
from pydantic import BaseModel, Field

from petals_chat.protocol.messages import SwarmPeer, SwarmStatus

MONITOR_ID_CHARS = 6
"""Of a peer id, the last ones; as the monitor shortens it."""
HUB_URL = "https://huggingface.co/"


class Span(BaseModel):
    """A server's blocks, from ``start`` up to, not including, ``end``."""

    start: int
    end: int


class ServerRow(BaseModel):
    """A server of the model. Rates are null where the server has not measured them."""

    peer_id: str
    short_peer_id: str
    state: str = Field(
        description="online, joining (it loads), or offline (it has left, or does not answer)."
    )
    span: Span
    public_name: str | None = None
    version: str | None = None
    throughput: float | None = Field(None, description="Tokens per second, all its blocks, network included.")
    inference_rps: float | None = Field(None, description="Steps of one token per second, through one block.")
    forward_rps: float | None = Field(None, description="Tokens of long inputs per second, one block.")
    network_rps: float | None = Field(None, description="Tokens per second that its network can take.")
    cache_tokens_left: int | None = Field(None, description="Room for contexts, in tokens.")
    torch_dtype: str | None = None
    quant_type: str | None = None
    using_relay: bool | None = Field(None, description="Whether it is reached only by way of a relay.")
    adapters: list[str] = []
    ping_seconds: float | None = Field(None, description="How long it took to answer this gateway.")


class ModelReport(BaseModel):
    """A model and the servers of its blocks."""

    name: str = Field(description="Its name on the hub; the key, if it is not from there.")
    short_name: str
    key: str = Field(description="What to send as `model`.")
    display_name: str
    repository: str | None = Field(None, description="Its address on the hub.")
    state: Literal["healthy", "broken"]
    status: str = Field(description="loading, ready, full, broken or unavailable.")
    num_blocks: int = Field(description="0 as long as the model has not been loaded.")
    missing_blocks: list[int] = Field(description="Blocks that no server holds.")
    rarest_block_servers: int = Field(description="How many servers hold the rarest block.")
    rarest_blocks: list[int] = Field(description="The blocks that so few servers hold.")
    dht_prefix: str | None = Field(None, description="Name of the blocks in the swarm.")
    join_command: str | None = Field(None, description="What adds another machine; null if that is not told.")
    age_seconds: float | None = Field(None, description="Since the servers were seen; null if never.")
    server_rows: list[ServerRow]


class SwarmState(BaseModel):
    """All models, with their servers."""

    bootstrap_states: list[Literal["online", "unreachable"]] = Field(description="Of each initial peer.")
    model_reports: list[ModelReport]
    last_updated: float | None = Field(None, description="Seconds since 1970; null if nothing was seen yet.")


def model_report(
    swarm: SwarmStatus,
    status: str,
    now: float,
    *,
    key: str,
    display_name: str,
    hub_name: str | None = None,
    dht_prefix: str | None = None,
    join_command: str | None = None,
) -> ModelReport:
    """A model's part of the state.

    Args:
        status: how it is, a value of `petals_chat.engine.interface.ModelState`.
        now: seconds since 1970.
        hub_name: its name on the hub, if it is from there.
    """
    name = hub_name or key
    return ModelReport(
        name=name,
        short_name=name.rpartition("/")[2],
        key=key,
        display_name=display_name,
        repository=HUB_URL + hub_name if hub_name else None,
        state="healthy" if status in ("ready", "full") else "broken",
        status=status,
        num_blocks=len(swarm.block_servers),
        missing_blocks=list(swarm.missing_blocks),
        rarest_block_servers=swarm.rarest_block_servers,
        rarest_blocks=list(swarm.rarest_blocks),
        dht_prefix=dht_prefix,
        join_command=join_command,
        age_seconds=max(0.0, now - swarm.seen_at) if swarm.seen_at else None,
        server_rows=[_row(server) for server in swarm.servers],
    )


def swarm_state(swarms: Sequence[SwarmStatus], reports: Sequence[ModelReport]) -> SwarmState:
    """The whole state, of reports and the swarms that they are about."""
    answers: dict[str, bool] = {}
    for swarm in swarms:
        for peer_id, answers_here in swarm.initial_peers.items():
            answers[peer_id] = answers.get(peer_id, False) or answers_here
    return SwarmState(
        bootstrap_states=["online" if is_online else "unreachable" for is_online in answers.values()],
        model_reports=list(reports),
        last_updated=max((swarm.seen_at for swarm in swarms if swarm.seen_at), default=None),
    )


def spare_sentence(report: ModelReport) -> str:
    """What people should know of who holds the blocks; empty if nothing is known."""
    if not report.num_blocks:
        return ""
    if report.missing_blocks:
        return f"nobody holds {name_blocks(report.missing_blocks)}"
    servers = report.rarest_block_servers
    if len(report.rarest_blocks) == report.num_blocks:
        return "no spare server" if servers == 1 else f"{servers} servers for each block"
    if servers == 1:
        return f"no spare server for {name_blocks(report.rarest_blocks)}"
    return f"at least {servers} servers for each block"


def name_blocks(blocks: Iterable[int]) -> str:
    """Block numbers in words, like "blocks 3-5, 7"."""
    ranges = list(_ranges(blocks))
    plural = len(ranges) > 1 or any(first != last for first, last in ranges)
    texts = (str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return f"{'blocks' if plural else 'block'} {', '.join(texts)}"


def _ranges(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and last block of each unbroken run."""
    run: tuple[int, int] | None = None
    for block in sorted(blocks):
        if run and block == run[1] + 1:
            run = run[0], block
        else:
            if run:
                yield run
            run = block, block
    if run:
        yield run


def _row(server: SwarmPeer) -> ServerRow:
    values = msgspec.structs.asdict(server)
    return ServerRow(
        span=Span(start=values.pop("start"), end=values.pop("end")),
        short_peer_id=f"...{server.peer_id[-MONITOR_ID_CHARS:]}",
        **{**values, "adapters": list(server.adapters)},
    )
