"""The web page's built files, served with strict security headers.

Knows nothing of what the page does; its build puts the files into the package's ``web`` folder.
"""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import petals_chat

BUILT_PAGE = Path(petals_chat.__file__).with_name("web")

_HEADERS = {
    # The page brings along all that it uses. Some browsers do not take 'self' to cover WebSockets.
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Browsers ask each time; the ETag keeps the answer short.
    "Cache-Control": "no-cache",
}
_NOT_BUILT = "The web page is not built here: run `make web`. The APIs work without it, see docs.\n"


class Pages(StaticFiles):
    """The ASGI app that answers what no API answers: with the page's file at this path, or 404.

    Args:
        directory: has the page's files, with ``index.html`` for "/".
    """

    def __init__(self, directory: Path = BUILT_PAGE) -> None:
        super().__init__(directory=directory, html=True, check_dir=False)

    async def check_config(self) -> None:
        """Accept a folder that does not exist; the page is not built then."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The answer for ``path``, which is relative to the folder."""
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)
        try:
            response = await super().get_response(path, scope)
        except HTTPException as error:
            if path != "." or error.status_code != 404:
                raise
            response = PlainTextResponse(_NOT_BUILT, 503)
        response.headers.update(_HEADERS)
        return response
