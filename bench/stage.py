"""One case on its stage: the processes that it needs, and the contenders in turns."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from cases import Case, Load, Visit
from contenders import (
    OPENING_TIMEOUT_SECONDS,
    PATIENCE_SECONDS,
    BareContender,
    Contender,
    InterleavedContender,
    MessageContender,
    StreamContender,
)
from measuring import pss_megabytes
from processes import BenchError, Gateway, Host, Reference, Script, Served
from report import (
    BARE,
    GATEWAY,
    GATEWAY_BESIDE,
    REFERENCE,
    REFERENCE_BESIDE,
    STREAM,
    Measured,
)
from rounds import Opening


class Stage:
    """A host, and beside it the gateway, the reference, the bare loop and the users. A context manager.

    Args:
        rounds: of each contender under each load.
        threads: of torch in each process; 0 = as torch chooses.
        use_generate: see reference.py.
    """

    def __init__(self, case: Case, *, rounds: int, threads: int, use_generate: bool) -> None:
        self._case, self._rounds, self._threads = case, rounds, threads
        self._use_generate = use_generate
        self._processes = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as processes:
            directory = Path(
                processes.enter_context(tempfile.TemporaryDirectory(prefix="petals-chat-bench-"))
            )
            self._start(directory, processes)
            self._processes = processes.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    def _start(self, directory: Path, processes: contextlib.ExitStack) -> None:
        case, threads = self._case, self._threads
        repository, settings = case.model(directory)
        cache_tokens = case.cache_tokens(self._rounds)
        self._host = processes.enter_context(Host(repository, case.dtype, cache_tokens, directory, threads))
        ready = self._host.wait_until_ready()
        served = Served(repository, case.dtype, ready.peers, ready.dht_prefix)
        options = {
            "repository": repository,
            "peers": ready.peers,
            "dht_prefix": ready.dht_prefix,
            "dtype": case.dtype,
            "threads": threads,
        }
        self._gateway = processes.enter_context(Gateway(settings, served, directory, threads))
        self._reference = processes.enter_context(
            Reference("reference", directory, **options, use_generate=self._use_generate)
        )
        self._bare = processes.enter_context(Script("bare_loop", directory, **options))
        self._users = processes.enter_context(Script("load", directory))
        for process in (self._gateway, self._reference, self._bare, self._users):
            process.wait_until_ready()

    def measure(self, deadline: float, only_users: Sequence[int] = ()) -> Iterator[Measured]:
        """All loads of the case, as far as there is time until ``deadline`` of the monotonic clock."""
        if self._case.visit:
            yield from self._visit(self._case.visit)
        for load in self._case.loads:
            if only_users and load.users not in only_users:
                continue
            if time.monotonic() > deadline:
                raise BenchError(f"{load.users} users, {load.prompt_tokens} tokens: skipped, the time is up")
            yield from self._take_turns(load)

    def _take_turns(self, load: Load) -> list[Measured]:
        """Rounds of the contenders in turns, whose sessions all stay open meanwhile.

        So other work on the machine hits all alike, and no contender always comes first.
        """
        contenders = self._contenders(load)
        length = load.session_length(self._rounds)
        entrants = [
            _Entrant(contender, Measured(self._case.name, contender.name, load.users, load.prompt_tokens))
            for contender in contenders
        ]
        for entrant in entrants:
            entrant.attempt(lambda contender, measured: contender.open(load, length, measured))
        for number in range(self._rounds):
            first = number % len(entrants)
            for entrant in entrants[first:] + entrants[:first]:
                entrant.attempt(
                    lambda contender, measured: contender.run(load, length, self._host.pid, measured)
                )
        for entrant in entrants:
            entrant.attempt(lambda contender, _: contender.close())
        return [entrant.measured for entrant in entrants]

    def _contenders(self, load: Load) -> list[Contender]:
        if load.beside:
            return [
                MessageContender(GATEWAY, self._gateway, self._users),
                InterleavedContender(GATEWAY_BESIDE, self._gateway, self._users),
                MessageContender(REFERENCE, self._reference, self._users),
                InterleavedContender(REFERENCE_BESIDE, self._reference, self._users),
            ]
        return [
            MessageContender(GATEWAY, self._gateway, self._users),
            StreamContender(STREAM, self._gateway, self._users),
            MessageContender(REFERENCE, self._reference, self._users),
            BareContender(BARE, self._bare),
        ]

    def _visit(self, visit: Visit) -> Iterator[Measured]:
        """The servers of API v2 one after the other."""
        for name, server in ((GATEWAY, self._gateway), (REFERENCE, self._reference)):
            measured = Measured(self._case.name, name, visit.users, visit.prompt_tokens)
            opening = self._users.ask(
                "visit",
                OPENING_TIMEOUT_SECONDS + PATIENCE_SECONDS,
                url=server.url,
                users=visit.users,
                prompt=visit.prompt,
                max_length=visit.session_length,
                tokens=visit.tokens_each,
                patience=OPENING_TIMEOUT_SECONDS,
            )
            measured.note_opening(Opening(**opening))
            measured.note_memory(pss_megabytes(server.pid))
            yield measured


class _Entrant:
    """A contender under one load. When it fails it is out, and its process is started anew for the next load.

    Petals' own client now and then hangs when many sessions are opened in the same moment.
    """

    def __init__(self, contender: Contender, measured: Measured) -> None:
        self._contender = contender
        self.measured = measured
        self._is_out = False

    def attempt(self, work: Callable[[Contender, Measured], None]) -> None:
        if self._is_out:
            return
        try:
            work(self._contender, self.measured)
            self.measured.note_memory(pss_megabytes(self._contender.process.pid))
        except BenchError as error:
            self._is_out = True
            self.measured.errors.append(str(error))
            self._contender.process.restart()
