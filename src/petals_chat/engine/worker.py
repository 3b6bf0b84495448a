"""The engine worker: a process that serves one model to one gateway.

``python -m petals_chat.engine.worker FD`` reads commands from, and writes events to, the Unix socket ``FD``
(`petals_chat.protocol`). It ends when the gateway closes the socket, and then leaves the swarm in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import NoReturn

import torch

from petals_chat.engine.contexts import Swarm
from petals_chat.engine.prefixes import PrefixStore
from petals_chat.engine.rooms import RoomQueue
from petals_chat.engine.sessions import Model, Session, Usage
from petals_chat.engine.tokenizer import Tokenizer
from petals_chat.errors import InternalError, PetalsChatError, SessionExpiredError
from petals_chat.head.batcher import HeadBatcher
from petals_chat.head.cpus import usable_threads
from petals_chat.head.modules import load_client_modules
from petals_chat.head.precision import resolve_device, resolve_dtype
from petals_chat.head.tuning import row_seconds, use_threads_that_pay, with_fastest_head
from petals_chat.models.checkpoint import client_tensors, open_checkpoint
from petals_chat.protocol.channel import FrameChannel
from petals_chat.protocol.framing import FrameDecoder, encode_frame
from petals_chat.protocol.messages import (
    AcknowledgeChunks,
    Cancel,
    CheckReachability,
    ChunkGenerated,
    CloseSession,
    Command,
    DecodeTokens,
    DescribeTokenizer,
    EncodeText,
    Event,
    FinishReason,
    Generate,
    GenerationQueued,
    GiveBackCaches,
    OpenSession,
    ReachabilityChecked,
    RequestFailed,
    SessionClosed,
    SessionOpened,
    StartWorker,
    StatusReported,
    TextEncoded,
    TokenizerDescribed,
    TokenLogprobs,
    TokensDecoded,
    WorkerFailed,
    WorkerStarted,
    decode_command,
    encode,
)
from petals_chat.settings import HeadWeights
from petals_chat.swarm.client import SwarmClient, SwarmOptions
from petals_chat.swarm.naming import default_dht_prefix

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 16
STATUS_PERIOD_SECONDS = 2.0
CLOSE_TIMEOUT_SECONDS = 2.0


class _Generation:
    """A `Generate` that runs or waits for its turn; takes its chunks and sends them as the window allows."""

    def __init__(self, command: Generate, session: Session, send: Callable[[Event], None]) -> None:
        self.session = session
        self.cancelled = False
        self.on_cancel: Callable[[], None] | None = None
        self._command = command
        self._send = send
        self._window = asyncio.Semaphore(command.window)

    async def run(self) -> None:
        await self.session.generate(self._command.request, self)

    @property
    def is_slow(self) -> bool:
        return self._window.locked()

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
        if not self.cancelled:
            await self._window.acquire()
        self._send(
            ChunkGenerated(
                self._command.request_id,
                text,
                token_count,
                finish_reason,
                usage.prompt_tokens,
                usage.cached_tokens,
                logprobs,
                prompt_logprobs,
                tokens_ahead,
                context_limit,
            )
        )

    def queued(self, place: int) -> None:
        self._send(GenerationQueued(self._command.request_id, place))

    def acknowledge(self, count: int) -> None:
        for _ in range(count):
            self._window.release()

    def cancel(self) -> None:
        self.cancelled = True
        self._window.release()  # a last chunk, if it waits for a client who has gone
        if self.on_cancel:
            self.on_cancel()


class Worker:
    """Executes the gateway's commands.

    Args:
        model: what sessions share.
        swarm: for the status reports.
    """

    _channel: FrameChannel

    def __init__(self, model: Model, swarm: SwarmClient) -> None:
        self._model = model
        self._swarm = swarm
        self._sessions: dict[str, Session] = {}
        self._generations: dict[int, _Generation] = {}
        self._tokenisings: dict[int, asyncio.Task[None]] = {}
        """Those that may take long."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, started: WorkerStarted, connection: socket.socket, decoder: FrameDecoder) -> None:
        """Serve until the gateway closes the socket, then close all sessions."""
        self._channel = await FrameChannel.open(
            connection, lambda body: self._execute(decode_command(body)), decoder
        )
        self._send(started)
        background = [
            asyncio.create_task(_repeat(work))
            for work in (
                self._report_status,
                self._swarm.stay_joined,
                self._swarm.watch,
                self._end_without_connection,
                self._model.swarm.rooms.expire_idle,
            )
        ]
        try:
            await self._channel.wait_for_end()
        finally:
            for task in background:
                task.cancel()
            for generation in self._generations.values():
                generation.cancel()
            closing = [asyncio.create_task(session.close()) for session in self._sessions.values()]
            if pending := [*closing, *self._tasks]:
                await asyncio.wait(pending, timeout=CLOSE_TIMEOUT_SECONDS)
            await self._model.prefixes.clear()
            self._channel.close()

    def _execute(self, command: Command) -> None:
        match command:
            case OpenSession():
                self._sessions[command.session_id] = Session(
                    self._model, command.owner, command.max_length, is_stateless=command.is_stateless
                )
                self._send(SessionOpened(command.request_id))
            case Generate():
                self._start_generation(command)
            case AcknowledgeChunks():
                if generation := self._generations.get(command.request_id):
                    generation.acknowledge(command.count)
            case Cancel():
                if generation := self._generations.get(command.request_id):
                    generation.cancel()
                elif tokenising := self._tokenisings.get(command.request_id):
                    tokenising.cancel()
            case CloseSession():
                self._start(command.request_id, self._close(command))
            case EncodeText():
                self._start_tokenising(command.request_id, self._encode(command))
            case DecodeTokens():
                self._start_tokenising(command.request_id, self._decode(command))
            case DescribeTokenizer():
                description = self._model.tokenizer.description
                self._send(TokenizerDescribed(command.request_id, description))
            case GiveBackCaches():
                rooms = self._model.swarm.rooms
                self._start(0, rooms.make_room_elsewhere(recalls=command.recalls))
            case CheckReachability():
                self._start(command.request_id, self._check_reachability(command))
            case StartWorker():
                raise AssertionError("the worker is started already")

    def _start(self, request_id: int, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except PetalsChatError as error:
                self._send(RequestFailed(request_id, error.report()))
            except Exception as error:
                logger.exception("request %d failed", request_id)
                internal = InternalError()
                internal.__cause__ = error
                self._send(RequestFailed(request_id, internal.report()))

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(
            lambda _: work.close()
        )  # who is cancelled before the first step never awaits it
        return task

    def _start_tokenising(self, request_id: int, work: Coroutine[None, None, None]) -> None:
        task = self._tokenisings[request_id] = self._start(request_id, work)
        task.add_done_callback(lambda _: self._tokenisings.pop(request_id))

    def _start_generation(self, command: Generate) -> None:
        session = self._sessions.get(command.session_id)
        if session is None:
            self._send(RequestFailed(command.request_id, SessionExpiredError(command.session_id).report()))
            return
        generation = _Generation(command, session, self._send)
        self._generations[command.request_id] = (
            generation  # before its task begins: the next command may cancel it
        )
        self._start(command.request_id, self._generate(command.request_id, generation))

    async def _generate(self, request_id: int, generation: _Generation) -> None:
        try:
            await generation.run()
        finally:
            del self._generations[request_id]

    async def _close(self, command: CloseSession) -> None:
        if session := self._sessions.pop(command.session_id, None):
            for generation in self._generations.values():
                if generation.session is session:
                    generation.cancel()
            await session.close()
        self._send(SessionClosed(command.request_id))

    async def _encode(self, command: EncodeText) -> None:
        text = await self._model.tokenizer.spell_aside(command.inputs, at_start=command.add_special_tokens)
        self._send(TextEncoded(command.request_id, text))

    async def _decode(self, command: DecodeTokens) -> None:
        text = await self._model.tokenizer.decode_aside(command.tokens)
        self._send(TokensDecoded(command.request_id, text))

    async def _check_reachability(self, command: CheckReachability) -> None:
        reachability = await self._swarm.check_reachability(command.peer_id)
        self._send(ReachabilityChecked(command.request_id, reachability))

    async def _end_without_connection(self) -> None:
        """A new worker can do what this one cannot any more."""
        while True:
            await asyncio.sleep(STATUS_PERIOD_SECONDS)
            if not self._swarm.is_connected:
                logger.error("the worker ends, since its connection to the swarm has ended")
                os._exit(1)  # ending in order would wait for what has ended

    async def _report_status(self) -> None:
        rooms, counts = self._model.swarm.rooms, self._model.swarm.counts
        while True:
            self._send(
                StatusReported(
                    open_sessions=len(self._sessions),
                    running_generations=len(self._generations),
                    swarm=self._swarm.status,
                    resident_sessions=rooms.residents,
                    waiting_generations=rooms.waiting,
                    **dataclasses.asdict(counts),
                )
            )
            await asyncio.sleep(STATUS_PERIOD_SECONDS)

    def _send(self, event: Event) -> None:
        # What is unsent is bounded: by a window of chunks for each generation, one answer for each command.
        self._channel.send(encode(event))


async def _repeat(work: Callable[[], Awaitable[object]]) -> NoReturn:
    """Begin the work again when it fails: without it the worker would go on, and nobody would know what is missing."""
    while True:
        try:
            await work()
        except Exception:
            logger.exception("%s failed, and begins again", work)
        await asyncio.sleep(STATUS_PERIOD_SECONDS)


def _read_start_command(connection: socket.socket, decoder: FrameDecoder) -> StartWorker | None:
    """The first command; None if the gateway went away before sending one."""
    while data := connection.recv(READ_BYTES):
        for body in decoder.feed(data):
            command = decode_command(body)
            assert isinstance(command, StartWorker), (
                "the gateway sends nothing else before the worker started"
            )
            return command
    return None


def _load(command: StartWorker) -> tuple[Model, SwarmClient, WorkerStarted]:
    torch.set_num_threads(command.threads or usable_threads())
    checkpoint = open_checkpoint(command.repository, command.revision)
    config = checkpoint.config
    num_blocks = checkpoint.num_blocks
    client_tensors(config, checkpoint.tensors)  # refuses models of other types before the swarm is joined
    # What is loaded by now is never collected: the process that hivemind forks goes on sharing its memory.
    gc.collect()
    gc.freeze()
    dht_prefix = command.dht_prefix or default_dht_prefix(checkpoint.model_type, command.repository)
    swarm = SwarmClient(
        SwarmOptions(
            initial_peers=command.initial_peers,
            dht_prefix=dht_prefix,
            num_blocks=num_blocks,
            active_adapter=command.adapter,
            max_retries=command.max_retries,
            request_timeout=command.request_timeout,
            connect_timeout=command.connect_timeout,
            update_period=command.update_period,
        )
    )
    device = resolve_device(command.device)
    dtype = resolve_dtype(command.dtype, device)
    modules = load_client_modules(checkpoint, device=device, dtype=dtype)
    modules = with_fastest_head(modules, HeadWeights(command.head))
    if not command.threads:
        use_threads_that_pay(modules)
    rooms = RoomQueue(
        max_waiting=command.max_waiting,
        timeout=command.queue_timeout,
        idle_timeout=command.cache_idle_timeout,
    )
    model = Model(
        Tokenizer(
            command.repository,
            command.revision,
            config,
            chat_template=command.chat_template,
            chat_separator=command.chat_separator,
        ),
        HeadBatcher(modules, row_seconds=row_seconds(modules), threads=torch.get_num_threads()),
        Swarm(modules, swarm.open_session, rooms, prefill_chunk_tokens=command.prefill_chunk_tokens),
        PrefixStore(idle_timeout=command.prefix_idle_timeout),
    )
    torch.set_num_threads(1)  # what the event loop's thread computes is small
    return (
        model,
        swarm,
        WorkerStarted(
            num_blocks=num_blocks,
            hidden_size=modules.embeddings.shape[1],
            vocab_size=modules.vocab_size,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            max_session_length=command.max_session_length,
            dht_prefix=dht_prefix,
            tool_style=model.tokenizer.tool_style,
        ),
    )


async def _serve(
    model: Model, swarm: SwarmClient, started: WorkerStarted, connection: socket.socket, decoder: FrameDecoder
) -> None:
    await swarm.refresh()
    await Worker(model, swarm).run(started, connection, decoder)


def _end_reading(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RD)


def main() -> int:
    """Run a worker on the socket whose file descriptor is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the gateway, which closes the socket
    connection = socket.socket(fileno=int(sys.argv[1]))
    decoder = FrameDecoder()
    command = _read_start_command(connection, decoder)
    if command is None:
        return 0
    try:
        model, swarm, started = _load(command)
    except Exception as error:
        known = error if isinstance(error, PetalsChatError) else InternalError()
        if known is not error:
            logger.exception("the worker cannot start")
        with contextlib.suppress(OSError):  # the gateway has gone meanwhile
            connection.sendall(encode_frame(encode(WorkerFailed(known.report()))))
        return 1
    # Up to here SIGTERM ends the process at once; a worker that serves ends as if the gateway had gone.
    signal.signal(signal.SIGTERM, lambda *_: _end_reading(connection))
    swarm.run(_serve(model, swarm, started, connection, decoder))
    model.batcher.close()
    swarm.close()
    return 0


if __name__ == "__main__":
    code = main()
    # Threads of the swarm's libraries that wait for dead servers must not hold up the end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
