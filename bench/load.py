"""The users: WebSocket clients of API v2 in a process of their own, so that their cost is nobody's.

    python bench/load.py

reads commands from standard input; see `rounds.serve_commands`. Users of several servers can be connected at the
same time; each command says which ones are meant.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from measuring import CpuClock
from rounds import InterleavedRound, Opening, Round, StreamRound, report, serve_commands

SAMPLING = {"do_sample": 1, "temperature": 0.6, "top_p": 0.9}
"""What chat pages send."""
NEVER = "\x00never\x00"
"""A stop sequence that does not come, so that a stream goes on."""

MAX_ERROR_CHARS = 120


class Refused(Exception):
    """The server answered with an error."""


class User:
    """One connection and its session."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket

    @classmethod
    async def connect(cls, url: str, max_length: int) -> User:
        """Connect, and ask for a session; the answer is awaited with the first token."""
        websocket = await connect(url, compression=None, ping_interval=None, open_timeout=60)
        user = cls(websocket)
        await user.send({"type": "open_inference_session", "max_length": max_length})
        return user

    async def send(self, message: dict[str, Any]) -> None:
        await self._websocket.send(json.dumps(message))

    async def receive(self) -> dict[str, Any]:
        """The next reply.

        Raises:
            Refused: it is an error, or the connection was closed.
        """
        try:
            reply: dict[str, Any] = json.loads(await self._websocket.recv())
        except ConnectionClosed as error:
            raise Refused("the connection was closed") from error
        if not reply["ok"]:
            raise Refused(reply["traceback"].strip().splitlines()[-1][:MAX_ERROR_CHARS])
        return reply

    async def first_token(self, prompt: str, *, stream: bool) -> dict[str, Any]:
        """Send the prompt, and wait for the reply with the first token of the answer."""
        await self.ask(prompt, stream=stream)
        await self.receive()  # {"ok": true}: the session is open
        return await self.receive()

    async def ask(self, inputs: str | None, *, stream: bool) -> None:
        """Ask for one token in one reply, or for a stream of replies with one token each."""
        stop = {"stop_sequence": NEVER} if stream else {}
        await self.send({"type": "generate", "inputs": inputs, "max_new_tokens": 1, **SAMPLING, **stop})

    async def close(self) -> None:
        await self._websocket.close()


class Load:
    """All users."""

    def __init__(self) -> None:
        self._users: dict[str, list[User]] = {}

    async def open(
        self, group: str, url: str, users: int, prompt: str, max_length: int, patience: float
    ) -> Opening:
        """Connect users who all begin at the same moment, and wait for everyone's first token."""
        opening = Opening()
        connected = await asyncio.gather(*(User.connect(url, max_length) for _ in range(users)))
        served = self._users[group] = []
        began = time.monotonic()

        async def begin(user: User) -> None:
            await user.first_token(prompt, stream=False)
            opening.first_token_seconds.append(time.monotonic() - began)
            opening.served += 1
            served.append(user)

        await _all(_noted(opening, begin(user), patience) for user in connected)
        await _all(user.close() for user in connected if user not in served)
        return opening

    async def run(self, group: str, tokens: int, contender: int, host: int, patience: float) -> Round:
        """Token by token: everyone asks for one token, waits for it, asks for the next, ``tokens`` times.

        Where that is slow, a round has fewer tokens: after half of the patience nobody asks for another one.
        """
        result = Round()
        await _measured(result, contender, host, self._all_ask_on(result, group, tokens, patience))
        return result

    async def interleave(
        self,
        group: str,
        tokens: int,
        url: str,
        long_prompt: str,
        max_length: int,
        contender: int,
        host: int,
        patience: float,
    ) -> InterleavedRound:
        """As `run`, while another user sends a long prompt, waits for a token, leaves, and comes with the next one.

        The last prompt's end is awaited, but not measured.
        """
        result = InterleavedRound(round=Round())
        enough = asyncio.Event()

        async def send_prompts() -> None:
            while not enough.is_set():
                began = time.monotonic()
                user = await User.connect(url, max_length)
                try:
                    await user.first_token(long_prompt, stream=False)
                finally:
                    await user.close()
                result.prompt_seconds.append(time.monotonic() - began)

        prompting = asyncio.create_task(_noted(result.round, send_prompts(), 2 * patience))
        await _measured(
            result.round, contender, host, self._all_ask_on(result.round, group, tokens, patience)
        )
        enough.set()
        await prompting
        return result

    async def _all_ask_on(self, result: Round, group: str, tokens: int, patience: float) -> None:
        until = time.monotonic() + patience / 2

        async def ask_on(user: User) -> None:
            before = time.monotonic()
            for _ in range(tokens):
                if before > until:
                    return
                await user.ask(None, stream=False)
                await user.receive()
                now = time.monotonic()
                result.gaps.append(now - before)
                result.tokens += 1
                before = now

        await _all(_noted(result, ask_on(user), patience) for user in self._users[group])

    async def stream(
        self,
        url: str,
        users: int,
        prompt: str,
        max_length: int,
        tokens: int,
        contender: int,
        host: int,
        patience: float,
    ) -> StreamRound:
        """Streams of replies, measured from the moment when all users have their first token.

        A stream cannot be paused, so each round has new sessions; their beginning is not measured. The round
        ends for all when ``tokens`` for each user, on average, have come, or after half of the patience.
        """
        stream = _StreamedRound(users, tokens * users)
        connected = await asyncio.gather(*(User.connect(url, max_length) for _ in range(users)))
        listening = [
            asyncio.create_task(_noted(stream.opening, stream.listen(user, prompt), patience))
            for user in connected
        ]
        await _first_of(stream.all_began.wait(), asyncio.wait(listening))
        await _measured(
            stream.round,
            contender,
            host,
            _first_of(stream.enough.wait(), asyncio.wait(listening), asyncio.sleep(patience / 2)),
        )
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
        await _all(user.close() for user in connected)
        return StreamRound(opening=stream.opening, round=stream.round)

    async def visit(
        self, url: str, users: int, prompt: str, max_length: int, tokens: int, patience: float
    ) -> Opening:
        """Users who come at the same moment, ask for ``tokens`` one by one, and leave."""
        opening = Opening()
        began = time.monotonic()

        async def one_visit() -> None:
            user = await User.connect(url, max_length)
            try:
                await user.first_token(prompt, stream=False)
                first = time.monotonic() - began
                for _ in range(tokens - 1):
                    await user.ask(None, stream=False)
                    await user.receive()
            finally:
                await user.close()
            opening.served += 1
            opening.first_token_seconds.append(first)

        await _all(_noted(opening, one_visit(), patience) for _ in range(users))
        return opening

    async def close(self, group: str) -> bool:
        """Disconnect users."""
        await _all(user.close() for user in self._users.pop(group, []))
        return True


class _StreamedRound:
    """Counts the tokens of all streams from the moment when each has begun."""

    def __init__(self, users: int, tokens: int) -> None:
        self.opening, self.round = Opening(), Round()
        self.all_began, self.enough = asyncio.Event(), asyncio.Event()
        self._beginning, self._tokens = users, tokens

    async def listen(self, user: User, prompt: str) -> None:
        """Take a user's tokens until cancelled."""
        asked = time.monotonic()
        try:
            reply = await user.first_token(prompt, stream=True)
            self.opening.first_token_seconds.append(time.monotonic() - asked)
            self.opening.served += 1
        finally:
            self._beginning -= 1
            if self._beginning == 0:
                self.all_began.set()
        before = time.monotonic()
        while True:
            if reply["stop"]:  # the model has ended its text
                await user.ask(None, stream=True)
            reply = await user.receive()
            now = time.monotonic()
            if self.all_began.is_set():
                self.round.gaps.append(now - before)
                self.round.tokens += 1
            if self.round.tokens >= self._tokens:
                self.enough.set()
            before = now


async def _noted(result: Opening | Round, work: Awaitable[None], patience: float) -> None:
    """Do a user's work; why it failed becomes part of the result."""
    try:
        async with asyncio.timeout(patience):
            await work
    except TimeoutError:
        result.errors.append(f"no answer within {patience:g} s")
    except (Refused, OSError) as error:
        result.errors.append(str(error))


async def _measured(result: Round, contender: int, host: int, work: Awaitable[None]) -> None:
    clock, host_clock = CpuClock([contender]), CpuClock([host])
    cpu, host_cpu, began = clock.seconds(), host_clock.seconds(), time.monotonic()
    await work
    result.seconds = time.monotonic() - began
    result.cpu_seconds = clock.seconds() - cpu
    result.host_cpu_seconds = host_clock.seconds() - host_cpu


async def _first_of(*works: Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.create_task(work) for work in works]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _all(works: Iterable[Awaitable[Any]]) -> None:
    await asyncio.gather(*works)


def main() -> None:
    load = Load()
    with asyncio.Runner() as runner:

        def blocking(method: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
            # Between two commands the loop stands still; servers must do without answers to pings then.
            return lambda **arguments: runner.run(method(**arguments))

        methods = (load.open, load.run, load.interleave, load.stream, load.visit, load.close)
        report({"ready": True})
        serve_commands({method.__name__: blocking(method) for method in methods})


if __name__ == "__main__":
    main()
