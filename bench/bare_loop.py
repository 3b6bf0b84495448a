"""The limit: Petals' own inference sessions, stepped with the embedding of one fixed token, a thread for each.

No tokenizer, no head, no sampling, no API. A client that steps sessions as Petals does cannot be cheaper.

    python bench/bare_loop.py '{"repository": ..., "peers": [...], "dht_prefix": ..., "dtype": ...}'

Then reads commands from standard input; see `rounds.serve_commands`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from measuring import CpuClock
from petals_chat.models.checkpoint import client_tensors, open_checkpoint
from petals_client import InferenceSession, join_swarm, model_dtype, read_tensor
from rounds import Opening, Round, report, serve_commands

TOKEN = 7


class BareLoop:
    """Sessions of some users, each stepped in a thread of its own."""

    def __init__(self, manager: Any, embedding: torch.Tensor) -> None:
        self._manager = manager
        self._embedding = embedding
        """[1, 1, hidden_size]"""
        self._sessions: list[InferenceSession] = []
        self._pool: ThreadPoolExecutor | None = None

    def open(self, users: int, prompt_tokens: int, max_length: int) -> Opening:
        """Open all sessions at once, and send a prompt through each."""
        self._pool = ThreadPoolExecutor(users)
        self._sessions = [InferenceSession(self._manager, max_length) for _ in range(users)]
        opening = Opening()
        began = time.monotonic()

        def first_step(session: InferenceSession) -> None:
            try:
                with torch.inference_mode():
                    session.step(self._embedding.expand(1, prompt_tokens, -1))
            except Exception as error:
                opening.errors.append(f"{type(error).__name__}: {error}"[:120])
            else:
                opening.served += 1
                opening.first_token_seconds.append(time.monotonic() - began)

        list(self._pool.map(first_step, self._sessions))
        return opening

    def run(self, tokens: int, contender: int, host: int, patience: float) -> Round:
        """Step each session ``tokens`` times, or less often where half of the patience does not suffice."""
        assert self._pool is not None
        result = Round()
        until = time.monotonic() + patience / 2

        def steps(session: InferenceSession) -> list[float]:
            gaps, before = [], time.monotonic()
            with torch.inference_mode():
                for _ in range(tokens):
                    if before > until:
                        break
                    session.step(self._embedding)
                    now = time.monotonic()
                    gaps.append(now - before)
                    before = now
            return gaps

        clock, host_clock = CpuClock([contender]), CpuClock([host])
        cpu, host_cpu, began = clock.seconds(), host_clock.seconds(), time.monotonic()
        for gaps in self._pool.map(steps, self._sessions):
            result.gaps += gaps
            result.tokens += len(gaps)
        result.seconds = time.monotonic() - began
        result.cpu_seconds = clock.seconds() - cpu
        result.host_cpu_seconds = host_clock.seconds() - host_cpu
        return result

    def close(self) -> bool:
        """Close all sessions. One that stays open would hold up the end of the process."""
        for session in self._sessions:
            session.close()
        if self._pool is not None:
            self._pool.shutdown()
        self._sessions, self._pool = [], None
        return True


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)  # it computes nothing, and threads that wait for work cost more than its steps
    checkpoint = open_checkpoint(options["repository"])
    name = client_tensors(checkpoint.config, checkpoint.tensors).embeddings
    with join_swarm(options["peers"], options["dht_prefix"], checkpoint.num_blocks) as manager:
        embedding = read_tensor(checkpoint, name, model_dtype(options["dtype"]))[
            None, TOKEN : TOKEN + 1
        ].clone()
        loop = BareLoop(manager, embedding)
        report({"ready": True})
        try:
            serve_commands({"open": loop.open, "run": loop.run, "close": loop.close})
        finally:
            loop.close()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # not held up by threads of the swarm's libraries
