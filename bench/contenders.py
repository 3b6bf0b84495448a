"""Who is compared, in the same words: open sessions for a load, run a round in them, close them."""

from __future__ import annotations

from typing import Any, Protocol

from cases import Load
from processes import ApiServer, BenchError, Process, Script
from report import Measured
from rounds import Opening, Round

OPENING_TIMEOUT_SECONDS = 30.0
ROUND_TIMEOUT_SECONDS = 30.0
PATIENCE_SECONDS = 15.0
"""Beyond a time-out that a process observes itself, before it counts as stuck."""


class Contender(Protocol):
    """A way of getting tokens. What fails raises `BenchError`; the contender's process is of no use then."""

    name: str

    @property
    def process(self) -> Process:
        """Whose cost is counted."""

    def open(self, load: Load, session_length: int, measured: Measured) -> None:
        """Let all users begin at the same moment, and wait for everyone's first token."""

    def run(self, load: Load, session_length: int, host: int, measured: Measured) -> None:
        """One round. ``host``: process id."""

    def close(self) -> None:
        """End the sessions."""


class MessageContender:
    """A server of API v2, asked as clients of 2023 ask: a message for each token, a reply for each message."""

    def __init__(self, name: str, process: ApiServer, users: Script) -> None:
        self.name, self.process = name, process
        self._users = users

    def open(self, load: Load, session_length: int, measured: Measured) -> None:
        opening = self._users.ask(
            "open",
            OPENING_TIMEOUT_SECONDS + PATIENCE_SECONDS,
            group=self.name,
            url=self.process.url,
            users=load.users,
            prompt=load.prompt,
            max_length=session_length,
            patience=OPENING_TIMEOUT_SECONDS,
        )
        measured.note_opening(Opening(**opening))
        if not opening["served"]:
            raise BenchError("no user was served")

    def run(self, load: Load, session_length: int, host: int, measured: Measured) -> None:
        result = self._users.ask(
            "run",
            ROUND_TIMEOUT_SECONDS + PATIENCE_SECONDS,
            group=self.name,
            tokens=load.tokens_each,
            contender=self.process.pid,
            host=host,
            patience=ROUND_TIMEOUT_SECONDS,
        )
        measured.note_round(Round(**result))

    def close(self) -> None:
        self._users.ask("close", PATIENCE_SECONDS, group=self.name)


class InterleavedContender(MessageContender):
    """The same, while one more user sends long prompts. What is measured is the time of the others between tokens,
    and as "first" that of the long prompts."""

    def open(self, load: Load, session_length: int, measured: Measured) -> None:
        super().open(load, session_length, measured)
        measured.first_token_seconds.clear()

    def run(self, load: Load, session_length: int, host: int, measured: Measured) -> None:
        assert load.beside is not None
        result: dict[str, Any] = self._users.ask(
            "interleave",
            2 * ROUND_TIMEOUT_SECONDS + PATIENCE_SECONDS,
            group=self.name,
            tokens=load.tokens_each,
            url=self.process.url,
            long_prompt=load.beside.text,
            max_length=load.beside.session_length,
            contender=self.process.pid,
            host=host,
            patience=ROUND_TIMEOUT_SECONDS,
        )
        measured.first_token_seconds += result["prompt_seconds"]
        measured.note_round(Round(**result["round"]))


class StreamContender:
    """A server of API v2, asked once for a stream of replies; each round has new sessions."""

    def __init__(self, name: str, process: ApiServer, users: Script) -> None:
        self.name, self.process = name, process
        self._users = users

    def open(self, load: Load, session_length: int, measured: Measured) -> None:
        """Each round does it."""

    def run(self, load: Load, session_length: int, host: int, measured: Measured) -> None:
        result: dict[str, Any] = self._users.ask(
            "stream",
            ROUND_TIMEOUT_SECONDS + PATIENCE_SECONDS,
            url=self.process.url,
            users=load.users,
            prompt=load.prompt,
            max_length=session_length,
            tokens=load.tokens_each,
            contender=self.process.pid,
            host=host,
            patience=ROUND_TIMEOUT_SECONDS,
        )
        measured.note_opening(Opening(**result["opening"]))
        if not result["opening"]["served"]:
            raise BenchError("no user was served")
        measured.note_round(Round(**result["round"]))

    def close(self) -> None:
        """Each round does it."""


class BareContender:
    """Sessions of Petals without API, head and sampling; see bare_loop.py."""

    def __init__(self, name: str, process: Script) -> None:
        self.name, self.process = name, process

    def open(self, load: Load, session_length: int, measured: Measured) -> None:
        opening = self.process.ask(
            "open",
            OPENING_TIMEOUT_SECONDS + PATIENCE_SECONDS,
            users=load.users,
            prompt_tokens=load.prompt_tokens,
            max_length=session_length,
        )
        measured.note_opening(Opening(**opening))
        if not opening["served"]:
            raise BenchError("no user was served")

    def run(self, load: Load, session_length: int, host: int, measured: Measured) -> None:
        result = self.process.ask(
            "run",
            ROUND_TIMEOUT_SECONDS + PATIENCE_SECONDS,
            tokens=load.tokens_each,
            contender=self.process.pid,
            host=host,
            patience=ROUND_TIMEOUT_SECONDS,
        )
        measured.note_round(Round(**result))

    def close(self) -> None:
        self.process.ask("close", PATIENCE_SECONDS)
