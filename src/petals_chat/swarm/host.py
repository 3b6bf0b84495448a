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
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from petals_chat.errors import (
    ConfigurationError,
    EngineError,
    ErrorReport,
    InternalError,
    PetalsChatError,
)
from petals_chat.swarm.host_display import HostDisplay, block_ranges
from petals_chat.swarm.host_options import HostOptions, HostReady
from petals_chat.swarm.host_plan import HostPlan, make_plan
from petals_chat.swarm.join_token import (
    JoinToken,
    encode_token,
    is_address,
    is_loopback,
    join_command,
    shortened,
)
from petals_chat.swarm.processes import descendants, kill

if TYPE_CHECKING:
    from petals_chat.swarm.server import BlockServer

logger = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 2.5
"""How long leaving the swarm may take before everything is ended the hard way."""
CHECK_PERIOD_SECONDS = 1.0
OPEN_FILES = 1 << 16
PUBLISH_PERIOD_SECONDS = 15.0
RECORD_VALID_SECONDS = 90.0
"""How long a swarm says what it serves after its last host has gone."""
TOKEN_ADDRESSES = 3
"""Of the host that makes the token; a machine has as many addresses as networks."""
FAILED, UNUSABLE_CONFIGURATION = 1, 2


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
        is_quiet = options.json or options.ready_fd is not None  # then a program speaks for this process
        self._display = HostDisplay(sys.stdout, is_quiet=is_quiet)
        self._server: BlockServer | None = None
        self._is_ready = False
        self._missing: list[int] = []
        self._error: Exception | None = None

    def serve(self) -> int:
        worker = threading.Thread(target=self._work, daemon=True)
        worker.start()
        connected = self._wait_for_stop()
        self._display.clear()
        if not self._options.debug:  # no complaints of what is being taken apart
            logging.disable(logging.CRITICAL)
            threading.excepthook = lambda _: None
        started = descendants()
        if self._server and connected:
            self._server.stop()
            worker.join(STOP_TIMEOUT_SECONDS)
        kill([*started, *descendants()])
        return self._end(is_held_up=worker.is_alive() or _is_held_up())

    def _wait_for_stop(self) -> bool:
        """Whether the host is still connected to its swarm, and can leave it in order."""
        while not self.stop.wait(CHECK_PERIOD_SECONDS):
            if self._server:
                if not self._server.is_connected:
                    self._error = EngineError("the process that connects this host to its swarm has ended")
                    return False
                self._show_state(self._server)
        return True

    def _show_state(self, server: BlockServer) -> None:
        if loading := server.loading:
            self._display.show_loading(*loading)
        elif self._is_ready and (load := server.load):
            self._display.show_load(load, self._missing, time.monotonic())

    def _work(self) -> None:
        try:
            self._serve_blocks()
        except Exception as error:
            self._error = self._error or error
        finally:
            self.stop.set()

    def _serve_blocks(self) -> None:
        plan = make_plan(self._options)

        from petals_chat.swarm.server import BlockServer, Stopped

        if self.stop.is_set():
            return
        self._server = server = BlockServer(plan.options, plan.checkpoint, plan.family, plan.device)
        if self.stop.is_set():
            server.stop()
        self._display.say(f"Loading {server.description}")
        threading.Thread(target=self._attend, args=(server, plan), daemon=True).start()
        try:
            with contextlib.suppress(Stopped):
                server.run()
        finally:
            server.close()

    def _attend(self, server: BlockServer, plan: HostPlan) -> None:
        """Tell when the server can be used; then tell the swarm again and again what is served."""
        try:
            if not server.wait_until_online():
                return
            self._introduce(server, plan)
        except Exception as error:
            self._error = self._error or error
            self.stop.set()
        while not self.stop.wait(PUBLISH_PERIOD_SECONDS):
            try:
                self._look_at_swarm(server, plan)
            except Exception as error:
                logger.debug("the swarm cannot be asked: %r", error)

    def _look_at_swarm(self, server: BlockServer, plan: HostPlan) -> None:
        if plan.options.initial_peers != "public":
            server.publish(plan.record, valid_seconds=RECORD_VALID_SECONDS)
        self._missing = server.missing_blocks()

    def _introduce(self, server: BlockServer, plan: HostPlan) -> None:
        self._look_at_swarm(server, plan)
        ready = server.ready
        if plan.options.initial_peers != "public":
            ready = msgspec.structs.replace(ready, join_token=_join_token(ready, plan))
        self._report(ready)
        if self._options.json:
            with contextlib.suppress(BrokenPipeError):
                print(msgspec.json.encode(ready).decode(), flush=True)
        for line in introduction(ready, plan, self._missing):
            self._display.say(line)
        self._is_ready = True

    def _report(self, line: HostReady | dict[str, ErrorReport]) -> bool:
        """Write the only line to ``ready_fd``; returns whether there was such a descriptor, and not used yet."""
        if self._ready_fd is None:
            return False
        fd, self._ready_fd = self._ready_fd, None
        with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "wb") as pipe:
            pipe.write(msgspec.json.encode(line) + b"\n")
        return True

    def _end(self, *, is_held_up: bool) -> int:
        """The exit code, after the error was told to the parent, if there is one who reads.

        Args:
            is_held_up: end the process here, without threads that wait for what will not come any more.

        Raises:
            Exception: the error, if the caller is to tell it.
        """
        error = self._error
        is_told = error is not None and self._report({"error": _error_report(error)})
        code = _exit_code(error)
        if is_held_up:
            if error and not is_told:
                print(f"petals-chat: {error}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if error and not (is_told and isinstance(error, PetalsChatError)):
            raise error
        return code


def introduction(ready: HostReady, plan: HostPlan, missing: Sequence[int]) -> Iterator[str]:
    """What a person reads when the host serves."""
    yield f"Serving blocks {ready.start}:{ready.end} of {ready.num_blocks}. Ctrl-C stops."
    if ready.join_token is None:
        return
    if missing:
        yield f"Nobody serves blocks {block_ranges(missing)} yet: more machines are needed."
    yield "Only this machine can join, with" if _is_local(ready) else "Another machine joins this swarm with"
    yield f"    {join_command(ready.join_token, needs_directory=plan.record.model is None)}"
    if plan.record.model is None:
        yield "where DIRECTORY is its copy of the model,"
    yield "and a gateway uses it with, in petals-chat.toml,"
    yield f'    [swarm]\n    initial_peers = ["{shortened(ready.peers, 1)[0]}"]'


def _join_token(ready: HostReady, plan: HostPlan) -> str:
    """Addresses of this host, and one of the swarm that it has joined, in case that this host goes away."""
    known = tuple(peer for peer in plan.options.initial_peers if is_address(peer))[:1]
    peers = dict.fromkeys((*shortened(ready.peers, TOKEN_ADDRESSES), *known))
    return encode_token(JoinToken(ready.dht_prefix, plan.record.digest, tuple(peers)))


def _is_local(ready: HostReady) -> bool:
    return all(map(is_loopback, ready.peers))


def _raise_file_limit() -> None:
    """Petals has a dozen pipes for each block, hivemind a socket for each session."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _exit_code(error: Exception | None) -> int:
    if error is None:
        return 0
    return UNUSABLE_CONFIGURATION if isinstance(error, ConfigurationError) else FAILED


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
