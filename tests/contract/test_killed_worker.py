"""The process of a model is killed in the middle of its work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from tests.contract.serving import Server
from tests.contract.wire import STREAM_WITHOUT_END, receive, wait_until

LONG = {"inputs": "B", "max_new_tokens": 4000}


def test_its_requests_get_a_clear_error_and_everything_else_goes_on(
    server: Server,
    http: httpx.Client,
    websocket: ClientConnection,
    checkpoints: dict[str, Path],
    open_session: Callable[..., str],
    figures: Callable[[], tuple[int, int]],
) -> None:
    page = http.get("/")
    session_id = open_session(max_length=64)
    websocket.send('{"type": "open_inference_session", "max_length": 4096}')
    assert receive(websocket) == {"ok": True}
    with ThreadPoolExecutor(1) as pool:
        over_v1 = pool.submit(http.post, "/api/v1/generate", json=LONG)
        websocket.send(STREAM_WITHOUT_END)
        wait_until(lambda: figures()[1] == 2)
        server.worker(checkpoints["reciting"]).kill()
        errors = [over_v1.result().json(), receive_last(websocket)]
    assert [error["code"] for error in errors] == ["worker_lost", "worker_lost"]
    assert all("It is being restarted" in error["traceback"] for error in errors)

    assert http.get("/healthz").json() == {"ok": True}
    assert http.get("/").content == page.content
    other = http.post(
        "/api/v1/generate", json={"model": "byte_level", "inputs": "Hello", "max_new_tokens": 2}
    )
    assert other.json()["ok"] is True
    meanwhile = http.post("/api/v1/generate", json={"inputs": "A", "max_new_tokens": 4}).json()
    assert meanwhile["code"] in ("model_unavailable", "model_loading")

    wait_until(lambda: http.get("/readyz").json()["models"]["reciting"] == "ready")
    reply = http.post("/api/v1/generate", json={"inputs": "A", "max_new_tokens": 4}).json()
    assert reply == {"ok": True, "outputs": "😀"}
    lost = http.post("/api/v1/generate", json={"session_id": session_id, "inputs": "A", "max_new_tokens": 4})
    assert lost.json()["code"] in ("worker_lost", "session_expired")


def receive_last(client: ClientConnection) -> Any:
    """The last frame's JSON; after it, the server closes the connection."""
    frame = None
    with contextlib.suppress(ConnectionClosed):
        while True:
            frame = receive(client)
    return frame
