"""The default start, measured: time until a model can answer, memory of all processes, tokens per second.

    python bench/default_start.py [--users 1 4 16] [--tokens 64]

Starts `petals-chat serve` without configuration on a free port, in a data directory of its own, and stops it.
Prints a table and, as the last line, the same as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from websockets.asyncio.client import connect

from measuring import cpu_seconds, family, pss_megabytes

START_TIMEOUT_SECONDS = 120
PROMPT = "Hello, many machines. How does a swarm run a model?"


def main() -> None:
    """Measure, print, stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each user asks for")
    arguments = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        began = time.monotonic()
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "petals_chat", "serve", f"--port={port}"),
                *("--set", f"engine.data_dir={directory}/data"),
            ],
            cwd=directory,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until_ready(port)
            result: dict[str, object] = {
                "ready_seconds": round(time.monotonic() - began, 1),
                "pss_megabytes": round(pss_megabytes(server.pid)),
                "processes": len(family(server.pid)),
            }
            print(f"ready after {result['ready_seconds']} s")
            print(f"memory (PSS) of {result['processes']} processes: {result['pss_megabytes']} MB")
            result["users"] = [measure_users(port, server.pid, n, arguments.tokens) for n in arguments.users]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    print(json.dumps(result))


def measure_users(port: int, pid: int, users: int, tokens: int) -> dict[str, object]:
    """Users who chat at once over API v2, token by token."""
    cpu_before = cpu_seconds(pid)
    began = time.monotonic()
    gaps = [gap for user in asyncio.run(all_users(port, users, tokens)) for gap in user]
    seconds = time.monotonic() - began
    row = {
        "users": users,
        "tokens_per_second": round(users * tokens / seconds, 1),
        "gap_ms_p50": round(1000 * statistics.median(gaps), 1),
        "gap_ms_p99": round(1000 * statistics.quantiles(gaps, n=100)[98], 1),
        "cpu_ms_per_token": round(1000 * (cpu_seconds(pid) - cpu_before) / (users * tokens), 2),
    }
    print("  ".join(f"{name} {value}" for name, value in row.items()), "(host included)")
    return dict(row)


async def all_users(port: int, users: int, tokens: int) -> list[list[float]]:
    return await asyncio.gather(*(chat(port, tokens) for _ in range(users)))


async def chat(port: int, tokens: int) -> list[float]:
    """One user's times between tokens, in seconds."""
    times: list[float] = []
    async with connect(f"ws://127.0.0.1:{port}/api/v2/generate", compression=None) as websocket:
        await websocket.send(json.dumps({"type": "open_inference_session", "max_length": 1024}))
        request = {"type": "generate", "inputs": PROMPT, "max_new_tokens": 1, "stop_sequence": "\n\n\n"}
        await websocket.send(json.dumps(request | {"do_sample": 1, "temperature": 0.9}))
        await websocket.recv()
        while len(times) < tokens:
            reply = json.loads(await websocket.recv())
            assert reply["ok"], reply
            times.append(time.monotonic())
            if reply["stop"]:  # the model ended its answer: ask for more
                await websocket.send(json.dumps(request | {"inputs": " and"}))
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise SystemExit("the server did not become ready")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


if __name__ == "__main__":
    main()
