"""The messages between the gateway and an engine worker, both directions, and their encoding.

Each message is a tagged msgspec struct. The gateway sends commands in the imperative (`OpenSession`); the
worker answers each with events in the past tense (`SessionOpened`) that repeat the command's ``request_id``,
or with one `RequestFailed`.

Flow control: a `Generate` may be answered by many `ChunkGenerated`. The worker sends at most
``Generate.window`` chunks more than were acknowledged with `AcknowledgeChunks`, and pauses the generation at
that point; so neither side ever buffers more than a window per request.
"""

from __future__ import annotations

import enum
from typing import Any, Literal

import msgspec

from petals_chat.errors import ErrorReport


class SamplingParameters(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen; meanings and order are those of ``transformers``' ``generate()``."""

    do_sample: bool = False
    temperature: float = 1.0
    """Greater than 0; a request for 0 is a request for ``do_sample=False``."""
    top_k: int = 0
    """0 = off."""
    top_p: float = 1.0
    """1.0 = off."""
    repetition_penalty: float = 1.0
    """1.0 = off. Counts all tokens of the session, the prompt included."""
    seed: int | None = None
    """None = fresh randomness."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that it was generated; 0.0 = off."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were generated; 0.0 = off."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these tokens."""
    top_logprobs: int | None = None
    """Tell the log probability of each token, and of so many of the likeliest in its place; None = of none."""
    grammar: str | None = None
    """What the whole text must match, in the Lark syntax of llguidance; None = any text."""


class FinishReason(enum.StrEnum):
    """Why a generation ended."""

    STOP_SEQUENCE = "stop_sequence"
    END_OF_SEQUENCE = "end_of_sequence"
    LENGTH = "length"
    """The number of tokens that was asked for is reached (or what fits of it, in a single-chunk request)."""
    CONTEXT_FULL = "context_full"
    """The session has no room for another token, although more were asked for."""
    CANCELLED = "cancelled"


class StartWorker(msgspec.Struct, frozen=True, tag="start_worker"):
    """What to load and which swarm to join; sent once, before anything else. Times in seconds."""

    repository: str
    revision: str | None
    adapter: str | None
    initial_peers: Literal["public"] | tuple[str, ...]
    dht_prefix: str | None
    device: str
    dtype: str
    threads: int
    max_session_length: int
    prefill_chunk_tokens: int
    max_waiting: int
    """Generations that may wait for room in the swarm's attention caches."""
    queue_timeout: float
    cache_idle_timeout: float
    """After this time without use a session's attention caches are given back; the session stays."""
    prefix_idle_timeout: float
    """How long the context of a stateless request is kept for one that extends it; 0 = not at all."""
    max_retries: int
    request_timeout: float
    connect_timeout: float
    update_period: float
    head: str = "auto"
    """A value of `petals_chat.settings.HeadWeights`."""
    chat_template: str | None = None
    """Jinja, in place of the tokenizer's own; see `petals_chat.engine.chat_prompts`."""
    chat_separator: str = "\n"
    """Stands between the turns of a chat if there is no template at all."""


class OpenSession(msgspec.Struct, frozen=True, tag="open_session"):
    """Open a session of at most ``max_length`` tokens, under an id that the gateway chose."""

    request_id: int
    session_id: str
    max_length: int
    owner: str = ""
    """Whose it is. Owners take turns where there is a queue. What stands before a line break, if there is one, is a
    client who may be several owners."""
    is_stateless: bool = False
    """It is for one request, which may go on from the context of an earlier one of the same owner."""


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a function by the assistant."""

    id: str
    name: str
    arguments: str
    """JSON."""


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Of the assistant."""
    tool_call_id: str | None = None
    """What a message of role "tool" answers."""


class ChatPrompt(msgspec.Struct, frozen=True, omit_defaults=True):
    """A chat, which the model's chat template turns into the prompt for the assistant's next message."""

    messages: tuple[ChatMessage, ...]
    continue_final_message: bool = False
    """The prompt ends within the last message, the assistant's, so that what is generated goes on from there."""
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the assistant may call, in the form that chat templates take."""
    answer_prefix: str = ""
    """What the assistant's message begins with, special tokens included; the generated text follows it."""


class GenerationRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to generate in a session.

    Generation ends at the first of: a stop sequence, the model's end of sequence, ``max_new_tokens`` new
    tokens, ``max_length`` tokens of context, the end of the session's context.
    """

    inputs: str | ChatPrompt | tuple[int, ...] | None
    """New text, or its token ids, added to the session's context; None = continue from where the session is."""
    sampling: SamplingParameters = SamplingParameters()
    max_new_tokens: int | None = None
    """None = no limit of its own."""
    max_length: int | None = None
    """Limit on the tokens of the whole context, prompt included; None = no limit of its own."""
    chunk_tokens: int | None = None
    """One chunk for this many tokens; None = a single one at the end, with everything."""
    progress_tokens: int | None = None
    """Where chunks have more tokens, tell of each so many by a chunk without text; None = do not."""
    stop_sequences: tuple[str, ...] = ()
    """Matched on the generated text, across token borders; the matching text is part of the output."""
    hide_end_of_sequence: bool = False
    """Leave the text of the token that ends the sequence out of the output."""
    prompt_logprobs: int | None = None
    """Tell the log probability of each token of a session's first input, and of so many of the likeliest in its
    place; None = of none."""


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Generate in the session; answered by one or more `ChunkGenerated`."""

    request_id: int
    session_id: str
    request: GenerationRequest
    window: int
    """How many chunks may be on their way without having been acknowledged."""


class AcknowledgeChunks(msgspec.Struct, frozen=True, tag="acknowledge_chunks"):
    """The client has taken ``count`` more chunks of the generation ``request_id``."""

    request_id: int
    count: int


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """End the generation ``request_id`` now; it is answered by a last chunk with `FinishReason.CANCELLED`.

    A text or tokens that wait to be encoded or decoded under this id are forgotten, without an answer.
    """

    request_id: int


class CloseSession(msgspec.Struct, frozen=True, tag="close_session"):
    """End the session, cancelling what runs in it. An unknown id is no error: closing is idempotent."""

    request_id: int
    session_id: str


class EncodeText(msgspec.Struct, frozen=True, tag="encode_text"):
    """Turn a text or a chat into token ids; answered by `TextEncoded`."""

    request_id: int
    inputs: str | ChatPrompt
    add_special_tokens: bool
    """Whether a text begins with its special tokens (BOS)."""


class DecodeTokens(msgspec.Struct, frozen=True, tag="decode_tokens"):
    """Turn token ids into text; answered by `TokensDecoded`."""

    request_id: int
    tokens: tuple[int, ...]


class DescribeTokenizer(msgspec.Struct, frozen=True, tag="describe_tokenizer"):
    """Say what the tokenizer is; answered by `TokenizerDescribed`."""

    request_id: int


class GiveBackCaches(msgspec.Struct, frozen=True, tag="give_back_caches"):
    """Another worker waits for room on the same servers: give back attention caches that nobody uses, unless contexts
    wait here too.

    Sent again and again as long as it waits. Has no answer.
    """

    recalls: bool
    """This worker holds more. Unused ones are given back in any case, and if there are none, those of a context that
    has had its time slice."""


class CheckReachability(msgspec.Struct, frozen=True, tag="check_reachability"):
    """Ask a member of the swarm for a sign of life; answered by `ReachabilityChecked`, within seconds."""

    request_id: int
    peer_id: str


Command = (
    StartWorker
    | OpenSession
    | Generate
    | AcknowledgeChunks
    | Cancel
    | CloseSession
    | EncodeText
    | DecodeTokens
    | DescribeTokenizer
    | GiveBackCaches
    | CheckReachability
)


class SwarmPeer(msgspec.Struct, frozen=True):
    """A Petals server, as it describes itself in the DHT, with the blocks ``[start, end)`` it announces.

    Rates are None where the server has not measured them.
    """

    peer_id: str
    start: int
    end: int
    state: str
    """"online", "joining" (it loads its blocks), or "offline" (it has left, or does not answer)."""
    throughput: float | None = None
    """Tokens per second that all its blocks can process for many clients, network included."""
    inference_rps: float | None = None
    """Steps of one token per second, through one block."""
    forward_rps: float | None = None
    """Tokens of long inputs per second, through one block."""
    network_rps: float | None = None
    """Tokens per second that its network can take."""
    public_name: str | None = None
    version: str | None = None
    cache_tokens_left: int | None = None
    """Tokens for which there is room in its attention caches, all sessions together."""
    torch_dtype: str | None = None
    quant_type: str | None = None
    adapters: tuple[str, ...] = ()
    using_relay: bool | None = None
    """Whether others reach it only by way of a relay."""
    ping_seconds: float | None = None
    """How long the worker waited for its answer; None while it has not answered."""


class SwarmStatus(msgspec.Struct, frozen=True):
    """Which servers hold which blocks, as a worker saw it at the time ``seen_at``."""

    servers: tuple[SwarmPeer, ...] = ()
    """In the order of their blocks; of a very large swarm not all, see `petals_chat.swarm.monitor`."""
    block_servers: tuple[int, ...] = ()
    """For each block, the number of servers online that hold it; of all servers. Empty = not known yet."""
    full_blocks: tuple[int, ...] = ()
    """Blocks that no server online with room for another context holds."""
    initial_peers: dict[str, bool] = {}
    """By peer id, whether it answers."""
    seen_at: float = 0.0
    """Seconds since 1970."""

    @property
    def missing_blocks(self) -> tuple[int, ...]:
        """Blocks that no server online holds."""
        return tuple(block for block, count in enumerate(self.block_servers) if count == 0)

    @property
    def rarest_block_servers(self) -> int:
        """How many servers online hold the rarest block."""
        return min(self.block_servers, default=0)

    @property
    def rarest_blocks(self) -> tuple[int, ...]:
        """The blocks that so few servers hold."""
        least = self.rarest_block_servers
        return tuple(block for block, count in enumerate(self.block_servers) if count == least)

    @property
    def online_servers(self) -> tuple[SwarmPeer, ...]:
        """Those of ``servers`` that hold their blocks ready."""
        return tuple(server for server in self.servers if server.state == "online")


class ToolStyle(enum.StrEnum):
    """How models write that they call a function."""

    HERMES = "hermes"
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen."""
    LLAMA3 = "llama3"
    """``{"name": ..., "parameters": {...}}``: Llama 3.1 and later."""
    MISTRAL = "mistral"
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``"""


class Reachability(msgspec.Struct, frozen=True):
    """Whether a member of the swarm answers."""

    is_reachable: bool
    message: str
    """What was seen, for people."""


class WorkerStarted(msgspec.Struct, frozen=True, tag="worker_started"):
    """The worker has its weights and reached the swarm; it takes commands from now on."""

    num_blocks: int
    hidden_size: int
    vocab_size: int
    dtype: str
    device: str
    max_session_length: int
    """Tokens of context that a session may have."""
    tool_style: ToolStyle | None = None
    """How the model's chat template writes calls of functions; None if it takes no functions."""
    dht_prefix: str = ""
    """Name of the model's blocks in the swarm."""


class WorkerFailed(msgspec.Struct, frozen=True, tag="worker_failed"):
    """The worker cannot start, and ends."""

    error: ErrorReport


class SessionOpened(msgspec.Struct, frozen=True, tag="session_opened"):
    """Answer to `OpenSession`."""

    request_id: int


class SessionClosed(msgspec.Struct, frozen=True, tag="session_closed"):
    """Answer to `CloseSession`; the swarm's memory for it is free again."""

    request_id: int


class TokenProbability(msgspec.Struct, frozen=True, array_like=True):
    """How probable a token was, by the model alone: before penalties, temperature and what else was asked for."""

    text: bytes
    """Its text; where it is a part of a character, some of that character's bytes."""
    logprob: float | None
    """None for the first token of a prompt."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A generated token, and the likeliest tokens in its place, the likeliest first."""

    chosen: TokenProbability
    top: tuple[TokenProbability, ...]


class ChunkGenerated(msgspec.Struct, frozen=True, tag="chunk_generated", omit_defaults=True):
    """Part of the answer to `Generate`; the last one has a ``finish_reason``.

    A chunk never cuts a character: tokens are held back until they decode.
    """

    request_id: int
    text: str
    token_count: int
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    """Tokens of the request's own input; given in the last chunk."""
    cached_tokens: int = 0
    """Those of them that were processed for an earlier request; given in the last chunk."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if they were asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Those of some of the prompt's tokens, if they were asked for; they come before all text."""
    tokens_ahead: int = 0
    """Tokens that come with the next chunk that has text; told only if the request has ``progress_tokens``."""
    context_limit: int | None = None
    """With `FinishReason.CONTEXT_FULL`: what the machines of the swarm allow, if that is less than the session."""


class EncodedText(msgspec.Struct, frozen=True):
    """Token ids, and the bytes of each."""

    tokens: tuple[int, ...]
    texts: tuple[bytes, ...]


class TokenizerDescription(msgspec.Struct, frozen=True):
    """What a tokenizer is."""

    kind: str
    """Name of its class in transformers."""
    vocab_size: int
    """With the tokens that were added."""
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str
    """Jinja; the one that chats are worded by."""


class TextEncoded(msgspec.Struct, frozen=True, tag="text_encoded"):
    """Answer to `EncodeText`."""

    request_id: int
    text: EncodedText


class TokensDecoded(msgspec.Struct, frozen=True, tag="tokens_decoded"):
    """Answer to `DecodeTokens`."""

    request_id: int
    text: str


class TokenizerDescribed(msgspec.Struct, frozen=True, tag="tokenizer_described"):
    """Answer to `DescribeTokenizer`."""

    request_id: int
    description: TokenizerDescription


class GenerationQueued(msgspec.Struct, frozen=True, tag="generation_queued"):
    """A `Generate` waits for room in the swarm; sent when that begins, and whenever the place changes."""

    request_id: int
    place: int
    """1 = next."""


class RequestFailed(msgspec.Struct, frozen=True, tag="request_failed"):
    """The command ``request_id`` failed; no other answer to it follows."""

    request_id: int
    error: ErrorReport


class ReachabilityChecked(msgspec.Struct, frozen=True, tag="reachability_checked"):
    """Answer to `CheckReachability`."""

    request_id: int
    reachability: Reachability


class StatusReported(msgspec.Struct, frozen=True, tag="status_reported"):
    """What the worker knows, sent every few seconds without being asked."""

    open_sessions: int
    running_generations: int
    tokens_generated: int
    """Since the worker started, as all counts here."""
    swarm: SwarmStatus = SwarmStatus()
    resident_sessions: int = 0
    """Contexts that hold attention caches."""
    waiting_generations: int = 0
    """Those that wait for room in the attention caches."""
    tokens_processed: int = 0
    """Sent through the swarm: prompts, generated tokens and replays."""
    tokens_replayed: int = 0
    prefix_hits: int = 0
    """Requests that went on from the context of an earlier one."""
    prefix_tokens: int = 0
    """Tokens that did not have to be processed because of that."""
    caches_given_back: int = 0
    """Attention caches that made room for others, or were not used for long."""


Event = (
    WorkerStarted
    | WorkerFailed
    | SessionOpened
    | SessionClosed
    | ChunkGenerated
    | GenerationQueued
    | TextEncoded
    | TokensDecoded
    | TokenizerDescribed
    | RequestFailed
    | ReachabilityChecked
    | StatusReported
)

_encoder = msgspec.msgpack.Encoder()
_command_decoder = msgspec.msgpack.Decoder(Command)
_event_decoder = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    """The message as the body of a frame."""
    return _encoder.encode(message)


def decode_command(body: bytes) -> Command:
    """The command in ``body``. Raises ``msgspec.MsgspecError`` if it is none."""
    command: Command = _command_decoder.decode(body)
    return command


def decode_event(body: bytes) -> Event:
    """The event in ``body``. Raises ``msgspec.MsgspecError`` if it is none."""
    event: Event = _event_decoder.decode(body)
    return event
