"""What a round of a contender gave, as the processes that measure it report it; JSON lines between processes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(kw_only=True)
class Round:
    """Times in seconds."""

    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of the contender."""
    host_cpu_seconds: float = 0.0
    gaps: list[float] = dataclasses.field(default_factory=list)
    """Times between two tokens of a user."""
    errors: list[str] = dataclasses.field(default_factory=list)
    """For each user who did not get all his tokens: why."""


@dataclasses.dataclass(kw_only=True)
class Opening:
    """What came of users who began at the same moment."""

    served: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    """For each user who got no token: why."""
    first_token_seconds: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(kw_only=True)
class StreamRound:
    """A round with new sessions."""

    opening: Opening
    round: Round


@dataclasses.dataclass(kw_only=True)
class InterleavedRound:
    """A round beside which long prompts were sent."""

    round: Round
    prompt_seconds: list[float] = dataclasses.field(default_factory=list)
    """Until the first token after each of them."""


def serve_commands(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Read ``{"command": name, ...arguments}`` from standard input, line by line, and print each result as JSON."""
    for line in sys.stdin:
        arguments = json.loads(line)
        result = commands[arguments.pop("command")](**arguments)
        report(result)


def report(result: Any) -> None:
    """Answer the parent."""
    print(json.dumps(dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result), flush=True)  # type: ignore[arg-type]
