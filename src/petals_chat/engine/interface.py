"""What the gateway needs from an engine: open sessions, generate in them, know the models' states.

`petals_chat.engine.supervisor.ProcessEngine` is the real one; tests of the gateway use a fake.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

import msgspec

from petals_chat.errors import ErrorReport
from petals_chat.protocol.messages import (
    ChatPrompt,
    EncodedText,
    FinishReason,
    GenerationRequest,
    Reachability,
    StatusReported,
    SwarmStatus,
    TokenizerDescription,
    TokenLogprobs,
    WorkerStarted,
)

OWNER_SEPARATOR = "\n"
"""In an owner's name between the client and which of the client's visitors it is."""


def client_of(owner: str) -> str:
    """Who stands behind an owner. Limits are counted by it, since anybody can be as many visitors as he likes."""
    return owner.partition(OWNER_SEPARATOR)[0]


class Chunk(msgspec.Struct, frozen=True):
    """A piece of generated text that cuts no character; the last one has a ``finish_reason``.

    While a generation waits for room in the swarm's attention caches, chunks without text tell its place.
    """

    text: str
    token_count: int
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's tokens, those that were processed for an earlier request."""
    queue_place: int | None = None
    """1 = next."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if they were asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of the next tokens of the prompt, if they were asked for; they come before all text."""
    tokens_ahead: int = 0
    """Tokens that come with the next chunk that has text; told only if the request has ``progress_tokens``."""
    context_limit: int | None = None
    """With `FinishReason.CONTEXT_FULL`: what the machines of the swarm allow, if that is less than the session."""


class ModelState(enum.StrEnum):
    """How a model is. The page, the errors and /readyz use the same words."""

    LOADING = "loading"
    """Its worker is starting, for the first time or again."""
    READY = "ready"
    FULL = "full"
    """It answers, but the servers' attention caches are in use: generations wait for room."""
    BROKEN = "broken"
    """Blocks are missing in the swarm."""
    UNAVAILABLE = "unavailable"
    """Its worker cannot start; it is tried again and again."""

    @property
    def can_answer(self) -> bool:
        """Whether a generation that begins now will have an answer."""
        return self in (ModelState.READY, ModelState.FULL)


class ModelStatus(msgspec.Struct, frozen=True):
    """A snapshot of what is known of a model; never older than the worker's last report."""

    state: ModelState
    error: ErrorReport | None = None
    """Why the model is unavailable."""
    missing_blocks: tuple[int, ...] = ()
    worker: WorkerStarted | None = None
    report: StatusReported | None = None
    join_command: str | None = None
    """With which another machine adds itself to the swarm; None if that is not for everybody to know."""

    @property
    def swarm(self) -> SwarmStatus:
        """The servers, as far as they are known."""
        return self.report.swarm if self.report else SwarmStatus()


class EngineSession(Protocol):
    """One inference session: a context that grows with each generation."""

    @property
    def session_id(self) -> str:
        """A random UUID."""

    @property
    def max_length(self) -> int:
        """Tokens of context that the session can hold."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Generate; one generation at a time, a second one waits for the first.

        Closing the iterator ends the generation. Not taking from it pauses the generation.

        Raises:
            PetalsChatError: while iterating; the session stays usable unless its worker was lost.
        """

    async def close(self) -> None:
        """Free the session everywhere, ending what runs in it. Closing twice is no error."""


class EngineTokenizer(Protocol):
    """What a model's tokenizer knows.

    Everything here raises `ModelLoadingError` or `ModelUnavailableError` if there is no worker to ask.
    """

    async def encode(self, inputs: str | ChatPrompt, *, add_special_tokens: bool) -> EncodedText:
        """Token ids of a text, or of a chat as the model gets it.

        Args:
            add_special_tokens: whether a text begins with its special tokens (BOS); a chat's template says it itself.

        Raises:
            InvalidParameterError: the model's chat template refuses the chat.
        """

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            InvalidParameterError: there is no such token id.
        """

    async def describe(self) -> TokenizerDescription:
        """What the tokenizer is."""


class Engine(Protocol):
    """All served models."""

    @property
    def statuses(self) -> Mapping[str, ModelStatus]:
        """By model key. Reading it never waits."""

    async def open_session(
        self, model_key: str, max_length: int, *, owner: str = "", is_stateless: bool = False
    ) -> EngineSession:
        """Open a session of at most ``max_length`` tokens.

        Args:
            owner: whose it is; owners take turns where there is a queue. See `client_of`.
            is_stateless: it is for one request, which may go on from the context of an earlier one of its owner.

        Raises:
            ModelLoadingError, ModelUnavailableError: there is no worker to open it.
            MaximumLengthExceededError: more tokens than the model allows.
        """

    def tokenizer(self, model_key: str) -> EngineTokenizer:
        """The model's tokenizer."""


class SwarmEngine(Engine, Protocol):
    """An engine that is a member of the models' swarms."""

    async def check_reachability(self, peer_id: str) -> Reachability:
        """Ask any member of the swarms for a sign of life; takes some seconds at most.

        Raises:
            ModelLoadingError, ModelUnavailableError: there is no worker to ask from.
        """
