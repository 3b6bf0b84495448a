"""An inference session in the worker: its token history, and generation in it.

A session *is* its token history. The attention caches in the swarm are a copy of it that can be lost or
dropped at any time and is rebuilt by replaying the history; `Session` alone decides when.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import torch

from petals_chat.engine.tokenizer import Tokenizer
from petals_chat.errors import InvalidParameterError, MaximumLengthExceededError
from petals_chat.generation.detokenize import IncrementalDetokenizer
from petals_chat.generation.sampling import TokenSampler
from petals_chat.generation.stopping import StopMatcher
from petals_chat.head.batcher import HeadBatcher
from petals_chat.head.modules import ClientModules
from petals_chat.protocol.messages import FinishReason, GenerationRequest

SWARM_ROOM_TOKENS = 256
"""Room for new tokens that a swarm session is opened with, unless the request asks for fewer: what clients allow
is often far more than what comes."""


class ChunkConsumer(Protocol):
    """Who takes the chunks of a generation."""

    cancelled: bool
    """True = nobody wants more; the generation ends after the step that is on its way."""

    async def take(
        self, text: str, token_count: int, finish_reason: FinishReason | None, prompt_tokens: int
    ) -> None:
        """Take a chunk; waits while the client is slow. The last chunk has a ``finish_reason``."""


class SwarmSession(Protocol):
    """Attention caches in the swarm; see `petals_chat.swarm.client.SwarmSession`."""

    max_length: int
    position: int

    async def step(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [1, tokens, hidden_size] through all blocks."""

    async def close(self) -> None:
        """Free the servers' memory."""


class Model:
    """What all sessions of a worker share.

    Args:
        prefill_chunk_tokens: longest piece of a prompt sent as one step.
        open_swarm_session: makes attention caches for a number of tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        modules: ClientModules,
        batcher: HeadBatcher,
        *,
        prefill_chunk_tokens: int,
        open_swarm_session: Callable[[int], SwarmSession],
    ) -> None:
        self.tokenizer = tokenizer
        self.modules = modules
        self.batcher = batcher
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.open_swarm_session = open_swarm_session
        self.tokens_generated = 0


class Session:
    """A context of at most ``max_length`` tokens that grows with each generation, one generation at a time."""

    def __init__(self, model: Model, max_length: int) -> None:
        self.max_length = max_length
        self._model = model
        self._tokens: list[int] = []
        self._swarm_session: SwarmSession | None = None
        self._detokenizer = IncrementalDetokenizer(model.tokenizer.decode)
        self._turn = asyncio.Lock()

    async def generate(self, request: GenerationRequest, consumer: ChunkConsumer) -> None:
        """Add the request's inputs and generate, waiting for an earlier generation to end.

        If it fails, the session is as it was before, and can be used again.

        Raises:
            RequestError: the request does not fit the session.
            SwarmError, CapacityError: the swarm cannot do it now.
        """
        async with self._turn:
            length_before = len(self._tokens)
            try:
                self._add_inputs(request)
                await self._generate(request, consumer, len(self._tokens) - length_before)
            except BaseException:
                del self._tokens[length_before:]
                await self._drop_swarm_session()
                raise

    async def close(self) -> None:
        """Free the swarm's memory, when the running generation has ended."""
        async with self._turn:
            await self._drop_swarm_session()

    def _add_inputs(self, request: GenerationRequest) -> None:
        if request.inputs is not None:
            self._tokens += self._model.tokenizer.encode(request.inputs, at_start=not self._tokens)
        if not self._tokens:
            raise InvalidParameterError("inputs", "a new session needs some text to begin with")
        limit = min(self.max_length, request.max_length or self.max_length)
        if len(self._tokens) >= limit:
            raise MaximumLengthExceededError(
                f"the context has {len(self._tokens)} tokens with this input, which leaves no room for an "
                f"answer within the {limit} tokens allowed",
                limit=limit,
            )
        if request.inputs is not None:
            self._detokenizer.start_after(self._tokens)

    async def _generate(
        self, request: GenerationRequest, consumer: ChunkConsumer, prompt_tokens: int
    ) -> None:
        model = self._model
        sampler = TokenSampler(request.sampling, model.modules.vocab_size, self._tokens)
        stop_matcher = StopMatcher(request.stop_sequences)
        text, generated, in_chunk = "", 0, 0
        finish_reason: FinishReason | None = None
        while finish_reason is None:
            hidden_state = await self._feed_swarm(request.max_new_tokens, consumer)
            if hidden_state is None:
                await consumer.take(text, in_chunk, FinishReason.CANCELLED, prompt_tokens)
                return
            token = await model.batcher.next_token(hidden_state, sampler)
            self._tokens.append(token)
            sampler.add(token)
            generated, in_chunk = generated + 1, in_chunk + 1
            model.tokens_generated += 1

            piece = self._detokenizer.add(token)
            stop_end = stop_matcher.add(piece) if piece else None
            text += piece[:stop_end]
            if stop_end is not None:
                finish_reason = FinishReason.STOP_SEQUENCE
            else:
                finish_reason = self._finish_reason(request, token, generated, consumer)
            chunk_is_full = request.chunk_tokens is not None and in_chunk >= request.chunk_tokens
            if finish_reason or (chunk_is_full and not self._detokenizer.holds_tokens):
                await consumer.take(text, in_chunk, finish_reason, prompt_tokens)
                text, in_chunk = "", 0

    def _finish_reason(
        self, request: GenerationRequest, token: int, generated: int, consumer: ChunkConsumer
    ) -> FinishReason | None:
        if token in self._model.tokenizer.end_of_sequence_ids:
            return FinishReason.END_OF_SEQUENCE
        if generated == request.max_new_tokens or len(self._tokens) == request.max_length:
            return FinishReason.LENGTH
        if len(self._tokens) >= self.max_length:
            return FinishReason.CONTEXT_FULL
        return FinishReason.CANCELLED if consumer.cancelled else None

    async def _feed_swarm(self, max_new_tokens: int | None, consumer: ChunkConsumer) -> torch.Tensor | None:
        """Send what the swarm has not seen of the history.

        Returns:
            The hidden state [hidden_size] of the history's last token; None if cancelled on the way to it.
        """
        if self._swarm_session is None or self._swarm_session.max_length < len(self._tokens):
            await self._drop_swarm_session()
            room = min(max_new_tokens or SWARM_ROOM_TOKENS, SWARM_ROOM_TOKENS)
            # A power of two: a session that grows is replayed once for each doubling, not for each request.
            size = 1 << (len(self._tokens) + room - 1).bit_length()
            self._swarm_session = self._model.open_swarm_session(min(size, self.max_length))
        swarm = self._swarm_session
        with torch.inference_mode():
            while True:
                end = min(swarm.position + self._model.prefill_chunk_tokens, len(self._tokens))
                outputs = await swarm.step(self._model.modules.embed(self._tokens[swarm.position : end]))
                if end == len(self._tokens):
                    return outputs[0, -1]
                if consumer.cancelled:
                    return None

    async def _drop_swarm_session(self) -> None:
        if self._swarm_session is not None:
            swarm, self._swarm_session = self._swarm_session, None
            await swarm.close()
