"""What a streamed token costs the gateway's own process: over server-sent events, beside a stream of API v2.

    python bench/openai_stream.py [--users N] [--tokens N] [--rounds N]

Both kinds of streams take turns on the same gateway and host, with the same prompt and sampling. Counted is the
processor time of the gateway's process alone; the worker's, the host's and that of the users, who are here, is not.
Prints a line for each round and, as the last line, all as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

from cases import SHORT_PROMPT, bundled_model
from load import SAMPLING, User
from processes import Gateway, Host, Served

HOST_CACHE_TOKENS = 65536
SESSION_TOKENS = 2048
THREADS = 1


class Clock:
    """Processor time of one process, all its threads, without its children."""

    def __init__(self, pid: int) -> None:
        self._threads = Path(f"/proc/{pid}/task")

    def seconds(self) -> float:
        """Time on a processor so far; the kernel counts in nanoseconds."""
        return (
            sum(int((thread / "schedstat").read_text().split()[0]) for thread in self._threads.iterdir())
            / 1e9
        )


class Round:
    """Counts tokens and processor time from the moment when all users have their first token."""

    def __init__(self, clock: Clock, users: int) -> None:
        self._clock = clock
        self._beginning = users
        self._cpu = self._began = 0.0
        self._tokens = 0

    def begin(self) -> None:
        """A user has the first token."""
        self._beginning -= 1
        if self._beginning == 0:
            self._cpu, self._began = self._clock.seconds(), time.monotonic()

    def count(self, tokens: int) -> None:
        """A user has more tokens."""
        if self._beginning == 0:
            self._tokens += tokens

    def figures(self) -> dict[str, float]:
        """What it came to by now."""
        seconds, cpu = time.monotonic() - self._began, self._clock.seconds() - self._cpu
        return {
            "microseconds_per_token": cpu / self._tokens * 1e6,
            "tokens_per_second": self._tokens / seconds,
        }


async def over_v2(url: str, tokens: int, result: Round) -> None:
    """A user who takes a stream of replies with one token each."""
    user = await User.connect(url, SESSION_TOKENS)
    try:
        await user.first_token(SHORT_PROMPT, stream=True)
        result.begin()
        for _ in range(tokens - 1):
            await user.receive()
            result.count(1)
    finally:
        await user.close()


async def over_events(url: str, tokens: int, result: Round) -> None:
    """A user who takes a chat completion as server-sent events, each with one token."""
    address = url.removeprefix("ws://").partition("/")[0]
    host, _, port = address.partition(":")
    body = json.dumps(
        {
            "model": "default",
            "messages": [{"role": "user", "content": SHORT_PROMPT}],
            "temperature": SAMPLING["temperature"],
            "top_p": SAMPLING["top_p"],
            "max_tokens": tokens,
            "stream": True,
        }
    ).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    text, counted = b"", 0
    while b"data: [DONE]" not in text:
        data = await reader.read(1 << 16)
        if not data:
            raise ConnectionError(f"the stream broke off: {text[-200:]!r}")
        text += data
        count = text.count(b'"content"') - 1  # the first one comes with the role
        if counted == 0 and count > 0:
            result.begin()
        elif count > counted:
            result.count(count - counted)
        counted = max(counted, count)
    writer.close()
    assert b'"finish_reason":"length"' in text, text[-500:]


async def measure_all(gateway: Gateway, arguments: argparse.Namespace) -> dict[str, object]:
    """Rounds in turns, the first one uncounted."""
    clock = Clock(gateway.pid)
    ways = {"v2": over_v2, "events": over_events}
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(arguments.rounds + 1):
        result = {}
        for name, way in sorted(ways.items(), reverse=number % 2 == 0):
            counted = Round(clock, arguments.users)
            streams = (way(gateway.url, arguments.tokens, counted) for _ in range(arguments.users))
            await asyncio.gather(*streams)
            result[name] = counted.figures()
        costs = {name: round(value["microseconds_per_token"], 1) for name, value in result.items()}
        print(f"round {number}: {costs} us/token", flush=True)
        if number:
            rounds.append(result)
    ratios = [
        each["events"]["microseconds_per_token"] / each["v2"]["microseconds_per_token"] for each in rounds
    ]
    return {
        "users": arguments.users,
        "tokens": arguments.tokens,
        **{
            f"{name}_{figure}": round(statistics.median(each[name][figure] for each in rounds), 1)
            for name in ways
            for figure in ("microseconds_per_token", "tokens_per_second")
        },
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    """Start all, measure, print, stop all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=300, help="of each user in one round")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as processes:
        directory = Path(processes.enter_context(tempfile.TemporaryDirectory(prefix="petals-chat-bench-")))
        repository, settings = bundled_model(directory)
        host = processes.enter_context(Host(repository, "auto", HOST_CACHE_TOKENS, directory, THREADS))
        ready = host.wait_until_ready()
        served = Served(repository, "auto", ready.peers, ready.dht_prefix)
        gateway = processes.enter_context(Gateway(settings, served, directory, THREADS))
        gateway.wait_until_ready()
        print(json.dumps(asyncio.run(measure_all(gateway, arguments))))


if __name__ == "__main__":
    main()
