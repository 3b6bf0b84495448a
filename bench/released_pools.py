"""``petals-chat host`` with the pools of released Petals: one session's step after the other.

python bench/released_pools.py host MODEL ...
"""

from __future__ import annotations

import sys

from petals_chat.cli import main
from petals_chat.swarm import compat

compat.install()

from petals_chat.swarm import backend  # noqa: E402 - compat.install() comes before petals


def install_nothing(*, shares_turns: bool) -> None:
    """In place of `petals_chat.swarm.batching.install_batching`."""


if __name__ == "__main__":
    backend.install_batching = install_nothing  # type: ignore[assignment]
    raise SystemExit(main(sys.argv[1:]))
