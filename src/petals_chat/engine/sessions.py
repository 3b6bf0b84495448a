"""An inference session in the worker: generation in a context, one request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

import torch

from petals_chat.engine.contexts import Context, OnOutputs, Swarm
from petals_chat.engine.prefixes import PrefixStore
from petals_chat.engine.rooms import Applicant
from petals_chat.engine.tokenizer import Tokenizer
from petals_chat.errors import InvalidParameterError, MaximumLengthExceededError
from petals_chat.generation.detokenize import IncrementalDetokenizer
from petals_chat.generation.sampling import Logprobs, TokenSampler
from petals_chat.generation.stopping import StopMatcher
from petals_chat.head.batcher import HeadBatcher, Trip
from petals_chat.protocol.messages import FinishReason, GenerationRequest, SamplingParameters, TokenLogprobs

PROMPT_LOGPROBS_PER_CHUNK = 128
"""Keeps messages to the gateway small."""
CONTINUED_TOKENS = 64
"""Who has a session asks for more, often for one token after the other. Room for exactly that would be outgrown, and
the context replayed, with each second one."""


class ChunkConsumer(Applicant, Protocol):
    """Who takes the chunks of a generation.

    Once it is ``cancelled``, the generation ends after the step that is on its way.
    """

    @property
    def is_slow(self) -> bool:
        """Whether `take` is going to wait."""

    async def take(
        self,
        text: str,
        token_count: int,
        finish_reason: FinishReason | None,
        usage: Usage,
        logprobs: tuple[TokenLogprobs, ...] = (),
        prompt_logprobs: tuple[TokenLogprobs, ...] = (),
        *,
        tokens_ahead: int = 0,
        context_limit: int | None = None,
    ) -> None:
        """Take a chunk; waits while the client is slow. The last chunk has a ``finish_reason``."""


class Usage:
    """What a request's own input took."""

    prompt_tokens = 0
    cached_tokens = 0
    """Tokens of it that were processed for an earlier request."""


class Model:
    """What all sessions of a worker share."""

    def __init__(
        self, tokenizer: Tokenizer, batcher: HeadBatcher, swarm: Swarm, prefixes: PrefixStore
    ) -> None:
        self.tokenizer = tokenizer
        self.batcher = batcher
        self.swarm = swarm
        self.prefixes = prefixes


class Session:
    """A context of at most ``max_length`` tokens that grows with each generation, one generation at a time.

    Args:
        owner: whose it is; the owners take turns where there is a queue.
        is_stateless: it is for one request, which may go on from the context of an earlier one of its owner.
    """

    def __init__(self, model: Model, owner: str, max_length: int, *, is_stateless: bool = False) -> None:
        self.max_length = max_length
        self._model = model
        self._is_stateless = is_stateless
        spare_tokens = 0 if is_stateless else CONTINUED_TOKENS
        self._context = Context(model.swarm, owner, max_length, spare_tokens=spare_tokens)
        self._detokenizer = IncrementalDetokenizer(model.tokenizer.decode)
        self._trip = Trip()
        self._turn = asyncio.Lock()
        self._is_closed = False

    async def generate(self, request: GenerationRequest, consumer: ChunkConsumer) -> None:
        """Add the request's inputs and generate, waiting for an earlier generation to end.

        If it fails, the session is as it was before, and can be used again.

        Raises:
            RequestError: the request does not fit the session.
            SwarmError, CapacityError: the swarm cannot do it now.
        """
        async with self._turn:
            length_before = len(self._context.tokens)
            try:
                new_tokens = await self._encode(request, consumer)
                if consumer.cancelled:
                    await consumer.take("", 0, FinishReason.CANCELLED, Usage())
                    return
                self._model.swarm.rooms.busy(self._context)  # others could have the caches during a long text
                usage = self._add_inputs(request, new_tokens)
                if request.prompt_logprobs is not None:
                    self._context.on_outputs = self._prompt_describer(
                        request.prompt_logprobs, consumer, usage
                    )
                await self._generate(request, consumer, usage)
            except BaseException:
                await self._context.drop_caches()
                self._context.truncate(length_before)
                self._detokenizer.start_after(self._context.tokens)
                raise
            finally:
                self._context.on_outputs = None
                self._model.swarm.rooms.idle(self._context)

    async def close(self) -> None:
        """Free the swarm's memory, when the running generation has ended. Closing twice is no error."""
        async with self._turn:
            if self._is_closed:
                return
            self._is_closed = True
            self._model.batcher.forget(self._trip)
            if self._is_stateless and self._context.cached_tokens:
                await self._model.prefixes.park(self._context)
            else:
                await self._context.drop_caches()

    async def _encode(self, request: GenerationRequest, consumer: ChunkConsumer) -> list[int]:
        """The tokens of the request's input; whatever if the consumer is cancelled."""
        if request.inputs is None or consumer.cancelled:
            return []
        encoding = asyncio.ensure_future(
            self._model.tokenizer.encode_aside(
                request.inputs, at_start=not self._context.tokens, owner=self._context.owner
            )
        )

        def cancel() -> None:
            encoding.cancel()

        consumer.on_cancel = cancel
        try:
            return await encoding
        except asyncio.CancelledError:
            if not consumer.cancelled:
                raise
            return []
        finally:
            consumer.on_cancel = None

    def _add_inputs(self, request: GenerationRequest, new_tokens: list[int]) -> Usage:
        tokens = self._context.tokens
        if max(new_tokens, default=0) >= self._model.swarm.modules.embeddings.shape[0]:
            raise InvalidParameterError(
                "inputs", "it has a token that the tokenizer knows and the model has no embedding for"
            )
        length = len(tokens) + len(new_tokens)
        if length == 0:
            raise InvalidParameterError("inputs", "a new session needs some text to begin with")
        limit = min(self.max_length, request.max_length or self.max_length)
        if length >= limit:
            raise self._no_room(length, limit)
        usage = Usage()
        usage.prompt_tokens = len(new_tokens)
        if self._is_stateless and not tokens and request.prompt_logprobs is None:
            usage.cached_tokens = self._go_on_from_prefix(new_tokens)
        self._context.tokens += new_tokens[usage.cached_tokens :]
        if request.inputs is not None:
            self._detokenizer.start_after(self._context.tokens)
        return usage

    def _no_room(self, length: int, limit: int) -> MaximumLengthExceededError:
        if limit < self.max_length:
            whose, remedy = "that max_length allows", "Ask for a larger max_length, or send less text"
        elif self._is_stateless:
            whose, remedy = "that the model may have here", "Send less text"
        else:
            whose, remedy = "of the session", "Send less text, or open a new session"
        return MaximumLengthExceededError(
            f"the context has {length} tokens with this input, which leaves no room for an answer within the "
            f"{limit} tokens {whose}. {remedy}",
            limit=limit,
        )

    def _go_on_from_prefix(self, tokens: list[int]) -> int:
        """Take over an idle context that ``tokens`` extend, if there is one; returns its length."""
        context = self._model.prefixes.take(self._context.owner, tokens, self.max_length)
        if context is None:
            return 0
        self._context = context
        self._model.swarm.rooms.busy(context)
        counts = self._model.swarm.counts
        counts.prefix_hits += 1
        counts.prefix_tokens += len(context.tokens)
        return len(context.tokens)

    async def _generate(self, request: GenerationRequest, consumer: ChunkConsumer, usage: Usage) -> None:
        model, tokens = self._model, self._context.tokens
        sampler = await self._sampler(request.sampling)
        stop_matcher = StopMatcher(request.stop_sequences)
        text, generated, in_chunk = "", 0, 0
        logprobs: list[TokenLogprobs] = []
        finish_reason: FinishReason | None = None
        while finish_reason is None:
            try:
                hidden_state = await self._feed(request, generated, consumer)
            except MaximumLengthExceededError as error:  # the swarm's servers allow less than the session
                if not generated:
                    raise
                full = FinishReason.CONTEXT_FULL
                await consumer.take(text, in_chunk, full, usage, tuple(logprobs), context_limit=error.limit)
                return
            if hidden_state is None:
                await consumer.take(text, in_chunk, FinishReason.CANCELLED, usage, tuple(logprobs))
                return
            if request.max_new_tokens == 0:  # only the prompt's log probabilities were asked for
                await consumer.take("", 0, FinishReason.LENGTH, usage)
                return
            token = await model.batcher.next_token(hidden_state, sampler)
            tokens.append(token)
            sampler.add(token)
            if sampler.last_logprobs is not None:
                logprobs.append(model.tokenizer.describe(sampler.last_logprobs))
            generated, in_chunk = generated + 1, in_chunk + 1
            model.swarm.counts.tokens_generated += 1

            ends = token in model.tokenizer.end_of_sequence_ids
            piece = "" if ends and request.hide_end_of_sequence else self._detokenizer.add(token)
            stop_end = stop_matcher.add(piece) if piece else None
            text += piece[:stop_end]
            if stop_end is not None:
                finish_reason = FinishReason.STOP_SEQUENCE
            else:
                finish_reason = self._finish_reason(request, token, generated, consumer)
            chunk_is_full = request.chunk_tokens is not None and in_chunk >= request.chunk_tokens
            if finish_reason or (chunk_is_full and not self._detokenizer.holds_tokens):
                if finish_reason is FinishReason.LENGTH:  # many clients ask for one token after the other
                    model.batcher.expect(self._trip)
                chunk = consumer.take(text, in_chunk, finish_reason, usage, tuple(logprobs))
                await self._hand_over(chunk, consumer)
                text, in_chunk, logprobs = "", 0, []
            elif request.progress_tokens is not None and in_chunk % request.progress_tokens == 0:
                chunk = consumer.take("", 0, None, usage, tokens_ahead=request.progress_tokens)
                await self._hand_over(chunk, consumer)

    async def _hand_over(self, chunk: Awaitable[None], consumer: ChunkConsumer) -> None:
        """While the consumer is slow, others may have the context's caches."""
        rooms, is_slow = self._model.swarm.rooms, consumer.is_slow
        if is_slow:
            rooms.idle(self._context)
        await chunk
        if is_slow:
            rooms.busy(self._context)

    async def _sampler(self, parameters: SamplingParameters) -> TokenSampler:
        model, vocab_size = self._model, self._model.swarm.modules.vocab_size
        mask = None
        if parameters.grammar is not None:
            mask = await asyncio.to_thread(model.tokenizer.compile, parameters.grammar, vocab_size)
        return TokenSampler(parameters, vocab_size, self._context.tokens, mask)

    def _prompt_describer(self, count: int, consumer: ChunkConsumer, usage: Usage) -> OnOutputs:
        """Passes on the log probabilities of the prompt's tokens as they come out of the swarm."""
        tokens = tuple(self._context.tokens)
        described = 0

        async def describe(start: int, hidden_states: torch.Tensor) -> None:
            nonlocal described
            end = min(start + len(hidden_states) + 1, len(tokens))
            if end <= described:
                return  # a replay
            texts = [] if described else [self._model.tokenizer.describe(Logprobs(tokens[0], None, ()))]
            begin, described = max(described, 1), end
            rows = hidden_states[begin - 1 - start : end - 1 - start]
            logprobs = await self._model.batcher.logprobs(rows, tokens[begin:end], count)
            texts += [self._model.tokenizer.describe(each) for each in logprobs]
            for index in range(0, len(texts), PROMPT_LOGPROBS_PER_CHUNK):
                piece = tuple(texts[index : index + PROMPT_LOGPROBS_PER_CHUNK])
                await self._hand_over(consumer.take("", 0, None, usage, prompt_logprobs=piece), consumer)

        return describe

    async def _feed(
        self, request: GenerationRequest, generated: int, consumer: ChunkConsumer
    ) -> torch.Tensor | None:
        new_tokens = None if request.max_new_tokens is None else request.max_new_tokens - generated
        if not self._context.lacks_one_token:
            self._model.batcher.forget(self._trip)  # a prompt takes longer; nobody shall wait for it
            return await self._context.feed(new_tokens, consumer)
        with self._model.batcher.expecting(self._trip):
            return await self._context.feed(new_tokens, consumer)

    def _finish_reason(
        self, request: GenerationRequest, token: int, generated: int, consumer: ChunkConsumer
    ) -> FinishReason | None:
        length = len(self._context.tokens)
        if token in self._model.tokenizer.end_of_sequence_ids:
            return FinishReason.END_OF_SEQUENCE
        if generated == request.max_new_tokens or length == request.max_length:
            return FinishReason.LENGTH
        if length >= self.max_length:
            return FinishReason.CONTEXT_FULL
        return FinishReason.CANCELLED if consumer.cancelled else None
