"""The engine: for each model its worker processes and, for a private swarm, a Petals host, kept alive.

A process that ends is started again, after a pause that doubles with each failure in a row. A model of which
no worker is running fails its requests at once with the reason (it is being loaded, or cannot be); other models and the
gateway go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shlex
import socket
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn, Self

import msgspec

from petals_chat.engine.client import WorkerConnection
from petals_chat.engine.interface import Chunk, EngineTokenizer, ModelState, ModelStatus
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
from petals_chat.protocol.messages import (
    ChatPrompt,
    EncodedText,
    GenerationRequest,
    Reachability,
    StartWorker,
    StatusReported,
    TokenizerDescription,
    WorkerStarted,
)
from petals_chat.settings import ModelSettings, Settings
from petals_chat.swarm.join_token import is_loopback, join_command

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
STABLE_AFTER_SECONDS = 30.0
"""A process that ran this long has not failed in a row with the one before it."""

PREFERENCE_SESSIONS = 4
"""A worker may have this many sessions more than twice those of the least busy one, and still is preferred by
owners whose contexts it has."""
MAX_REMEMBERED_OWNERS = 10_000
MAX_SHOWN_PEERS = 3

HOST_MODULE = "petals_chat"
WORKER_MODULE = "petals_chat.engine.worker"


class ProcessEngine:
    """All models of the settings, each with its own processes. Use as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._models = {
            model.key: _ServedModel(settings, model, index, self._make_room_for)
            for index, model in enumerate(settings.models)
        }
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def statuses(self) -> Mapping[str, ModelStatus]:
        """By model key. Reading it never waits."""
        return {key: model.status for key, model in self._models.items()}

    async def open_session(
        self, model_key: str, max_length: int, *, owner: str = "", is_stateless: bool = False
    ) -> ProcessSession:
        """See `petals_chat.engine.interface.Engine.open_session`."""
        return await self._models[model_key].open_session(max_length, owner, is_stateless=is_stateless)

    def tokenizer(self, model_key: str) -> EngineTokenizer:
        """See `petals_chat.engine.interface.Engine.tokenizer`."""
        return self._models[model_key].tokenizer

    async def check_reachability(self, peer_id: str) -> Reachability:
        """See `petals_chat.engine.interface.SwarmEngine.check_reachability`."""
        members: list[_Worker] = []  # one in each swarm
        for worker in (worker for model in self._models.values() for worker in model.workers):
            if worker.started and not any(worker.shares_swarm_with(member) for member in members):
                members.append(worker)
        if not members:
            raise next(iter(self._models.values())).absence()
        answers = await asyncio.gather(*(member.connection.check_reachability(peer_id) for member in members))
        return max(answers, key=lambda answer: answer.is_reachable)

    def _make_room_for(self, waiting: _Worker) -> None:
        """Have the other workers that use the same servers give back what they do not need.

        The one that holds most gives back more, if that is more than the waiting one holds.
        """
        workers = [worker for model in self._models.values() for worker in model.workers]
        others = [
            worker for worker in workers if worker is not waiting and worker.shares_blocks_with(waiting)
        ]
        fullest = max(others, key=_Worker.residents, default=waiting)
        for worker in others:
            worker.give_back_caches(recalls=worker is fullest and worker.residents() > waiting.residents())

    async def wait_until_settled(self) -> None:
        """Wait until every model is ready or is known not to be."""
        await asyncio.gather(*(model.wait_until_settled() for model in self._models.values()))

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(model.run()) for model in self._models.values()]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class ProcessSession:
    """A session in a worker process; see `petals_chat.engine.interface.EngineSession`."""

    def __init__(
        self, worker: WorkerConnection, session_id: str, max_length: int, *, on_close: Callable[[], None]
    ) -> None:
        self._worker = worker
        self._on_close: Callable[[], None] | None = on_close
        self.session_id = session_id
        self.max_length = max_length

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """See `petals_chat.engine.interface.EngineSession.generate`."""
        return self._worker.generate(self.session_id, request)

    async def close(self) -> None:
        """Free the session; a worker that is gone has freed it already."""
        on_close, self._on_close = self._on_close, None
        if on_close:
            on_close()
        with contextlib.suppress(WorkerLostError):
            await self._worker.close_session(self.session_id)


class _RemoteTokenizer:
    """The tokenizer of a model, asked in one of its workers."""

    def __init__(self, connection: Callable[[], WorkerConnection]) -> None:
        self._connection = connection

    async def encode(self, inputs: str | ChatPrompt, *, add_special_tokens: bool) -> EncodedText:
        return await self._connection().encode(inputs, add_special_tokens=add_special_tokens)

    async def decode(self, tokens: Sequence[int]) -> str:
        return await self._connection().decode(tokens)

    async def describe(self) -> TokenizerDescription:
        return await self._connection().describe()


class _ServedModel:
    """One model: its host, if its swarm is a private one of this machine, and its workers."""

    def __init__(
        self,
        settings: Settings,
        model: ModelSettings,
        index: int,
        on_waiting: Callable[[_Worker], None],
    ) -> None:
        self._model = model
        peers = settings.swarm.initial_peers if model.initial_peers is None else model.initial_peers
        self._peers = peers
        self._dht_prefix = model.dht_prefix or settings.swarm.dht_prefix
        self._show_join_command = settings.swarm.show_join_command
        self._host = None if peers else _PrivateHost(settings, model, index)
        self.workers = [
            _Worker(settings, model, peers, self._host, on_waiting) for _ in range(settings.engine.workers)
        ]
        self._worker_of_owner: OrderedDict[str, _Worker] = OrderedDict()

    @property
    def status(self) -> ModelStatus:
        ready = [worker for worker in self.workers if worker.started]
        error = next((worker.error for worker in self.workers if worker.error), None)
        if not ready:
            return ModelStatus(ModelState.UNAVAILABLE if error else ModelState.LOADING, error)
        started = ready[0].started
        assert started
        report = _sum_of([worker.report for worker in ready if worker.report])
        missing = report.swarm.missing_blocks if report else ()
        state = ModelState.READY if report is None else state_of_serving(report)
        return ModelStatus(state, error, missing, started, report, self._join_command())

    def _join_command(self) -> str | None:
        """What adds another machine to the swarm. Who may join a private one can change its answers."""
        is_directory = self._model.repository.startswith(("/", ".", "~"))
        host = ["petals-chat", "host", "DIRECTORY" if is_directory else self._model.repository]
        if self._peers == "public":
            return shlex.join([*host, "--public"])
        if not self._show_join_command:
            return None
        if self._host:
            return self._host.join_command
        prefix = ["--dht-prefix", self._dht_prefix] if self._dht_prefix else []
        return shlex.join([*host, *prefix, "--initial-peers", *self._peers[:MAX_SHOWN_PEERS]])

    async def wait_until_settled(self) -> None:
        await asyncio.gather(*(worker.settled.wait() for worker in self.workers))

    async def open_session(self, max_length: int, owner: str, *, is_stateless: bool) -> ProcessSession:
        worker = self._choose_worker(owner if is_stateless else None)
        if worker is None:
            raise self.absence()
        return await worker.open_session(max_length, owner, is_stateless=is_stateless)

    @property
    def tokenizer(self) -> EngineTokenizer:
        return _RemoteTokenizer(self._any_connection)

    def _any_connection(self) -> WorkerConnection:
        worker = self._choose_worker(None)
        if worker is None:
            raise self.absence()
        return worker.connection

    def absence(self) -> EngineError:
        """Why there is no worker."""
        if error := self.status.error:
            absence = ModelUnavailableError(self._model.key)
            absence.__cause__ = error_from_report(error)
            return absence
        return ModelLoadingError(self._model.key)

    def _choose_worker(self, owner: str | None) -> _Worker | None:
        """The one with the fewest sessions; for an owner whose contexts may be reused, the one that has them.

        None if no worker is ready.
        """
        ready = [worker for worker in self.workers if worker.started]
        if not ready:
            return None
        least = min(ready, key=lambda worker: worker.sessions)
        if owner is None or len(self.workers) == 1:
            return least
        chosen = self._worker_of_owner.pop(owner, least)
        if chosen not in ready or chosen.sessions > 2 * least.sessions + PREFERENCE_SESSIONS:
            chosen = least
        self._worker_of_owner[owner] = chosen
        if len(self._worker_of_owner) > MAX_REMEMBERED_OWNERS:
            self._worker_of_owner.popitem(last=False)
        return chosen

    async def run(self) -> None:
        """Keep the processes running until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            if self._host:
                tasks.create_task(
                    keep_running(f"host of {self._model.key}", self._host.run, self._note_error)
                )
            for worker in self.workers:
                tasks.create_task(keep_running(f"worker of {self._model.key}", worker.run, worker.note_error))

    def _note_error(self, error: ErrorReport) -> None:
        for worker in self.workers:
            worker.note_error(error)


class _Worker:
    """One of a model's worker processes, which can be started again and again.

    Args:
        on_waiting: called with each report of sessions that wait for room in the swarm.
    """

    def __init__(
        self,
        settings: Settings,
        model: ModelSettings,
        peers: Literal["public"] | tuple[str, ...],
        host: _PrivateHost | None,
        on_waiting: Callable[[_Worker], None],
    ) -> None:
        self._on_waiting = on_waiting
        self._settings = settings
        self._model = model
        self._peers = peers
        self._host = host
        self._connection: WorkerConnection | None = None
        self.started: WorkerStarted | None = None
        """None while it does not run."""
        self.report: StatusReported | None = None
        self.error: ErrorReport | None = None
        """Why it does not run."""
        self.sessions = 0
        """Open ones."""
        self.settled = asyncio.Event()
        """Set when it is known whether the worker can serve."""

    @property
    def connection(self) -> WorkerConnection:
        assert self._connection is not None, "only workers that run are chosen"
        return self._connection

    def note_error(self, error: ErrorReport) -> None:
        self.error = error
        self.settled.set()

    async def open_session(self, max_length: int, owner: str, *, is_stateless: bool) -> ProcessSession:
        connection, started = self.connection, self.started
        assert started is not None
        limit = started.max_session_length
        if max_length > limit:
            raise MaximumLengthExceededError(
                f"max_length {max_length} is over the {limit} tokens that a session of this model may have",
                limit=limit,
            )
        session_id = str(uuid.uuid4())
        self.sessions += 1
        try:
            await connection.open_session(session_id, max_length, owner=owner, is_stateless=is_stateless)
        except BaseException:
            self._session_ended()
            raise
        return ProcessSession(connection, session_id, max_length, on_close=self._session_ended)

    def _session_ended(self) -> None:
        self.sessions -= 1

    async def run(self) -> None:
        """Start the process and attend to it until it ends. Raises if it could not serve."""
        ours, theirs = socket.socketpair()
        with theirs:
            connection = await WorkerConnection.open(self._model.key, ours, self._receive_status)
            try:
                process = await ChildProcess.start(
                    WORKER_MODULE, str(theirs.fileno()), pass_fds=[theirs.fileno()]
                )
            except BaseException:
                connection.close()
                raise
        attending = asyncio.create_task(connection.run())
        ended = asyncio.create_task(process.wait())
        # A forked daemon of a killed worker may keep its end of the socket open: the process's end counts.
        ended.add_done_callback(lambda _: attending.cancel())
        try:
            async with asyncio.timeout(self._settings.engine.start_timeout_seconds):
                # The worker imports its libraries while the host still starts.
                started = await connection.start(await self._start_command())
            self._connection, self.started, self.error = connection, started, None
            logger.info("%s is ready", self._model.key)
            self.settled.set()
            await ended
            self.error = None  # that of a host which was lost meanwhile is not why the worker ended
            logger.warning("the worker of %s ended", self._model.key)
        except TimeoutError:
            raise EngineError(
                f"its worker did not start within {self._settings.engine.start_timeout_seconds:g} s "
                "(engine.start_timeout_seconds)"
            ) from None
        finally:
            self._connection = self.started = self.report = None
            connection.close()
            await process.stop()
            attending.cancel()
            await asyncio.gather(attending, ended, return_exceptions=True)

    def shares_swarm_with(self, other: _Worker) -> bool:
        return self._host is other._host and self._peers == other._peers

    def shares_blocks_with(self, other: _Worker) -> bool:
        """Whether both take room of the same servers; they may have different adapters."""
        if self.started is None or other.started is None:
            return False
        return self.shares_swarm_with(other) and self.started.dht_prefix == other.started.dht_prefix

    def residents(self) -> int:
        """How many of its sessions held caches when it last said."""
        return self.report.resident_sessions if self.report else 0

    def give_back_caches(self, *, recalls: bool) -> None:
        if self._connection:
            self._connection.give_back_caches(recalls=recalls)

    def _receive_status(self, report: StatusReported) -> None:
        self.report = report
        if report.waiting_generations:
            self._on_waiting(self)

    async def _start_command(self) -> StartWorker:
        model, swarm, engine = self._model, self._settings.swarm, self._settings.engine
        limits = self._settings.limits
        peers = self._peers
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
            head=engine.head,
            max_session_length=model.chat.max_session_length,
            prefill_chunk_tokens=swarm.prefill_chunk_tokens,
            max_waiting=limits.max_waiting_generations,
            queue_timeout=limits.queue_timeout_seconds,
            cache_idle_timeout=swarm.cache_idle_timeout_seconds,
            prefix_idle_timeout=limits.session_idle_timeout_seconds if engine.reuse_prefixes else 0,
            max_retries=swarm.max_retries,
            request_timeout=swarm.request_timeout_seconds,
            connect_timeout=swarm.connect_timeout_seconds,
            update_period=swarm.update_period_seconds,
            chat_template=model.chat.template,
            chat_separator=model.chat.sep_token or "\n",
        )


async def keep_running(
    what: str, run: Callable[[], Awaitable[None]], note_error: Callable[[ErrorReport], None]
) -> NoReturn:
    """Start a process again whenever it has ended, after a pause that doubles with each failure in a row."""
    loop = asyncio.get_running_loop()
    pause = FIRST_PAUSE_SECONDS
    while True:
        began = loop.time()
        try:
            await run()
        except PetalsChatError as error:
            note_error(error.report())
            logger.warning("%s: %s", what, error.message)
        except Exception:
            note_error(InternalError().report())
            logger.exception("%s ended with an error", what)
        if loop.time() - began >= STABLE_AFTER_SECONDS:
            pause = FIRST_PAUSE_SECONDS
        logger.info("starting the %s again in %g s", what, pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _sum_of(reports: Sequence[StatusReported]) -> StatusReported | None:
    """What the workers of a model report together; each sees the same swarm."""
    if len(reports) <= 1:
        return reports[0] if reports else None
    counts = [name for name, value in msgspec.structs.asdict(reports[0]).items() if isinstance(value, int)]
    sums = {name: sum(getattr(report, name) for report in reports) for name in counts}
    return msgspec.structs.replace(reports[0], **sums)


def state_of_serving(report: StatusReported) -> ModelState:
    """How a model is whose worker runs and has reported."""
    if report.swarm.missing_blocks:
        return ModelState.BROKEN
    # The room of contexts that nobody uses counts as free: whoever needs it gets it within a second.
    nobody_gives_way = report.resident_sessions <= report.running_generations
    if report.waiting_generations or (report.swarm.full_blocks and nobody_gives_way):
        return ModelState.FULL
    return ModelState.READY


class _HostReady(msgspec.Struct, frozen=True):
    """The line in which a host says that it serves, or why it cannot."""

    peers: tuple[str, ...] = ()
    dht_prefix: str = ""
    start: int = 0
    end: int = 0
    num_blocks: int = 0
    join_token: str | None = None
    """With which other machines join."""
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

    @property
    def join_command(self) -> str | None:
        """None as long as the host has not served for the first time."""
        ready = self._first_ready
        token = ready.result().join_token if ready and ready.done() and not ready.cancelled() else None
        needs_directory = Path(self._model.repository).is_dir()
        return join_command(token, needs_directory=needs_directory) if token else None

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
        except BaseException:
            os.close(read_fd)
            raise
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
                self._log_ready(ready)
            code = await process.wait()
            raise EngineError(f"the Petals host on this machine ended with exit code {code}")
        finally:
            await process.stop()

    def _log_ready(self, ready: _HostReady) -> None:
        if ready.end - ready.start == ready.num_blocks:
            logger.info("the host of %s serves all its blocks on this machine", self._model.key)
        else:
            logger.warning(
                "the host of %s serves blocks %d:%d of %d: there is no memory for more on this machine",
                *(self._model.key, ready.start, ready.end, ready.num_blocks),
            )
        if not all(map(is_loopback, ready.peers)):
            logger.info("another machine joins the swarm of %s with: %s", self._model.key, self.join_command)

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
