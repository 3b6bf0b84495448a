"""Whether a request comes from this server's own page, as far as its headers tell.

A browser sets Origin truthfully; other clients may write there what they like. So this keeps other sites
from using a model through their visitors' browsers; it authenticates nobody.
"""

from __future__ import annotations

from starlette.requests import HTTPConnection

_HTTP_SCHEMES = {"ws": "http", "wss": "https"}


def is_same_origin(connection: HTTPConnection) -> bool:
    """Whether scheme and host of the Origin header are those under which the client reached this server.

    Behind a trusted proxy, uvicorn has put the client's scheme (X-Forwarded-Proto) into the scope, and the
    proxy passes Host on. No Origin header counts as a foreign one.
    """
    origins = connection.headers.getlist("origin")
    scheme = connection.scope["scheme"]
    host = connection.headers.get("host", "")
    return [origin.lower() for origin in origins] == [f"{_HTTP_SCHEMES.get(scheme, scheme)}://{host.lower()}"]


def is_foreign_origin(connection: HTTPConnection) -> bool:
    """Whether a page of another site sends this. Programs, which send no Origin header, are no page."""
    return "origin" in connection.headers and not is_same_origin(connection)
