"""How a model's blocks are named in a swarm: Petals' own rule, so that strangers' hosts and ours meet.

Needs neither torch nor Petals.
"""

from __future__ import annotations

import re
from pathlib import Path


def default_dht_prefix(model_type: str, repository: str) -> str:
    """The name under which Petals' servers announce the blocks of ``repository``.

    Source: ``from_pretrained`` of the configurations in ``petals/models/*/config.py`` (2.2.0). Petals has no
    rule for local directories; here the directory's name counts as a repository's name.

    Args:
        model_type: that of the checkpoint's ``config.json``, like "llama".
        repository: hub name or local directory.
    """
    name = repository.split("/")[-1]
    if (directory := Path(repository)).is_dir():
        repository = name = directory.resolve().name
    if model_type == "bloom":
        name = f"{repository}-petals"
    elif model_type == "llama" and not name.endswith("-hf"):
        name += "-hf"
    # Petals joins prefix and block number with ".", and the names of several blocks with " ".
    return re.sub(r"[.\s]", "-", name)
