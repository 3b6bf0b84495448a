"""The settings themselves: their names, types, limits, defaults and meanings, as frozen sections.

This module knows what a valid configuration is; not where it comes from (`petals_chat.settings.loading`), nor
what is done with it. The docstrings of the fields are the text of docs/configuration.md.
"""

from __future__ import annotations

import enum
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# "wording" completes the sentence "it must be a string ..." where the pattern alone would not be readable.
Multiaddress = Annotated[
    str,
    Field(
        pattern=r"^/(ip4|ip6|dns|dns4|dns6)/.+/p2p/\w+$",
        json_schema_extra={"wording": 'like "/ip4/192.0.2.1/tcp/31337/p2p/QmServer"'},
    ),
]
Origin = Annotated[
    str,
    Field(
        pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/\s]+)$",
        json_schema_extra={"wording": 'like "https://example.org" (no path, no slash at the end) or "*"'},
    ),
]
UrlPath = Annotated[
    str,
    Field(
        pattern=r"^(/[^/?#\s]+)*$",
        json_schema_extra={"wording": 'like "/chat" (no slash at the end), or empty'},
    ),
]
DhtPrefix = Annotated[
    str,
    # Petals refuses dots; spaces would cut the names of blocks in its space-separated lists.
    Field(pattern=r"^[^.\s]+$", json_schema_extra={"wording": "without dots and spaces"}),
]


class Device(enum.StrEnum):
    """Where a part of a model computes. ``AUTO``: CUDA if there, else the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(enum.StrEnum):
    """Precision of weights and hidden states. ``AUTO``: bfloat16 if the device has it, else float32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class HeadWeights(enum.StrEnum):
    """How a CPU that computes in float32 has the weights of a 16-bit LM head. ``AUTO``: copied if that is faster."""

    AUTO = "auto"
    MAPPED = "mapped"
    COPIED = "copied"


class Section(BaseModel):
    """A table of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ServerSettings(Section):
    """``[server]``: where the gateway listens and who may use it."""

    host: Text = "127.0.0.1"
    """Address to listen on. "0.0.0.0" = all of this machine's IPv4 addresses."""
    port: Annotated[int, Field(ge=0, le=65535)] = 5000
    """TCP port; 0 = any free one."""
    root_path: UrlPath = ""
    """Path under which a reverse proxy publishes the server; empty = at the root."""
    forwarded_allow_ips: str = "127.0.0.1"
    """Addresses of proxies whose X-Forwarded-* headers are believed, separated by commas."""
    cors_origins: tuple[Origin, ...] = ("*",)
    """Origins whose pages may call the HTTP API."""
    debug_tracebacks: bool = False
    """Put whole Python tracebacks into the API's error replies."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged. Prompts and answers are never logged."""


class LimitSettings(Section):
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
    max_waiting_generations: Annotated[int, Field(ge=1)] = 256
    """Generations of one worker that may wait for room in the swarm's attention caches. Those that had room before and
    gave it to others are not counted."""
    queue_timeout_seconds: Seconds = 300
    """A generation that has waited this long for room fails."""
    request_timeout_seconds: Seconds = 1800
    """A single generation is ended with an error after this time."""
    max_answers: Annotated[int, Field(ge=1)] = 256
    """Answers written at once that outlive their connection, all models together. An address may have half of them."""
    max_answers_of_client: Annotated[int, Field(ge=1)] = 8
    """Those of one visitor, or of one address if it has no cookie."""
    answer_retention_seconds: Seconds = 300
    """How long such an answer can still be attached to after its end."""


class HistorySettings(Section):
    """``[history]``: the chats of the page's visitors."""

    enabled: bool = True
    """Keep chats on the server, so that no answer is lost. If not, the page keeps them in the visitor's browser."""
    url: Text | None = None
    """Database, as SQLAlchemy writes it: "sqlite:////var/lib/chats.sqlite3", "postgresql://user:password@host/name".
    Unset = the SQLite file history.sqlite3 in ``engine.data_dir``."""
    expire_days: Annotated[int, Field(ge=1, le=36500)] | None = None
    """Chats in which nothing was written for so many days are deleted. Unset = never."""
    max_chats: Annotated[int, Field(ge=1)] = 1000
    """Chats of one visitor."""
    max_chat_messages: Annotated[int, Field(ge=2)] = 1000
    """Messages of one chat, all its branches together."""
    max_chat_chars: Annotated[int, Field(ge=1000, le=16 * 1024 * 1024)] = 2_000_000
    """Characters of all messages of one chat."""
    max_file_bytes: Annotated[int, Field(ge=1024 * 1024)] = 16 * 1024**3
    """Size of the SQLite file. (Other databases have limits of their own.)"""


class ApiKeySettings(Section):
    """``[[api.keys]]``: a key of the APIs; ``petals-chat keys add`` makes one."""

    name: Text
    """Whose key it is. Names are not secret: the log and clients may read them."""
    hash: Annotated[
        str,
        Field(
            pattern=r"^sha256:[0-9a-f]{64}$",
            json_schema_extra={"wording": 'like "sha256:..." with 64 hexadecimal digits'},
        ),
    ]
    """The key's SHA-256; the key itself is written nowhere."""
    models: tuple[Text, ...] | None = None
    """Keys of the models that it may use. Unset = all."""
    requests_per_minute: Annotated[int, Field(ge=0)] | None = None
    """Overrides ``api.requests_per_minute``."""
    tokens_per_minute: Annotated[int, Field(ge=0)] | None = None
    """Overrides ``api.tokens_per_minute``."""
    concurrent_generations: Annotated[int, Field(ge=0)] | None = None
    """Overrides ``api.concurrent_generations``."""


class ApiSettings(Section):
    """``[api]``: who may use the APIs, and how much. Limits are those of one key; without a key, of one address."""

    keys: tuple[ApiKeySettings, ...] = ()
    """Those who may use the APIs. Empty = everybody who reaches the server."""
    requests_per_minute: Annotated[int, Field(ge=0)] = 0
    """Generations begun in a minute; 0 = no limit."""
    tokens_per_minute: Annotated[int, Field(ge=0)] = 0
    """Tokens of prompts and answers in a minute; 0 = no limit."""
    concurrent_generations: Annotated[int, Field(ge=0)] = 0
    """Generations at once; 0 = no limit."""


class SwarmSettings(Section):
    """``[swarm]``: which Petals swarm serves the models, and the host that is started if none does."""

    initial_peers: Literal["public"] | tuple[Multiaddress, ...] = ()
    """Addresses of known members of the swarm, or "public". Empty = a private swarm of this machine."""
    dht_prefix: DhtPrefix | None = None
    """Name of a model's blocks in the swarm. Unset = Petals' own rule for the model."""
    max_retries: Annotated[int, Field(ge=1, le=100)] = 4
    """Attempts at one step before it fails."""
    request_timeout_seconds: Seconds = 180
    """Time for one step in the swarm."""
    connect_timeout_seconds: Seconds = 10
    """Time for reaching a server."""
    update_period_seconds: Seconds = 15
    """How often the list of servers is refreshed."""
    prefill_chunk_tokens: Annotated[int, Field(ge=1)] = 512
    """Longest piece of a prompt sent as one step. Between two pieces others have their turn."""
    cache_idle_timeout_seconds: Seconds = 60
    """Attention caches that are not used for this time are given back; the session stays, and fills them again
    when it goes on."""
    show_join_command: bool = False
    """Show everybody who can open the page how a machine is added to a private swarm. Who adds one can read what is
    asked there, and change the answers. (The public swarm is open to all anyway.)"""
    host_address: str = "127.0.0.1"
    """Address on which the started host accepts other machines; the default accepts none."""
    host_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """TCP port of the started host; 0 = any free one. The second private model has the next port, etc."""
    host_cache_tokens: Annotated[int, Field(ge=64)] = 16384
    """Tokens for which the started host keeps attention caches, all sessions together."""


def _user_data_dir() -> Path:
    try:
        home = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    except RuntimeError:  # a service user without a home
        home = Path(tempfile.gettempdir())
    return home / "petals-chat"


class EngineSettings(Section):
    """``[engine]``: the processes that hold embeddings and LM heads, and the started host."""

    device: Device = Device.AUTO
    """Where to compute."""
    dtype: Dtype = Dtype.AUTO
    """Precision."""
    head: HeadWeights = HeadWeights.AUTO
    """How a CPU that computes in float32 has a 16-bit LM head: "mapped" from the file and converted as it is used,
    "copied" as float32, which takes twice the memory, or "auto", whichever is faster by a measurement at the start."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of one process; 0 = as many as there are CPUs that it may use, one for a small model."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes for each model, among which its sessions are spread. They share the memory of 16-bit weights."""
    reuse_prefixes: bool = True
    """A request without a session goes on from the context of an earlier one of the same client, if its text
    extends that one's."""
    start_timeout_seconds: Seconds = 3600
    """Time for a model to load, downloads included."""
    data_dir: Path = Field(default_factory=_user_data_dir)
    """Where identities of hosts, built models and the visitors' chats are kept. Unset = petals-chat in the user's
    data directory (XDG_DATA_HOME, else ~/.local/share)."""


class GenerationDefaults(Section):
    """Sampling settings that the page and the terminal chat start with."""

    do_sample: bool = True
    """Draw the next token; false = always take the likeliest."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.6
    """Higher = more varied. 0 = always the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw among this many likeliest tokens; 0 = off."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Draw among the likeliest tokens that together have this probability; 1 = off."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Above 1, tokens that the session already has become less likely; 1 = off."""


class ChatSettings(Section):
    """How the page and the terminal chat word a conversation with the model, and its limits."""

    max_session_length: Annotated[int, Field(ge=16)] = 8192
    """Tokens of one session, prompt and answers together."""
    sep_token: str = "###"  # noqa: S105 - a token of text
    """Stands between the turns."""
    stop_token: Text = "###"  # noqa: S105
    """Ends an answer."""
    extra_stop_sequences: tuple[Text, ...] = ("</s>",)
    """End an answer too."""
    template: Text | None = None
    """Jinja template that words chats of the OpenAI-compatible API. Unset = the tokenizer's own; if it has none,
    turns are separated by ``sep_token``."""
    generation: GenerationDefaults = GenerationDefaults()
    """What the page and the terminal chat start with."""
    sample_questions: Annotated[tuple[Text, ...], Field(max_length=12)] = ()
    """What the page offers to ask in a new chat."""


class ModelSettings(Section):
    """One served model. Its key is the name of its table: ``[models."owner/name"]``."""

    key: Text
    """What clients ask for. It is not written inside the table: it is the table's name."""
    repository: Text
    """Hub name, or local directory, of the checkpoint. Unset = the key."""
    revision: Text | None = None
    """Branch, tag or commit on the hub."""
    adapter: Text | None = None
    """Hub name or local directory of a PEFT adapter, which the swarm's hosts must hold too."""
    aliases: tuple[Text, ...] = ()
    """Other names under which clients may ask for the model."""
    public_api: bool = True
    """False = only this server's own page may use the model (the licence of some models demands it)."""
    name: Text
    """What people read. Unset = the last part of the key."""
    family: Text = "Other"
    """Heading under which the page lists the model."""
    model_card: str | None = None
    """URL of its description. Unset = the README.md in the repository, if that is a local directory."""
    license: str | None = None
    """URL of its licence."""
    initial_peers: Literal["public"] | tuple[Multiaddress, ...] | None = None
    """Overrides ``swarm.initial_peers``; [] = a private swarm on this machine."""
    dht_prefix: DhtPrefix | None = None
    """Overrides ``swarm.dht_prefix``."""
    device: Device | None = None
    """Overrides ``engine.device``."""
    dtype: Dtype | None = None
    """Overrides ``engine.dtype``."""
    chat: ChatSettings = ChatSettings()


class Settings(Section):
    """The whole configuration; ``models`` in the order of the families, the default model first."""

    server: ServerSettings = ServerSettings()
    limits: LimitSettings = LimitSettings()
    api: ApiSettings = ApiSettings()
    swarm: SwarmSettings = SwarmSettings()
    engine: EngineSettings = EngineSettings()
    history: HistorySettings = HistorySettings()
    models: tuple[ModelSettings, ...] = ()
