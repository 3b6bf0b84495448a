"""The gateway's end of a worker's socket: commands out, events in, one queue for each request."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Self

from petals_chat.engine.interface import Chunk
from petals_chat.errors import WorkerLostError, error_from_report
from petals_chat.protocol.channel import FrameChannel
from petals_chat.protocol.messages import (
    AcknowledgeChunks,
    Cancel,
    ChatPrompt,
    CheckReachability,
    ChunkGenerated,
    CloseSession,
    Command,
    DecodeTokens,
    DescribeTokenizer,
    EncodedText,
    EncodeText,
    Event,
    Generate,
    GenerationQueued,
    GenerationRequest,
    GiveBackCaches,
    OpenSession,
    Reachability,
    ReachabilityChecked,
    RequestFailed,
    SessionClosed,
    SessionOpened,
    StartWorker,
    StatusReported,
    TextEncoded,
    TokenizerDescribed,
    TokenizerDescription,
    TokensDecoded,
    WorkerFailed,
    WorkerStarted,
    decode_event,
    encode,
)

WINDOW_CHUNKS = 16
"""Chunks of one generation that may be on their way: enough to hide the socket's delay, little to buffer."""

Answer = (
    SessionOpened
    | SessionClosed
    | ChunkGenerated
    | GenerationQueued
    | TextEncoded
    | TokensDecoded
    | TokenizerDescribed
    | ReachabilityChecked
    | RequestFailed
)


class WorkerConnection:
    """Talks to one worker process, from its start to its end.

    Args:
        model_key: for errors.
        on_status: called with each `StatusReported`.
    """

    _channel: FrameChannel

    def __init__(self, model_key: str, on_status: Callable[[StatusReported], None]) -> None:
        self._model_key = model_key
        self._on_status = on_status
        self._started: asyncio.Future[WorkerStarted] = asyncio.get_running_loop().create_future()
        # If the host never gets ready, nobody waits for this one; its exception is no surprise then.
        self._started.add_done_callback(lambda started: started.cancelled() or started.exception())
        self._answers: dict[int, asyncio.Queue[Answer]] = {}
        self._request_ids = itertools.count(1)
        self._lost = False

    @classmethod
    async def open(
        cls, model_key: str, connection: socket.socket, on_status: Callable[[StatusReported], None]
    ) -> Self:
        """Begin to talk on a socket whose other end is a worker's."""
        self = cls(model_key, on_status)
        self._channel = await FrameChannel.open(connection, lambda body: self._hand_out(decode_event(body)))
        return self

    def close(self) -> None:
        """Close the socket, which ends the worker."""
        self._channel.close()

    async def run(self) -> None:
        """Wait until the worker is gone; then fail what waits."""
        try:
            await self._channel.wait_for_end()
        finally:
            self._lost = True
            self._channel.close()
            error = WorkerLostError(self._model_key)
            if not self._started.done():
                self._started.set_exception(error)
            for request_id, answers in self._answers.items():
                answers.put_nowait(RequestFailed(request_id, error.report()))

    async def start(self, command: StartWorker) -> WorkerStarted:
        """Tell the worker what to load, and wait until it has.

        Raises:
            PetalsChatError: it cannot be loaded.
        """
        self._send(command)
        return await self._started

    async def open_session(self, session_id: str, max_length: int, *, owner: str, is_stateless: bool) -> None:
        """Open a session under an id of the caller's choice."""
        request_id = next(self._request_ids)
        command = OpenSession(request_id, session_id, max_length, owner, is_stateless)
        try:
            await self._ask(command, request_id)
        except asyncio.CancelledError:
            self._send(CloseSession(next(self._request_ids), session_id))  # nobody will own it
            raise

    def give_back_caches(self, *, recalls: bool) -> None:
        """Ask the worker for attention caches that it needs less than others who wait; see `GiveBackCaches`."""
        if not self._lost:
            self._send(GiveBackCaches(recalls))

    async def close_session(self, session_id: str) -> None:
        """Close a session; returns when its memory is free, or the worker is gone."""
        if not self._lost:
            request_id = next(self._request_ids)
            await self._ask(CloseSession(request_id, session_id), request_id)

    async def encode(self, inputs: str | ChatPrompt, *, add_special_tokens: bool) -> EncodedText:
        """See `petals_chat.engine.interface.EngineTokenizer.encode`."""
        request_id = next(self._request_ids)
        answer = await self._ask(EncodeText(request_id, inputs, add_special_tokens), request_id)
        assert isinstance(answer, TextEncoded)
        return answer.text

    async def decode(self, tokens: Sequence[int]) -> str:
        """See `petals_chat.engine.interface.EngineTokenizer.decode`."""
        request_id = next(self._request_ids)
        answer = await self._ask(DecodeTokens(request_id, tuple(tokens)), request_id)
        assert isinstance(answer, TokensDecoded)
        return answer.text

    async def describe(self) -> TokenizerDescription:
        """See `petals_chat.engine.interface.EngineTokenizer.describe`."""
        request_id = next(self._request_ids)
        answer = await self._ask(DescribeTokenizer(request_id), request_id)
        assert isinstance(answer, TokenizerDescribed)
        return answer.description

    async def check_reachability(self, peer_id: str) -> Reachability:
        """See `petals_chat.engine.interface.SwarmEngine.check_reachability`."""
        request_id = next(self._request_ids)
        answer = await self._ask(CheckReachability(request_id, peer_id), request_id)
        assert isinstance(answer, ReachabilityChecked)
        return answer.reachability

    async def generate(self, session_id: str, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Generate in a session; see `petals_chat.engine.interface.EngineSession.generate`."""
        request_id = next(self._request_ids)
        answers = self._expect_answers(request_id)
        ended = False
        unacknowledged = 0
        try:
            self._send(Generate(request_id, session_id, request, WINDOW_CHUNKS))
            while not ended:
                answer = await answers.get()
                if isinstance(answer, RequestFailed):
                    ended = True
                    raise error_from_report(answer.error)
                if isinstance(answer, GenerationQueued):
                    yield Chunk("", 0, queue_place=answer.place)
                    continue
                assert isinstance(answer, ChunkGenerated)
                ended = answer.finish_reason is not None
                yield Chunk(
                    answer.text,
                    answer.token_count,
                    answer.finish_reason,
                    answer.prompt_tokens,
                    answer.cached_tokens,
                    logprobs=answer.logprobs,
                    prompt_logprobs=answer.prompt_logprobs,
                    tokens_ahead=answer.tokens_ahead,
                    context_limit=answer.context_limit,
                )
                unacknowledged += 1
                if unacknowledged >= WINDOW_CHUNKS // 2 and not ended:
                    self._send(AcknowledgeChunks(request_id, unacknowledged))
                    unacknowledged = 0
        finally:
            del self._answers[request_id]
            if not ended and not self._lost:
                self._send(Cancel(request_id))

    async def _ask(self, command: Command, request_id: int) -> Answer:
        answers = self._expect_answers(request_id)
        try:
            self._send(command)
            answer = await answers.get()
        except asyncio.CancelledError:
            if not self._lost:
                self._send(Cancel(request_id))
            raise
        finally:
            del self._answers[request_id]
        if isinstance(answer, RequestFailed):
            raise error_from_report(answer.error)
        return answer

    def _expect_answers(self, request_id: int) -> asyncio.Queue[Answer]:
        if self._lost:
            raise WorkerLostError(self._model_key)
        return self._answers.setdefault(request_id, asyncio.Queue())

    def _send(self, command: Command) -> None:
        # The worker reads at once, and what it is sent is bounded by the limits on requests and sessions.
        self._channel.send(encode(command))

    def _hand_out(self, event: Event) -> None:
        match event:
            case WorkerStarted():
                self._started.set_result(event)
            case WorkerFailed():
                self._started.set_exception(error_from_report(event.error))
            case StatusReported():
                self._on_status(event)
            case _:
                if answers := self._answers.get(event.request_id):  # else nobody waits for it any more
                    answers.put_nowait(event)
