"""A private swarm that grows and shrinks under a gateway, timed.

    python bench/private_swarm.py

Starts hosts of a small model with `petals-chat host` on loopback and one gateway, which stays: half of the blocks, all,
with a spare host for the first half, without the host that began the swarm, without that half, with it again. Prints
what it does and, as the last line, the times in seconds as JSON: until a host serves, until the gateway notices.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from cases import bundled_model
from measuring import family

TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 10.0
PROMPT = "Hello, many machines."


class Host:
    """One `petals-chat host`, from its start on."""

    def __init__(self, *arguments: str) -> None:
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "petals_chat", "host", *arguments),
                *("--json", "--address=127.0.0.1", "--dtype=float32"),
            ],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._started: list[int] = []

    def wait_until_ready(self) -> tuple[dict[str, Any], float]:
        """What it prints when it serves, and the seconds since its start."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_SECONDS)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            raise SystemExit("a host did not start")
        self._started = family(self.process.pid)
        return json.loads(line), round(time.monotonic() - self._began, 1)

    def end(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Send the signal, and wait until it and all that it has started are gone; returns the seconds."""
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        self.process.wait(STOP_TIMEOUT_SECONDS)
        while any(map(psutil.pid_exists, self._started)) and time.monotonic() < began + STOP_TIMEOUT_SECONDS:
            time.sleep(0.02)
        if any(map(psutil.pid_exists, self._started)):
            raise SystemExit("something is left of a host")
        assert self.process.stdout is not None
        self.process.stdout.close()
        return round(time.monotonic() - began, 1)


class Gateway:
    """One `petals-chat serve` in front of the swarm."""

    def __init__(self, url: str) -> None:
        self._url = url

    def wait_for(self, state: str, missing: list[int]) -> float:
        """Wait until the model is in this state and misses these blocks; returns the seconds."""
        began = time.monotonic()
        while time.monotonic() < began + TIMEOUT_SECONDS:
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"{self._url}/api/status", timeout=5) as reply:
                    status = json.load(reply)
                if (status["state"], status["missing_blocks"]) == (state, missing):
                    return round(time.monotonic() - began, 1)
            time.sleep(0.05)
        raise SystemExit(f"the gateway did not say {state!r}, missing {missing}")

    def answer(self) -> str:
        """The greedy continuation of the prompt."""
        data = urllib.parse.urlencode({"inputs": PROMPT, "max_new_tokens": 16}).encode()
        with urllib.request.urlopen(f"{self._url}/api/v1/generate", data, timeout=60) as reply:
            body = json.load(reply)
        if not body["ok"]:
            raise SystemExit(f"no answer: {body}")
        return str(body["outputs"])


@contextlib.contextmanager
def running_gateway(
    directory: Path, ready: dict[str, Any], model: str, settings: dict[str, Any]
) -> Iterator[Gateway]:
    """A gateway for the model of the host that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    settings = settings | {
        "swarm.initial_peers": json.dumps(ready["peers"]),
        "swarm.dht_prefix": ready["dht_prefix"],
        "swarm.update_period_seconds": 2,
        "engine.dtype": "float32",
        "engine.data_dir": str(directory / "data"),
    }
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "petals_chat", "serve", f"--port={port}"),
            *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
        ],
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield Gateway(f"http://127.0.0.1:{port}")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_TIMEOUT_SECONDS)


def main() -> None:
    """Grow, shrink, print."""
    times: dict[str, float] = {}
    hosts: list[Host] = []

    def start(*arguments: str) -> tuple[Host, dict[str, Any], float]:
        hosts.append(Host(*arguments))
        ready, seconds = hosts[-1].wait_until_ready()
        print(f"blocks {ready['start']}:{ready['end']} are served after {seconds} s", flush=True)
        return hosts[-1], ready, seconds

    def note(name: str, seconds: float) -> None:
        times[name] = seconds
        print(f"{name}: {seconds} s", flush=True)

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model, settings = bundled_model(directory)
        try:
            host, ready, seconds = start(model)
            note("host_of_all_blocks_serves", seconds)
            note("host_stops", host.end())
            port = int(ready["peers"][0].split("/tcp/")[1].split("/")[0])
            socket.create_server(("127.0.0.1", port)).close()  # the port is free
            blocks = ready["num_blocks"]
            half = blocks // 2
            first, second = f"--num-blocks={half}", f"--num-blocks={blocks - half}"

            starter, ready, _ = start(model, first)
            with running_gateway(directory, ready, model, dict(settings)) as gateway:
                gateway.wait_for("broken", list(range(half, blocks)))
                began = time.monotonic()
                _, joined, seconds = start(model, f"--join={ready['join_token']}", second)
                note("joining_host_serves", seconds)
                gateway.wait_for("ready", [])
                note("ready_after_join_command", round(time.monotonic() - began, 1))
                text = gateway.answer()

                spare, _, _ = start(model, f"--join={joined['join_token']}", f"--blocks=0:{half}")
                starter.end(signal.SIGKILL)
                began = time.monotonic()
                same = gateway.answer() == text
                note("answer_after_loss_of_a_replica", round(time.monotonic() - began, 1))
                gateway.wait_for("ready", [])

                spare.end(signal.SIGKILL)
                note("broken_after_loss_of_the_last", gateway.wait_for("broken", list(range(half))))
                start(model, f"--join={joined['join_token']}", first)
                note("ready_after_one_is_back", gateway.wait_for("ready", []))
                same = same and gateway.answer() == text
        finally:
            for host in hosts:
                if host.process.poll() is None:
                    host.end()
    print(json.dumps({**times, "answers_are_the_same": same}))


if __name__ == "__main__":
    main()
