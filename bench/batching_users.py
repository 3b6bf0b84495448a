"""Users of a host who generate greedily, all at once, with the swarm session of this gateway.

    python bench/batching_users.py '{"repository": ..., "peers": [...], "dht_prefix": ..., "dtype": ..., "host": pid}'

Then reads commands from standard input; see `rounds.serve_commands`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence

import torch

from measuring import CpuClock
from petals_chat.head.modules import ClientModules, load_client_modules
from petals_chat.models.checkpoint import open_checkpoint
from petals_chat.swarm.client import SwarmClient, SwarmOptions
from petals_chat.swarm.session import SwarmSession
from petals_client import model_dtype
from rounds import Round, report, serve_commands

STEP_TOKENS = 32
"""Longest piece of a prompt that a user sends; hosts that batch do not cut it."""


@dataclasses.dataclass(kw_only=True)
class Answers(Round):
    """A round in which each user begins a session."""

    texts: list[list[int]] = dataclasses.field(default_factory=list)
    """The tokens of each user."""


class Users:
    """They share a connection to the swarm, and the ends of the model."""

    def __init__(self, swarm: SwarmClient, ends: ClientModules, host: int) -> None:
        self._swarm, self._ends = swarm, ends
        self._clock = CpuClock([host])

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> Answers:
        """Continue all prompts at once; measured is the time in which all are past their prompts."""
        return self._swarm.run(self._generate(prompts, tokens))

    async def _generate(self, prompts: Sequence[list[int]], tokens: int) -> Answers:
        sessions = [self._swarm.open_session(len(prompt) + tokens, patience=0.0) for prompt in prompts]
        try:
            starts = [self._read(*user) for user in zip(sessions, prompts, strict=True)]
            firsts = await asyncio.gather(*starts)
            host_cpu, began = self._clock.seconds(), time.monotonic()
            users = [
                self._write(session, first, tokens - 1)
                for session, first in zip(sessions, firsts, strict=True)
            ]
            texts, times = zip(*await asyncio.gather(*users), strict=True)
            return Answers(
                tokens=(tokens - 1) * len(prompts),
                seconds=time.monotonic() - began,
                host_cpu_seconds=self._clock.seconds() - host_cpu,
                gaps=[later - earlier for of in times for earlier, later in itertools.pairwise(of)],
                texts=[[first, *text] for first, text in zip(firsts, texts, strict=True)],
            )
        finally:
            await asyncio.gather(*(session.close() for session in sessions))

    async def _read(self, session: SwarmSession, prompt: list[int]) -> int:
        for start in range(0, len(prompt), STEP_TOKENS):
            output = await session.step(self._ends.embed(prompt[start : start + STEP_TOKENS]))
        return self._choose(output)

    async def _write(self, session: SwarmSession, token: int, tokens: int) -> tuple[list[int], list[float]]:
        text, times = [], [time.monotonic()]
        for _ in range(tokens):
            token = self._choose(await session.step(self._ends.embed([token])))
            text.append(token)
            times.append(time.monotonic())
        return text, times

    def _choose(self, output: torch.Tensor) -> int:
        return int(self._ends.logits(output[0, -1:]).argmax())


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(options["repository"])
    swarm = SwarmClient(
        SwarmOptions(
            initial_peers=tuple(options["peers"]),
            dht_prefix=options["dht_prefix"],
            num_blocks=checkpoint.num_blocks,
            active_adapter=None,
            max_retries=3,
            request_timeout=60,
            connect_timeout=5,
            update_period=60,
        )
    )
    dtype = model_dtype(options["dtype"])
    ends = load_client_modules(checkpoint, device=torch.device("cpu"), dtype=dtype)
    with torch.inference_mode():
        swarm.run(swarm.refresh())
        users = Users(swarm, ends, options["host"])
        report({"ready": True})
        try:
            serve_commands({"generate": users.generate})
        finally:
            swarm.close()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # not held up by threads of the swarm's libraries
