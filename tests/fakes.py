"""A fake of the engine: recites prepared tokens, keeps to the engine's interface, and can be made to fail."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence

import msgspec

from petals_chat.engine.interface import Chunk, ModelState, ModelStatus
from petals_chat.errors import InvalidParameterError, MaximumLengthExceededError, PetalsChatError
from petals_chat.protocol.messages import (
    ChatPrompt,
    EncodedText,
    FinishReason,
    GenerationRequest,
    Reachability,
    StatusReported,
    SwarmPeer,
    SwarmStatus,
    TokenizerDescription,
    WorkerStarted,
)

END = "</s>"
"""As a token: the model's end of sequence."""


def worker_started(max_session_length: int = 2048, num_blocks: int = 4) -> WorkerStarted:
    values = {"num_blocks": num_blocks, "max_session_length": max_session_length}
    texts = {"dtype": "float32", "device": "cpu", "dht_prefix": "model-hf"}
    sizes = {"hidden_size": 64, "vocab_size": 256}
    return msgspec.convert({**values, **texts, **sizes}, WorkerStarted)


def status_reported(*spans: tuple[int, int], tokens_generated: int = 0) -> StatusReported:
    return StatusReported(0, 0, tokens_generated, swarm_status(*spans))


def swarm_status(
    *spans: tuple[int, int], num_blocks: int = 4, full_blocks: tuple[int, ...] = ()
) -> SwarmStatus:
    """An online server for each span, as seen just now."""
    return SwarmStatus(
        servers=tuple(SwarmPeer(f"peer{index}", *span, "online") for index, span in enumerate(spans)),
        block_servers=tuple(sum(start <= block < end for start, end in spans) for block in range(num_blocks)),
        full_blocks=full_blocks,
        initial_peers={"peer0": True},
        seen_at=time.time(),
    )


def ready(max_session_length: int = 2048) -> ModelStatus:
    worker = worker_started(max_session_length)
    return ModelStatus(ModelState.READY, worker=worker, report=status_reported((0, worker.num_blocks)))


class FakeEngine:
    """An `Engine` whose sessions generate " t0", " t1", ... or ``tokens``, each token a word of context.

    Args:
        tokens: recited by each session from its beginning, over its generations; then comes the end of
            sequence. None = without end.
        max_session_length: of every model, in tokens.
    """

    def __init__(
        self, *model_keys: str, tokens: Sequence[str] | None = None, max_session_length: int = 2048
    ) -> None:
        self.statuses = {key: ready(max_session_length) for key in model_keys}
        self.tokens = tokens
        self.may_generate = asyncio.Event()
        """Clear it, and generations stand still before their next token."""
        self.may_generate.set()
        self.may_open = asyncio.Event()
        """Clear it, and sessions stand still before they are open."""
        self.may_open.set()
        self.open_error: PetalsChatError | None = None
        self.generate_error: Exception | None = None
        """Raised before the next token."""
        self.queue_place: int | None = None
        """Told by generations before their first token."""
        self.sessions: dict[str, FakeSession] = {}
        self.requests: list[GenerationRequest] = []
        self.opened: list[tuple[str, int]] = []
        self.owners_of_stateless: list[str] = []
        self.running = 0
        self.tokens_pulled = 0
        self.reachability = Reachability(True, "it answered within 3 ms")
        self.peers_checked: list[str] = []
        self.may_check = asyncio.Event()
        """Clear it, and checks of reachability stand still."""
        self.may_check.set()

    async def open_session(
        self, model_key: str, max_length: int, *, owner: str = "", is_stateless: bool = False
    ) -> FakeSession:
        await self.may_open.wait()
        if self.open_error is not None:
            raise self.open_error
        worker = self.statuses[model_key].worker
        assert worker is not None
        if max_length > worker.max_session_length:
            raise MaximumLengthExceededError(f"{max_length} is too long", limit=worker.max_session_length)
        session = FakeSession(self, max_length)
        self.sessions[session.session_id] = session
        self.opened.append((model_key, max_length))
        if is_stateless:
            self.owners_of_stateless.append(owner)
        return session

    async def check_reachability(self, peer_id: str) -> Reachability:
        self.peers_checked.append(peer_id)
        await self.may_check.wait()
        return self.reachability

    def tokenizer(self, model_key: str) -> FakeTokenizer:
        return FakeTokenizer()


class FakeTokenizer:
    """Each character is a token, its code point the id."""

    async def encode(self, inputs: str | ChatPrompt, *, add_special_tokens: bool) -> EncodedText:
        if isinstance(inputs, ChatPrompt):
            inputs = "".join(message.content for message in inputs.messages)
        text = f"^{inputs}" if add_special_tokens else inputs
        return EncodedText(tuple(map(ord, text)), tuple(character.encode() for character in text))

    async def decode(self, tokens: Sequence[int]) -> str:
        if max(tokens, default=0) > sys.maxunicode:
            raise InvalidParameterError("inputs", "there is no such character")
        return "".join(map(chr, tokens)).encode(errors="replace").decode()

    async def describe(self) -> TokenizerDescription:
        return TokenizerDescription("FakeTokenizer", 256, "^", END, None, None, "{{ messages }}")


class FakeSession:
    def __init__(self, engine: FakeEngine, max_length: int) -> None:
        self._engine = engine
        self.session_id = str(uuid.uuid4())
        self.max_length = max_length
        self._length = 0
        self._prompt_tokens = 0
        self._turn = asyncio.Lock()
        self._closed = asyncio.Event()
        self._tokens: Iterator[str] = (
            (f" t{number}" for number in itertools.count())
            if engine.tokens is None
            else itertools.chain(engine.tokens, itertools.repeat(END))
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        async with self._turn:
            self._engine.requests.append(request)
            self._engine.running += 1
            try:
                self._prompt_tokens = _count_words(request.inputs)
                self._length += self._prompt_tokens
                if self._engine.queue_place is not None:
                    yield Chunk("", 0, queue_place=self._engine.queue_place)
                async for chunk in self._chunks(request):
                    yield chunk
            finally:
                self._engine.running -= 1

    async def close(self) -> None:
        self._closed.set()
        self._engine.sessions.pop(self.session_id, None)

    async def _chunks(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        generated = ""
        chunk = Chunk("", 0)
        for count in itertools.count(1):
            reason = self._end_before_a_token(request, count)
            if reason is None:
                token = await self._next_token()
                if token is None:
                    reason = FinishReason.CANCELLED
                else:
                    is_hidden = token == END and request.hide_end_of_sequence
                    generated += token
                    chunk = Chunk(chunk.text + ("" if is_hidden else token), chunk.token_count + 1)
                    reason = _end_after(token, generated, request.stop_sequences)
            if reason is not None:
                yield Chunk(chunk.text, chunk.token_count, reason, self._prompt_tokens)
                return
            if request.chunk_tokens is not None and chunk.token_count == request.chunk_tokens:
                yield Chunk(chunk.text, chunk.token_count, None, self._prompt_tokens)
                chunk = Chunk("", 0)
            elif request.progress_tokens is not None and chunk.token_count % request.progress_tokens == 0:
                yield Chunk("", 0, None, self._prompt_tokens, tokens_ahead=request.progress_tokens)

    def _end_before_a_token(self, request: GenerationRequest, count: int) -> FinishReason | None:
        if request.max_new_tokens is not None and count > request.max_new_tokens:
            return FinishReason.LENGTH
        if request.max_length is not None and self._length >= request.max_length:
            return FinishReason.LENGTH
        if self._length >= self.max_length:
            return FinishReason.LENGTH if request.chunk_tokens is None else FinishReason.CONTEXT_FULL
        return None

    async def _next_token(self) -> str | None:
        """The next token, or None if the session is closed before it comes."""
        await _first(self._engine.may_generate, self._closed)
        if self._closed.is_set():
            return None
        if self._engine.generate_error is not None:
            raise self._engine.generate_error
        await asyncio.sleep(0)  # a real engine is never faster than its socket
        self._length += 1
        self._engine.tokens_pulled += 1
        return next(self._tokens)


def _count_words(inputs: str | ChatPrompt | tuple[int, ...] | None) -> int:
    if isinstance(inputs, tuple):
        return len(inputs)
    texts = [message.content for message in inputs.messages] if isinstance(inputs, ChatPrompt) else [inputs]
    return sum(len(text.split()) for text in texts if text)


def _end_after(token: str, generated: str, stop_sequences: Iterable[str]) -> FinishReason | None:
    if token == END:
        return FinishReason.END_OF_SEQUENCE
    if any(generated.endswith(stop) for stop in stop_sequences):
        return FinishReason.STOP_SEQUENCE
    return None


async def _first(*events: asyncio.Event) -> None:
    if any(event.is_set() for event in events):
        return
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
