"""Who may use the APIs: those with a key, and the server's own page, if the configuration has keys at all.

An ASGI middleware around all APIs. It writes into the scope whose key it was (`petals_chat.gateway.owners`), and what
is left of the client's limits into the replies' headers.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette._utils import get_route_path
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from petals_chat.errors import InvalidApiKeyError
from petals_chat.gateway.clients import Clients
from petals_chat.gateway.origins import is_same_origin
from petals_chat.gateway.owners import KEY_OWNER, owner_of
from petals_chat.settings import ApiSettings

PAGE_COOKIE = "petals_chat_page"
PAGE_SECONDS = 30 * 24 * 3600
"""How long a page that is left open can be used."""

_PROTECTED = (
    "/v1/",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/api/v1/generate",
    "/api/v1/open_inference_session",
    "/api/v1/close_inference_session",
    "/api/v2/generate",
)
"""What the addresses begin with that use a model; all others say nothing that is not public."""

Refusal = Callable[[str, InvalidApiKeyError], Response]


class ApiKeys:
    """Lets through who may use the APIs.

    Args:
        refusal: makes the reply to a request that is not let through, from its path and the error.
    """

    def __init__(self, app: ASGIApp, *, settings: ApiSettings, clients: Clients, refusal: Refusal) -> None:
        self._app = app
        self._clients = clients
        self._refusal = refusal
        self._passes = PagePasses(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or a connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = get_route_path(scope)
        if not path.startswith(_PROTECTED):
            await self._app(scope, receive, self._with_pass(scope, send))
            return
        connection = HTTPConnection(scope)
        if self._clients.need_keys and scope.get("method") != "OPTIONS":
            try:
                self._authenticate(connection, scope)
            except InvalidApiKeyError as error:
                await _refuse(self._refusal(path, error), scope, receive, send)
                return
        is_http = scope["type"] == "http"
        await self._app(scope, receive, self._with_limits(owner_of(connection), send) if is_http else send)

    def _authenticate(self, connection: HTTPConnection, scope: MutableMapping[str, Any]) -> None:
        key = _bearer(connection.headers.get("authorization", ""))
        is_page = is_same_origin(connection) or connection.headers.get("sec-fetch-site") == "same-origin"
        if key is None and is_page and self._passes.is_valid(connection.cookies.get(PAGE_COOKIE, "")):
            return
        scope[KEY_OWNER] = self._clients.owner_of_key(key)

    def _with_limits(self, owner: str, send: Send) -> Send:
        client = self._clients.of(owner)
        if not client.is_limited:
            return send

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), *client.headers()]
                if message["status"] == 429 and (wait := client.seconds_until_next) > 0:
                    headers.append((b"retry-after", str(math.ceil(wait)).encode()))
                message = {**message, "headers": headers}
            await send(message)

        return send_on

    def _with_pass(self, scope: Scope, send: Send) -> Send:
        """Whoever gets the page gets the cookie with which it may use the APIs."""
        if not self._clients.need_keys or scope.get("method") != "GET":
            return send

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_page(message):
                cookie = (
                    f"{PAGE_COOKIE}={self._passes.make()}; Path={scope.get('root_path') or '/'}; "
                    f"Max-Age={PAGE_SECONDS}; HttpOnly; SameSite=Strict"
                    f"{'; Secure' if scope['scheme'] == 'https' else ''}"
                )
                headers = [*message.get("headers", ()), (b"set-cookie", cookie.encode())]
                message = {**message, "headers": headers}
            await send(message)

        return send_on


class PagePasses:
    """Values of the page's cookie: the time until which one is valid, and a signature.

    They are signed with what the configuration has of the keys, so all processes of a server take them, also after a
    restart.
    """

    def __init__(self, settings: ApiSettings) -> None:
        secret = "".join(sorted(key.hash for key in settings.keys))
        self._secret = hashlib.sha256(secret.encode()).digest()

    def make(self) -> str:
        """A new one."""
        return self._signed(str(int(time.time()) + PAGE_SECONDS))

    def is_valid(self, value: str) -> bool:
        """Whether it is one of ours, and not too old."""
        until = value.partition(".")[0]
        return (
            until.isascii()
            and until.isdigit()
            and value.isascii()
            and hmac.compare_digest(value, self._signed(until))
            and int(until[:20]) > time.time()
        )

    def _signed(self, until: str) -> str:
        return f"{until}.{hmac.new(self._secret, until.encode(), 'sha256').hexdigest()}"


def _bearer(header: str) -> str | None:
    scheme, _, key = header.partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _is_page(message: Message) -> bool:
    return any(
        name == b"content-type" and value.startswith(b"text/html") for name, value in message["headers"]
    )


async def _refuse(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    response.headers["www-authenticate"] = "Bearer"
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    await response(scope, receive, send)
