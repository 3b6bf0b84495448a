"""Whose requests these are, as far as the server can tell: who shares a queue fairly, and who reuses whose contexts."""

from __future__ import annotations

from starlette.requests import HTTPConnection


def owner_of(connection: HTTPConnection) -> str:
    """The client's address; the same for all clients behind a proxy that is not trusted to name them."""
    return connection.client.host if connection.client else ""
