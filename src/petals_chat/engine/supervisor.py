"""The engine: for each model a worker process and, for a private swarm, a Petals host, kept alive.

A process that ends is started again, after a pause that doubles with each failure in a row. A model whose
worker is not running fails its requests at once with the reason; other models and the gateway go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Literal, NoReturn, Self

import msgspec

from petals_chat.engine.client import WorkerConnection
from petals_chat.engine.interface import Chunk, ModelState, ModelStatus
from petals_chat.engine.processes import ChildProcess
from petals_chat.errors import (
    EngineError,
    ErrorReport,
    InternalError,
    MaximumLengthExceededError,
    ModelLoadingError,
    ModelUnavailableError,
    PetalsChatError,
    WorkerLostError,
    error_from_report,
)
from petals_chat.protocol.messages import GenerationRequest, StartWorker, StatusReported, WorkerStarted
from petals_chat.settings import ModelSettings, Settings

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
STABLE_AFTER_SECONDS = 30.0
"""A process that ran this long has not failed in a row with the one before it."""

HOST_MODULE = "petals_chat"
WORKER_MODULE = "petals_chat.engine.worker"


class ProcessEngine:
    """All models of the settings, each with its own processes. Use as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._models = {
            model.key: _ServedModel(settings, model, index) for index, model in enumerate(settings.models)
        }
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def statuses(self) -> Mapping[str, ModelStatus]:
        """By model key. Reading it never waits."""
        return {key: model.status for key, model in self._models.items()}

    async def open_session(self, model_key: str, max_length: int) -> ProcessSession:
        """See `petals_chat.engine.interface.Engine.open_session`."""
        return await self._models[model_key].open_session(max_length)

    async def wait_until_settled(self) -> None:
        """Wait until every model is ready or is known not to be."""
        await asyncio.gather(*(model.settled.wait() for model in self._models.values()))

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(model.run()) for model in self._models.values()]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class ProcessSession:
    """A session in a worker process; see `petals_chat.engine.interface.EngineSession`."""

    def __init__(self, worker: WorkerConnection, session_id: str, max_length: int) -> None:
        self._worker = worker
        self.session_id = session_id
        self.max_length = max_length

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """See `petals_chat.engine.interface.EngineSession.generate`."""
        return self._worker.generate(self.session_id, request)

    async def close(self) -> None:
        """Free the session; a worker that is gone has freed it already."""
        with contextlib.suppress(WorkerLostError):
            await self._worker.close_session(self.session_id)


class _ServedModel:
    """One model: its host, if its swarm is a private one of this machine, and its worker."""

    def __init__(self, settings: Settings, model: ModelSettings, index: int) -> None:
        self._settings = settings
        self._model = model
        self._worker: WorkerConnection | None = None
        self._started: WorkerStarted | None = None
        self._report: StatusReported | None = None
        self._error: ErrorReport | None = None
        self.settled = asyncio.Event()
        peers = settings.swarm.initial_peers if model.initial_peers is None else model.initial_peers
        self._host = None if peers else _PrivateHost(settings, model, index)
        self._peers = peers

    @property
    def status(self) -> ModelStatus:
        missing: tuple[int, ...] = ()
        if self._worker is None or self._started is None:
            state = ModelState.UNAVAILABLE if self._error else ModelState.LOADING
        else:
            missing = self._missing_blocks(self._started.num_blocks)
            state = ModelState.BROKEN if missing else ModelState.READY
        return ModelStatus(state, self._error, missing, self._started, self._report)

    def _missing_blocks(self, num_blocks: int) -> tuple[int, ...]:
        if self._report is None:
            return ()
        held = {block for peer in self._report.peers for block in range(peer.start, peer.end)}
        return tuple(block for block in range(num_blocks) if block not in held)

    async def open_session(self, max_length: int) -> ProcessSession:
        if self._worker is None or self._started is None:
            if self._error:
                raise ModelUnavailableError(self._model.key) from error_from_report(self._error)
            raise ModelLoadingError(self._model.key)
        limit = self._started.max_session_length
        if max_length > limit:
            raise MaximumLengthExceededError(
                f"max_length {max_length} is over the {limit} tokens that a session of this model may have",
                limit=limit,
            )
        session_id = str(uuid.uuid4())
        worker = self._worker
        await worker.open_session(session_id, max_length)
        return ProcessSession(worker, session_id, max_length)

    async def run(self) -> None:
        """Keep the processes running until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            if self._host:
                tasks.create_task(self._keep_running("host", self._host.run))
            tasks.create_task(self._keep_running("worker", self._run_worker))

    async def _keep_running(self, what: str, run: Callable[[], Awaitable[NoReturn]]) -> NoReturn:
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_SECONDS
        while True:
            began = loop.time()
            try:
                await run()
            except PetalsChatError as error:
                self._error = error.report()
                logger.warning("%s of %s: %s", what, self._model.key, error.message)
            except OSError:
                self._error = InternalError().report()
                logger.exception("%s of %s cannot be started", what, self._model.key)
            self.settled.set()
            if loop.time() - began >= STABLE_AFTER_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            logger.info("starting the %s of %s again in %g s", what, self._model.key, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _run_worker(self) -> NoReturn:
        """Start the worker and attend to it until it ends, which always raises."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        with theirs:
            process = await ChildProcess.start(
                WORKER_MODULE, str(theirs.fileno()), pass_fds=[theirs.fileno()]
            )
        worker = WorkerConnection(self._model.key, reader, writer, self._receive_status)
        attending = asyncio.create_task(worker.run())
        ended = asyncio.create_task(process.wait())
        # A forked daemon of a killed worker may keep its end of the socket open: the process's end counts.
        ended.add_done_callback(lambda _: attending.cancel())
        try:
            async with asyncio.timeout(self._settings.engine.start_timeout_seconds):
                # The worker imports its libraries while the host still starts.
                started = await worker.start(await self._start_command())
            self._worker, self._started, self._error = worker, started, None
            logger.info("%s is ready", self._model.key)
            self.settled.set()
            await ended
            raise WorkerLostError(self._model.key)
        except TimeoutError:
            raise EngineError(
                f"its worker did not start within {self._settings.engine.start_timeout_seconds:g} s "
                "(engine.start_timeout_seconds)"
            ) from None
        finally:
            self._worker = self._started = self._report = None
            writer.close()
            await process.stop()
            attending.cancel()
            await asyncio.gather(attending, ended, return_exceptions=True)

    def _receive_status(self, report: StatusReported) -> None:
        self._report = report

    async def _start_command(self) -> StartWorker:
        model, swarm, engine = self._model, self._settings.swarm, self._settings.engine
        peers: Literal["public"] | tuple[str, ...] = self._peers
        dht_prefix = model.dht_prefix or swarm.dht_prefix
        if self._host:
            ready = await self._host.ready()
            peers, dht_prefix = ready.peers, ready.dht_prefix
        return StartWorker(
            repository=model.repository,
            revision=model.revision,
            adapter=model.adapter,
            initial_peers=peers,
            dht_prefix=dht_prefix,
            device=model.device or engine.device,
            dtype=model.dtype or engine.dtype,
            threads=engine.threads,
            max_session_length=model.chat.max_session_length,
            prefill_chunk_tokens=swarm.prefill_chunk_tokens,
            max_retries=swarm.max_retries,
            request_timeout=swarm.request_timeout_seconds,
            connect_timeout=swarm.connect_timeout_seconds,
            update_period=swarm.update_period_seconds,
        )


class _HostReady(msgspec.Struct, frozen=True):
    """The line in which a host says that it serves, or why it cannot."""

    peers: tuple[str, ...] = ()
    dht_prefix: str = ""
    error: ErrorReport | None = None


class _PrivateHost:
    """A Petals host on this machine that begins a private swarm for one model.

    Its identity and port stay the same over restarts, so that workers and other machines find it again.
    """

    def __init__(self, settings: Settings, model: ModelSettings, index: int) -> None:
        self._settings = settings
        self._model = model
        self._port = settings.swarm.host_port + index if settings.swarm.host_port else 0
        self._first_ready: asyncio.Future[_HostReady] | None = None

    async def ready(self) -> _HostReady:
        """Wait until the host serves for the first time; where it is reached does not change after that."""
        return await asyncio.shield(self._ready_future())

    def _ready_future(self) -> asyncio.Future[_HostReady]:
        if self._first_ready is None:
            self._first_ready = asyncio.get_running_loop().create_future()
        return self._first_ready

    async def run(self) -> NoReturn:
        """Start the host and attend to it until it ends, which always raises."""
        read_fd, write_fd = os.pipe()
        try:
            process = await ChildProcess.start(HOST_MODULE, *self._arguments(write_fd), pass_fds=[write_fd])
        finally:
            os.close(write_fd)
        try:
            line = await _read_line(read_fd)
            ready = msgspec.json.decode(line, type=_HostReady) if line else None
            if ready and ready.error:
                raise error_from_report(ready.error)
            if ready:
                self._port = int(ready.peers[0].split("/tcp/")[1].split("/")[0])
                if not self._ready_future().done():
                    self._ready_future().set_result(ready)
                logger.info("the host of %s serves all its blocks on this machine", self._model.key)
            code = await process.wait()
            raise EngineError(f"the Petals host on this machine ended with exit code {code}")
        finally:
            await process.stop()

    def _arguments(self, ready_fd: int) -> list[str]:
        model, swarm, engine = self._model, self._settings.swarm, self._settings.engine
        dht_prefix = model.dht_prefix or swarm.dht_prefix
        optional = {
            "--dht-prefix": dht_prefix,
            "--revision": model.revision,
            "--adapters": model.adapter,
        }
        return [
            "host",
            model.repository,
            "--new-swarm",
            f"--address={swarm.host_address}",
            f"--port={self._port}",
            f"--identity={self._identity_file()}",
            f"--cache-tokens={swarm.host_cache_tokens}",
            f"--max-session-length={model.chat.max_session_length}",
            f"--device={model.device or engine.device}",
            f"--dtype={model.dtype or engine.dtype}",
            f"--threads={engine.threads}",
            f"--ready-fd={ready_fd}",
            "--exit-with-stdin",
            *(f"{name}={value}" for name, value in optional.items() if value),
        ]

    def _identity_file(self) -> Path:
        name = hashlib.sha256(self._model.key.encode()).hexdigest()[:16]
        directory = self._settings.engine.data_dir / "hosts"
        directory.mkdir(parents=True, exist_ok=True)
        return directory / f"{name}.id"


async def _read_line(fd: int) -> bytes:
    """Read the pipe ``fd`` up to the end of a line, or its end, and close it."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(fd, "rb"))
    try:
        return await reader.readline()
    finally:
        transport.close()
