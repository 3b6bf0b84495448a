"""Sessions and connections that are left alone are closed by the server."""

from __future__ import annotations

from collections.abc import Callable

import httpx
from websockets.sync.client import ClientConnection

from tests.contract.wire import receive_error, wait_until


def test_what_is_not_used_for_some_time_is_closed(
    http: httpx.Client,
    left_alone: tuple[str, ClientConnection],
    figures: Callable[[str], tuple[int, int]],
) -> None:
    session_id, connection = left_alone
    error = receive_error(connection)
    assert error["code"] == "session_expired"
    assert error["traceback"].startswith("SessionExpiredError: Session of this connection expired: ")
    wait_until(lambda: figures("bos") == (0, 0))
    request = {"session_id": session_id, "model": "bos", "max_new_tokens": 1}
    error = http.post("/api/v1/generate", json=request).json()
    assert error["code"] == "session_expired"
    assert f"Session {session_id} expired" in error["traceback"]
