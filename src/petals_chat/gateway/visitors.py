"""Who a visitor is: whoever has the cookie that this server once gave out. There are no names and no accounts.

The cookie is random, and cannot be read by scripts. Whoever keeps things for a visitor keeps them under a hash of it,
from which it cannot be got back.
"""

from __future__ import annotations

import hashlib
import re
import secrets

from starlette.requests import HTTPConnection
from starlette.responses import Response

from petals_chat.gateway.origins import is_foreign_origin

COOKIE = "petals_chat_visitor"
MAX_AGE_SECONDS = 400 * 24 * 3600
"""The longest that browsers keep a cookie; it is given anew with each visit."""

_BYTES = 32
_VALUE = re.compile(r"[A-Za-z0-9_-]{43}")


def visitor_of(connection: HTTPConnection) -> str | None:
    """The visitor's hash; None for who has no cookie, and for requests that pages of other sites make."""
    value = _cookie(connection)
    if value is None or is_foreign_origin(connection):
        return None
    return _hashed(value)


class VisitorCookie:
    """The cookie of one request's visitor, given out if there is none yet."""

    def __init__(self, connection: HTTPConnection) -> None:
        self._connection = connection
        self._value = _cookie(connection) or secrets.token_urlsafe(_BYTES)
        self.visitor = _hashed(self._value)

    def set_on(self, response: Response) -> None:
        """Give it to the browser, or let it last longer there."""
        scope = self._connection.scope
        response.set_cookie(
            COOKIE,
            self._value,
            max_age=MAX_AGE_SECONDS,
            path=scope.get("root_path") or "/",
            secure=scope["scheme"] in ("https", "wss"),
            httponly=True,
            samesite="lax",
        )


def _cookie(connection: HTTPConnection) -> str | None:
    value = connection.cookies.get(COOKIE, "")
    return value if _VALUE.fullmatch(value) else None


def _hashed(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
