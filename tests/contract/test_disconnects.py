"""Clients that go away, or do not read, in the middle of a generation: nothing is left of it."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable

import pytest
from websockets.sync.client import connect

from tests.contract.serving import Server
from tests.contract.wire import STREAM_WITHOUT_END, receive, wait_until

OPEN_LARGE = '{"type": "open_inference_session", "max_length": 4096}'

Figures = Callable[[], tuple[int, int]]

pytestmark = pytest.mark.usefixtures("next_client_is_served")


def begin_v1(server: Server, **parameters: object) -> socket.socket:
    """A connection on which a long generation was asked for."""
    body = json.dumps({"inputs": "B", "max_new_tokens": 4000, **parameters})
    host, _, port = server.address.partition(":")
    client = socket.create_connection((host, int(port)))
    head = f"POST /api/v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall((head + body).encode())
    return client


def test_clients_that_go_away_leave_nothing_running(
    server: Server, figures: Figures, open_session: Callable[..., str]
) -> None:
    wait_until(lambda: figures() == (0, 0))
    session_id = open_session(max_length=4096)
    with contextlib.ExitStack() as clients:
        clients.enter_context(begin_v1(server))
        clients.enter_context(begin_v1(server, session_id=session_id))
        polite, abrupt = (clients.enter_context(connect(server.v2_url, max_queue=None)) for _ in range(2))
        for client in (polite, abrupt):
            client.send(OPEN_LARGE)
            client.send(STREAM_WITHOUT_END)
            assert receive(client) == {"ok": True}
            assert receive(client)["outputs"] == "!"
        wait_until(lambda: figures() == (4, 4))
        abrupt.socket.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: figures() == (1, 0))  # the v1 session is still open


def test_a_client_that_does_not_read_holds_up_nobody_and_leaves_nothing(
    server: Server, figures: Figures
) -> None:
    wait_until(lambda: figures() == (0, 0))
    with contextlib.ExitStack() as clients:
        deaf = clients.enter_context(connect(server.v2_url, max_queue=1))
        deaf.send(OPEN_LARGE)
        deaf.send(STREAM_WITHOUT_END)
        wait_until(lambda: figures() == (1, 1))
        with connect(server.v2_url) as other:
            other.send('{"type": "open_inference_session", "max_length": 64}')
            other.send('{"type": "generate", "inputs": "C", "max_new_tokens": 9}')
            assert receive(other) == {"ok": True}
            assert receive(other)["outputs"] == "?<|endoftext|>"
        deaf.socket.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: figures() == (0, 0))


def test_a_client_that_goes_away_while_its_session_opens_leaves_nothing(
    server: Server, figures: Figures
) -> None:
    for _ in range(20):
        with connect(server.v2_url) as client:
            client.send(OPEN_LARGE)
            client.send(STREAM_WITHOUT_END)
            client.socket.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: figures() == (0, 0))
