"""Whose requests these are, as far as the server can tell: who shares a queue fairly, and who reuses whose contexts."""

from __future__ import annotations

import ipaddress

from starlette.requests import HTTPConnection

from petals_chat.engine.interface import OWNER_SEPARATOR

KEY_OWNER = "petals_chat.key_owner"
"""Where in the ASGI scope the owner stands if a key was used."""


def owner_of(connection: HTTPConnection) -> str:
    """The key that was used, if there was one (`petals_chat.gateway.api_keys`), or else the client's address.

    The address is the same for all clients behind a proxy that is not trusted to name them. An address of IPv6 stands
    for its network of 64 bits, whose addresses belong to one customer of a provider.
    """
    if (owner := connection.scope.get(KEY_OWNER)) is not None:
        return str(owner)
    return _customer(connection.client.host) if connection.client else ""


def owner_among(owner: str, visitor: str | None) -> str:
    """The owner, where one address may be that of several visitors, who are to share fairly with each other."""
    return owner if visitor is None else f"{owner}{OWNER_SEPARATOR}{visitor}"


def _customer(address: str) -> str:
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:  # of IPv4, or a name
        return address
    return str(parsed.ipv4_mapped or ipaddress.IPv6Network((parsed.packed, 64), strict=False))
