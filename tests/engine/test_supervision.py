"""Processes that die: requests fail with the reason, the processes come back, and nothing is left at the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
import pytest_asyncio

from petals_chat.engine import supervisor
from petals_chat.engine.interface import ModelState
from petals_chat.engine.processes import ChildProcess
from petals_chat.engine.supervisor import ProcessEngine
from petals_chat.errors import (
    ErrorReport,
    MissingBlocksError,
    ModelLoadingError,
    ModelUnavailableError,
    SwarmUnreachableError,
    WorkerLostError,
)
from petals_chat.models.bundled import KEY, bundled_settings
from petals_chat.protocol.messages import GenerationRequest
from petals_chat.settings import Dtype, EngineSettings, ModelSettings, Settings

TIMEOUT_SECONDS = 60


def engine_settings(data_dir: Path, *models: ModelSettings) -> Settings:
    return Settings(
        models=models or (bundled_settings(),),
        engine=EngineSettings(data_dir=data_dir, dtype=Dtype.FLOAT32, threads=1),
    )


@pytest_asyncio.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessEngine]:
    """The default: a worker and a private host of this machine."""
    others = set(psutil.Process().children())
    async with ProcessEngine(engine_settings(tmp_path_factory.mktemp("data"))) as engine:
        await engine.wait_until_settled()
        _others.update(others)
        yield engine
        ours = [process for child in children() for process in (child, *child.children(recursive=True))]
    _, alive = psutil.wait_procs(ours, timeout=5)
    assert alive == []


_others: set[psutil.Process] = set()
"""Processes that other tests started."""


async def generate(engine: ProcessEngine, max_new_tokens: int = 8) -> str:
    session = await engine.open_session(KEY, 64)
    try:
        request = GenerationRequest("Hello", max_new_tokens=max_new_tokens)
        return "".join([chunk.text async for chunk in session.generate(request)])
    finally:
        await session.close()


def children() -> list[psutil.Process]:
    """What this module's engine started."""
    return [process for process in psutil.Process().children() if process not in _others]


def leader(word: str) -> psutil.Process:
    """The one of them with ``word`` in its command line."""
    (process,) = [process for process in children() if word in " ".join(process.cmdline())]
    return process


async def wait_for_end(processes: list[psutil.Process]) -> None:
    """It leaves the exit status of our own children to the event loop, which waits for it."""

    def is_alive(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(process.status() != psutil.STATUS_ZOMBIE)
        return False

    async with asyncio.timeout(20):
        while any(map(is_alive, processes)):
            await asyncio.sleep(0.01)


async def kill_host() -> None:
    host = leader("host")
    family = [host, *host.children(recursive=True)]
    host.kill()
    await wait_for_end(family)


async def wait_for_state(engine: ProcessEngine, state: ModelState) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while engine.statuses[KEY].state is not state:
            await asyncio.sleep(0.05)


async def test_a_killed_worker_fails_its_requests_and_comes_back(engine: ProcessEngine) -> None:
    expected = await generate(engine)
    session = await engine.open_session(KEY, 512)
    stream = session.generate(GenerationRequest("Hello", chunk_tokens=1))
    await anext(stream)
    worker = leader("engine.worker")
    family = [worker, *worker.children(recursive=True)]
    worker.kill()
    with pytest.raises(WorkerLostError, match="restarted"):
        async for _ in stream:
            pass
    await session.close()
    with pytest.raises(ModelLoadingError):
        await engine.open_session(KEY, 64)
    await wait_for_end(family)
    await wait_for_state(engine, ModelState.READY)
    assert await generate(engine) == expected


async def test_a_session_goes_on_identically_when_a_killed_host_is_back(engine: ProcessEngine) -> None:
    session = await engine.open_session(KEY, 64)
    first = [chunk.text async for chunk in session.generate(GenerationRequest("Hello", max_new_tokens=8))]
    undisturbed = await generate(engine, 16)
    await kill_host()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            try:
                request = GenerationRequest(None, max_new_tokens=8)
                second = [chunk.text async for chunk in session.generate(request)]
                break
            except (MissingBlocksError, SwarmUnreachableError):
                await asyncio.sleep(0.5)
    assert "".join(first + second) == undisturbed
    await session.close()


async def test_a_worker_that_loses_its_connection_to_the_swarm_is_replaced(engine: ProcessEngine) -> None:
    expected = await generate(engine)
    worker = leader("engine.worker")
    (p2pd,) = [child for child in worker.children(recursive=True) if child.name() == "p2pd"]
    p2pd.kill()
    await wait_for_end([worker])
    await wait_for_state(engine, ModelState.LOADING)
    await wait_for_state(engine, ModelState.READY)
    assert await generate(engine) == expected


async def test_a_worker_that_is_lost_long_after_its_host_was_is_being_loaded(engine: ProcessEngine) -> None:
    expected = await generate(engine)
    await kill_host()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            with contextlib.suppress(MissingBlocksError, SwarmUnreachableError):
                assert await generate(engine) == expected
                break
            await asyncio.sleep(0.5)
    worker = leader("engine.worker")
    family = [worker, *worker.children(recursive=True)]
    worker.kill()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while engine.statuses[KEY].worker is not None:
            await asyncio.sleep(0.01)
    with pytest.raises(ModelLoadingError):
        await engine.open_session(KEY, 64)
    await wait_for_end(family)
    await wait_for_state(engine, ModelState.READY)


async def test_a_worker_that_is_killed_while_its_host_starts_comes_back(tmp_path: Path) -> None:
    others = set(psutil.Process().children())

    def workers() -> list[psutil.Process]:
        ours = set(psutil.Process().children()) - others
        return [process for process in ours if "engine.worker" in " ".join(process.cmdline())]

    async with ProcessEngine(engine_settings(tmp_path)) as engine:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not workers():
                await asyncio.sleep(0.01)
        assert engine.statuses[KEY].state is ModelState.LOADING
        workers()[0].kill()
        await wait_for_state(engine, ModelState.READY)
        assert await generate(engine)


async def test_what_ends_with_any_error_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.0)
    is_started_again, errors = asyncio.Event(), list[ErrorReport]()

    async def run() -> None:
        if not errors:
            raise ZeroDivisionError
        is_started_again.set()
        await asyncio.Event().wait()

    running = asyncio.create_task(supervisor.keep_running("worker", run, errors.append))
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await is_started_again.wait()
    running.cancel()
    assert [error.code for error in errors] == ["internal_error"]


async def test_processes_that_cannot_be_spawned_leave_no_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.0)
    modules: list[str] = []

    async def start(module: str, *arguments: str, pass_fds: Sequence[int] = ()) -> NoReturn:
        modules.append(module)
        raise BlockingIOError

    monkeypatch.setattr(ChildProcess, "start", start)
    before = psutil.Process().num_fds()
    async with ProcessEngine(engine_settings(tmp_path)), asyncio.timeout(TIMEOUT_SECONDS):
        while min(map(modules.count, (supervisor.HOST_MODULE, supervisor.WORKER_MODULE))) < 50:
            await asyncio.sleep(0.01)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while psutil.Process().num_fds() >= before + 50:
            await asyncio.sleep(0.01)


async def test_a_model_that_cannot_be_started_says_why_and_others_go_on(tmp_path: Path) -> None:
    broken = ModelSettings(key="broken", repository=str(tmp_path / "nothing"), name="Broken")
    settings = engine_settings(tmp_path, broken)
    async with ProcessEngine(settings) as engine:
        await engine.wait_until_settled()
        assert engine.statuses["broken"].state is ModelState.UNAVAILABLE
        with pytest.raises(ModelUnavailableError, match="log says why") as raised:
            await engine.open_session("broken", 64)
        assert str(tmp_path) not in raised.value.message
        assert str(tmp_path / "nothing") in str(raised.value.__cause__)
