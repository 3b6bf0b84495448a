"""Everything that can be configured, typed and validated, as one frozen `Settings`.

Defaults < ``petals-chat.toml`` < environment < command line. This module is the only reader of the
environment. It knows what a valid configuration is, not what is done with it.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0)]
Multiaddress = Annotated[str, Field(pattern=r"^/(ip4|ip6|dns|dns4|dns6)/.+/p2p/\w+$")]


class Device(enum.StrEnum):
    """Where a part of a model computes. ``AUTO``: CUDA if there, else the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(enum.StrEnum):
    """Precision of weights and hidden states. ``AUTO``: bfloat16 if the device computes in it, else float32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ServerSettings(_Section):
    """``[server]``: where the gateway listens and who may use it."""

    host: str = "127.0.0.1"
    """Address to listen on. "0.0.0.0" = all of this machine's IPv4 addresses."""
    port: Annotated[int, Field(ge=0, le=65535)] = 5000
    """TCP port; 0 = any free one."""
    root_path: Annotated[str, Field(pattern=r"^(/[^/?#\s]+)*$")] = ""
    """Path under which a reverse proxy publishes the server, like "/chat"."""
    forwarded_allow_ips: str = "127.0.0.1"
    """Addresses of proxies whose X-Forwarded-* headers are believed, separated by commas."""
    cors_origins: tuple[str, ...] = ("*",)
    """Origins whose pages may call the HTTP API."""
    debug_tracebacks: bool = False
    """Put whole Python tracebacks into the API's error replies."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged. Prompts and answers are never logged."""


class LimitSettings(_Section):
    """``[limits]``: what one client, and all clients together, may use."""

    max_message_bytes: Annotated[int, Field(ge=1024, le=16 * 1024 * 1024)] = 1024 * 1024
    """Size of one WebSocket message or one HTTP body."""
    max_connections: Annotated[int, Field(ge=1)] = 1000
    """WebSocket connections at once."""
    max_sessions: Annotated[int, Field(ge=1)] = 1000
    """Inference sessions open at once, all models together."""
    max_pending_requests: Annotated[int, Field(ge=1)] = 16
    """Requests that one v2 connection, or one v1 session, may send ahead."""
    max_stop_sequences: Annotated[int, Field(ge=1)] = 16
    """Stop sequences in one request."""
    max_stop_sequence_chars: Annotated[int, Field(ge=1)] = 256
    """Characters of one stop sequence."""
    ping_interval_seconds: Seconds = 25
    """Time between WebSocket pings."""
    connection_idle_timeout_seconds: Seconds = 300
    """A v2 connection that asks for nothing is closed after this time."""
    session_idle_timeout_seconds: Seconds = 300
    """A v1 session that is not used is closed after this time."""
    request_timeout_seconds: Seconds = 1800
    """A single generation is ended with an error after this time."""


class SwarmSettings(_Section):
    """``[swarm]``: which Petals swarm serves the models, and the host that is started if none does."""

    initial_peers: Literal["public"] | tuple[Multiaddress, ...] = ()
    """Addresses of the swarm's known members, or "public". None = a private swarm, started on this machine."""
    dht_prefix: str | None = None
    """Name of a model's blocks in the swarm. None = Petals' own rule for the model."""
    max_retries: Annotated[int, Field(ge=1, le=100)] = 4
    """Attempts at one step before it fails."""
    request_timeout_seconds: Seconds = 180
    """Time for one step in the swarm."""
    connect_timeout_seconds: Seconds = 10
    """Time for reaching a server."""
    update_period_seconds: Seconds = 15
    """How often the list of servers is refreshed."""
    prefill_chunk_tokens: Annotated[int, Field(ge=1)] = 512
    """Longest piece of a prompt sent as one step."""
    host_address: str = "127.0.0.1"
    """Address on which the started host accepts other machines; the default accepts none."""
    host_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """TCP port of the started host; 0 = any free one. The second private model uses the next port, and so on."""
    host_cache_tokens: Annotated[int, Field(ge=64)] = 16384
    """Tokens for which the started host keeps attention caches, all sessions together."""


class EngineSettings(_Section):
    """``[engine]``: the processes that hold embeddings and LM heads, and the started host."""

    device: Device = Device.AUTO
    """Where to compute."""
    dtype: Dtype = Dtype.AUTO
    """Precision."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of one process; 0 = as torch chooses."""
    start_timeout_seconds: Seconds = 3600
    """Time for a model to load, downloads included."""
    data_dir: Path | None = None
    """Where identities of hosts and built models are kept. None = the user's data directory."""


class GenerationDefaults(_Section):
    """Sampling settings that the page and the terminal chat start with."""

    do_sample: bool = True
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.6
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.9
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0


class ChatSettings(_Section):
    """How a chat with the model is worded, for models without a chat template, and its limits."""

    max_session_length: Annotated[int, Field(ge=16)] = 8192
    """Tokens of one session, prompt and answers together."""
    sep_token: str = "###"
    """Stands between the turns."""
    stop_token: str = "###"
    """Ends an answer."""
    extra_stop_sequences: tuple[str, ...] = ("</s>",)
    """End an answer too."""
    generation: GenerationDefaults = GenerationDefaults()
    """What the page and the terminal chat start with."""


class ModelSettings(_Section):
    """One served model. Its key is the name of its table: ``[models."owner/name"]``."""

    key: str
    repository: str
    """Hub name, or local directory, of the checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: str | None = None
    """Hub name or local directory of a PEFT adapter, which the swarm's hosts must hold too."""
    aliases: tuple[str, ...] = ()
    """Other names under which clients may ask for the model."""
    public_api: bool = True
    """False = only this server's own page may use the model (the licence of some models demands it)."""
    name: str
    """What people read."""
    family: str = "Other"
    """Heading under which the page lists the model."""
    model_card: str | None = None
    """URL of its description."""
    license: str | None = None
    """URL of its licence."""
    initial_peers: Literal["public"] | tuple[Multiaddress, ...] | None = None
    """Overrides ``swarm.initial_peers``; [] = a private swarm on this machine."""
    dht_prefix: str | None = None
    """Overrides ``swarm.dht_prefix``."""
    device: Device | None = None
    """Overrides ``engine.device``."""
    dtype: Dtype | None = None
    """Overrides ``engine.dtype``."""
    chat: ChatSettings = ChatSettings()


class Settings(_Section):
    """The whole configuration; ``models`` in the order of the families, the default model first."""

    server: ServerSettings = ServerSettings()
    limits: LimitSettings = LimitSettings()
    swarm: SwarmSettings = SwarmSettings()
    engine: EngineSettings = EngineSettings()
    models: tuple[ModelSettings, ...] = ()
