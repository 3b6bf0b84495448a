"""A Petals host as a process: checks what it is asked for, starts, says so, and stops in order.

Knows the life of the process; `petals_chat.swarm.server` knows Petals. Importing this module is quick: it
imports the rest when the options have been found good.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

import msgspec

from petals_chat.errors import (
    ConfigurationError,
    EngineError,
    ErrorReport,
    InternalError,
    PetalsChatError,
)
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.swarm.families import family_of
from petals_chat.swarm.host_options import HostOptions, HostReady, Quantization
from petals_chat.swarm.processes import descendants, kill

if TYPE_CHECKING:
    from petals_chat.swarm.server import BlockServer

STOP_TIMEOUT_SECONDS = 2.5
"""How long leaving the swarm may take before everything is ended the hard way."""
CHECK_PERIOD_SECONDS = 1.0
OPEN_FILES = 1 << 16


def serve_host(options: HostOptions) -> int:
    """Serve until SIGINT, SIGTERM or, if that was chosen, the end of standard input.

    Must run in the main thread. All processes that it starts are gone when it returns.

    Returns:
        The exit code.

    Raises:
        ConfigurationError: the options cannot be served.
        SwarmUnreachableError: none of the initial peers answers.
        EngineError: the host broke down while it served.
    """
    _raise_file_limit()
    host = _Host(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: host.stop.set())
    if options.exit_with_stdin:
        threading.Thread(target=_set_at_end_of_stdin, args=(host.stop,), daemon=True).start()
    return host.serve()


class _Host:
    """The work is done in other threads, so that a signal is heeded whatever they wait for."""

    def __init__(self, options: HostOptions) -> None:
        self.stop = threading.Event()
        self._options = options
        self._ready_fd = options.ready_fd
        self._server: BlockServer | None = None
        self._error: Exception | None = None

    def serve(self) -> int:
        worker = threading.Thread(target=self._work, daemon=True)
        worker.start()
        connected = self._wait_for_stop()
        if not self._options.debug:  # no complaints of what is being taken apart
            logging.disable(logging.CRITICAL)
            threading.excepthook = lambda _: None
        started = descendants()
        if self._server and connected:
            self._server.stop()
            worker.join(STOP_TIMEOUT_SECONDS)
        kill([*started, *descendants()])
        if self._error:
            self._report({"error": _error_report(self._error)})
        if worker.is_alive() or _is_held_up():
            self._exit_now()
        if self._error:
            raise self._error
        return 0

    def _wait_for_stop(self) -> bool:
        """Whether the host is still connected to its swarm, and can leave it in order."""
        while not self.stop.wait(CHECK_PERIOD_SECONDS):
            if self._server and not self._server.is_connected:
                self._error = EngineError("the process that connects this host to its swarm has ended")
                return False
        return True

    def _work(self) -> None:
        try:
            self._serve_blocks()
        except Exception as error:
            self._error = self._error or error
        finally:
            self.stop.set()

    def _serve_blocks(self) -> None:
        options = self._options
        checkpoint = open_checkpoint(options.model, options.revision)
        family = family_of(checkpoint.model_type)
        _require_blocks(options.blocks, checkpoint.num_blocks)
        _require_free_port(options.address, options.port)

        from petals_chat.head.precision import resolve_device
        from petals_chat.swarm import compat

        device = resolve_device(options.device)
        if options.quantization is not Quantization.NONE and device.type != "cuda":
            raise ConfigurationError(
                f"--quantization {options.quantization}: blocks can be quantised on a CUDA device only"
            )
        compat.install()
        compat.log_to_stderr(debug=options.debug)

        from petals_chat.swarm.server import BlockServer, Stopped

        self._server = server = BlockServer(options, checkpoint, family, device)
        if self.stop.is_set():
            server.stop()
        self._say(f"Loading {server.description}")
        threading.Thread(target=self._attend, args=(server,), daemon=True).start()
        try:
            with contextlib.suppress(Stopped):
                server.run()
        finally:
            server.close()

    def _attend(self, server: BlockServer) -> None:
        """Tell when the server can be used."""
        try:
            if server.wait_until_online():
                ready = server.ready
                self._report(ready)
                self._introduce(ready)
        except Exception as error:
            self._error = self._error or error
            self.stop.set()

    def _introduce(self, ready: HostReady) -> None:
        self._say(f"Serving blocks {ready.start}:{ready.end} of {ready.num_blocks}. Ctrl-C stops.")
        if self._options.initial_peers == "public":
            return
        abroad = [peer for peer in ready.peers if "/127.0.0.1/" not in peer and "/::1/" not in peer]
        address = (abroad or ready.peers)[0]
        self._say("Another machine joins this swarm with" if abroad else "Only this machine can join, with")
        self._say(f"    petals-chat host {self._options.model} --initial-peers {address}")
        self._say("and a gateway uses it with, in petals-chat.toml,")
        self._say(f'    [swarm]\n    initial_peers = ["{address}"]')

    def _say(self, line: str) -> None:
        if self._options.ready_fd is None:  # else a parent speaks for this process
            with contextlib.suppress(BrokenPipeError):  # whoever read has read enough
                print(line, flush=True)

    def _report(self, line: HostReady | dict[str, ErrorReport]) -> None:
        """Write the only line to ``ready_fd``."""
        if self._ready_fd is None:
            return
        fd, self._ready_fd = self._ready_fd, None
        with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "wb") as pipe:
            pipe.write(msgspec.json.encode(line) + b"\n")

    def _exit_now(self) -> NoReturn:
        """End without threads that wait for what will not come any more."""
        if self._error:
            print(f"petals-chat: {self._error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if self._error else 0)


def _raise_file_limit() -> None:
    """Petals has a dozen pipes for each block, hivemind a socket for each session."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _is_held_up() -> bool:
    """Whether Python would wait for other threads at its end."""
    return any(
        not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()
    )


def _set_at_end_of_stdin(event: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    event.set()


def _error_report(error: Exception) -> ErrorReport:
    if isinstance(error, PetalsChatError):
        return error.report()
    internal = InternalError()
    internal.__cause__ = error
    return internal.report()


def _require_blocks(blocks: tuple[int, int] | None, num_blocks: int) -> None:
    if blocks and not 0 <= blocks[0] < blocks[1] <= num_blocks:
        raise ConfigurationError(
            f"--blocks {blocks[0]}:{blocks[1]}: the model has blocks 0:{num_blocks}; "
            "give the first one to serve, and the first one after it not to serve"
        )


def _require_free_port(address: str, port: int) -> None:
    """libp2p would share the port with another libp2p process, and each get half of the connections."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {address} port {port}: {error.strerror}. "
                "Choose another with --port, or another address of this machine with --address"
            ) from None
