"""How blocks and members of a swarm are named: Petals' own rule for blocks, so that strangers' hosts and ours meet.

Needs neither torch nor Petals.
"""

from __future__ import annotations

import re
from pathlib import Path

import base58

MAX_PEER_ID_CHARS = 64


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


def is_peer_id(text: str) -> bool:
    """Whether ``text`` is a peer id as members of a swarm have it: "Qm..." or "12D3KooW...".

    That is the base58 of a multihash: code, length, digest. The code is that of SHA-256 (0x12), or 0 for a short
    key that stands there itself. Source: the peer id specification of libp2p.
    """
    if not 40 <= len(text) <= MAX_PEER_ID_CHARS:
        return False
    try:
        code, length, *digest = base58.b58decode(text)
    except ValueError:
        return False
    return len(digest) == length and (code, length) in ((0x12, 32), (0x00, 36))
