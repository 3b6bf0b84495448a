"""The server as its users start it, with the built-in model: one that a test can end and start again."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import psutil

from petals_chat.models.bundled import DIRECTORY
from tests.contract.serving import STOP_TIMEOUT_SECONDS, Server, running_server


class _Ended(Exception):
    """Ends the watch over a server that was ended."""


class RealServer:
    """``petals-chat serve``, always at the same address and with the same data.

    Args:
        directory: has its configuration and its data.
        configuration: more TOML than where its data and its port are.
    """

    def __init__(self, directory: Path, configuration: str = "") -> None:
        self._port = free_port()
        self._config = directory / "petals-chat.toml"
        self._config.write_text(
            f'[server]\nport = {self._port}\n[engine]\ndata_dir = "{directory / "data"}"\n{configuration}'
        )
        self._watch = ExitStack()
        self._server: Server | None = None

    @property
    def url(self) -> str:
        """Where its page is."""
        return f"http://127.0.0.1:{self._port}/"

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Return when its model is ready."""
        self._server = self._watch.enter_context(running_server(self._config))

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """Start it while the block is gone through; its model is ready after that."""
        start = asyncio.create_task(asyncio.to_thread(self.start))
        try:
            yield
        finally:
            await start

    def end(self, number: signal.Signals) -> None:
        """End it by this signal; returns when nothing is left of it."""
        assert self._server is not None
        process = self._server.process
        family = [process, *process.children(recursive=True)]
        process.send_signal(number)
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_SECONDS)
        assert alive == []
        with suppress(_Ended):
            self._watch.__exit__(_Ended, _Ended(), None)
        self._server = None

    def kill_worker(self) -> None:
        """Kill the process that runs the model."""
        assert self._server is not None
        self._server.worker(DIRECTORY).kill()

    def close(self) -> None:
        """Stop it in order, if it runs."""
        self._watch.close()


def free_port() -> int:
    """One that nobody is given by chance, so that it is still free when the server is started again."""
    while True:
        port = random.randint(20_000, 30_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
