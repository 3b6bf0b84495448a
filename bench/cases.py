"""What is measured: models, how many users, how long their contexts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import shapes
from petals_chat.models import bundled

CONTENDERS = 4
SHORT_PROMPT = "Hello, many machines. How does a swarm run a model?"
PROMPT_ROOM_TOKENS = 64
"""More tokens than the short prompt has in any tokenizer."""


@dataclasses.dataclass(frozen=True)
class LongPrompts:
    """What one more user sends meanwhile: this prompt, again and again, each time in a new session."""

    text: str
    tokens: int
    """At most."""

    @property
    def session_length(self) -> int:
        """Room for the prompt and one token."""
        return self.tokens + 16


@dataclasses.dataclass(frozen=True)
class Load:
    """So many users at once, after a prompt."""

    users: int
    tokens: int
    """In one round, of all users together; at least one for each."""
    prompt: str = SHORT_PROMPT
    prompt_tokens: int = PROMPT_ROOM_TOKENS
    """At most."""
    beside: LongPrompts | None = None
    """Rounds with these are compared to rounds without."""

    @property
    def tokens_each(self) -> int:
        """Tokens of one user in one round."""
        return max(1, self.tokens // self.users)

    def session_length(self, rounds: int) -> int:
        """Room for the prompt and all rounds; in streams some users are faster than others."""
        return self.prompt_tokens + self.tokens_each * (rounds + 2) + 64


@dataclasses.dataclass(frozen=True)
class Visit:
    """Users who come once, all at the same moment, ask for some tokens one by one, and leave.

    The host has attention caches for ``sessions`` of them.
    """

    users: int
    tokens_each: int
    prompt: str
    prompt_tokens: int
    session_length: int
    sessions: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the loads on it."""

    name: str
    model: Callable[[Path], tuple[str, Mapping[str, object]]]
    """Makes the model in a directory; returns its repository and the gateway's settings for it."""
    dtype: str
    loads: tuple[Load, ...] = ()
    visit: Visit | None = None

    def cache_tokens(self, rounds: int) -> int:
        """What the host is given: room for the sessions of all contenders, or the scarce room of a visit."""
        if self.visit:
            return self.visit.sessions * self.visit.session_length
        largest = max(
            load.users * load.session_length(rounds) + (load.beside.session_length if load.beside else 0)
            for load in self.loads
        )
        return CONTENDERS * 2 * largest  # the gateway's swarm sessions have a power of two of tokens


def bundled_model(directory: Path) -> tuple[str, Mapping[str, object]]:
    """What ``petals-chat serve`` serves where nothing is configured, but for the end of its answers: none ends."""
    repository = directory / "bundled"
    shutil.copytree(bundled.DIRECTORY, repository)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((repository / name).read_text())
        (repository / name).write_text(json.dumps(content | {"eos_token_id": None}))
    entry = 'models."bench/bundled"'
    return str(repository), {
        f"{entry}.repository": str(repository),
        f"{entry}.chat.max_session_length": 2048,
    }


def made_model(shape: shapes.Shape) -> Callable[[Path], tuple[str, Mapping[str, object]]]:
    """A model of this shape."""

    def make(directory: Path) -> tuple[str, Mapping[str, object]]:
        repository = str(shapes.write_model(directory / shape.name, shape))
        entry = f'models."bench/{shape.name}"'
        return repository, {
            f"{entry}.repository": repository,
            f"{entry}.chat.max_session_length": shape.context_tokens,
        }

    return make


CASES = (
    Case("bundled", bundled_model, "auto", tuple(Load(users, tokens=192) for users in (1, 4, 16, 32, 64))),
    Case(
        "large",
        made_model(shapes.LARGE),
        "bfloat16",
        tuple(
            Load(users, tokens, prompt=shapes.prompt(16), prompt_tokens=16)
            for users, tokens in ((1, 32), (8, 48), (32, 128))
        ),
    ),
    Case(
        "long",
        made_model(shapes.LONG),
        "bfloat16",
        tuple(
            Load(1, tokens=96, prompt=shapes.prompt(tokens), prompt_tokens=tokens)
            # Not 4000: the gateway's swarm session, opened for 4096 tokens, would be replayed within a round.
            for tokens in (100, 1000, 4100)
        ),
    ),
    Case(
        "interleaved",
        made_model(shapes.LONG),
        "bfloat16",
        (
            Load(
                4,
                tokens=256,
                prompt=shapes.prompt(16),
                prompt_tokens=16,
                beside=LongPrompts(shapes.prompt(3000), tokens=3000),
            ),
        ),
    ),
    Case(
        "crowded",
        made_model(shapes.SMALL),
        "bfloat16",
        # With more than 256 tokens, the gateway's swarm sessions are as large as those of the others.
        visit=Visit(32, 8, shapes.prompt(300), prompt_tokens=300, session_length=512, sessions=4),
    ),
)
