"""API v2 and what is wrong with frames: each gets its clear error as the last frame, and the next client is served."""

from __future__ import annotations

import json
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from tests.contract.wire import OPEN, STREAM_WITHOUT_END, receive, receive_error

pytestmark = pytest.mark.usefixtures("next_client_is_served")

INVALID, VIOLATION = "invalid_parameter", "protocol_violation"
GENERATE = '{"type": "generate", "inputs": "B", "max_new_tokens": 1}'


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("", VIOLATION),
        ("hello", VIOLATION),
        ("\0", VIOLATION),
        ("{", VIOLATION),
        ("NaN", VIOLATION),
        ("[]", VIOLATION),
        ("null", VIOLATION),
        ('"open_inference_session"', VIOLATION),
        ('[{"type": "open_inference_session", "max_length": 64}]', VIOLATION),
        ("[" * 100_000, VIOLATION),
        ('{"a":' * 100_000, VIOLATION),
        ("{}", VIOLATION),
        ('{"type": null}', VIOLATION),
        ('{"type": "dance"}', VIOLATION),
        ('{"type": ["generate"]}', VIOLATION),
        (b"", VIOLATION),
        (OPEN.encode(), VIOLATION),
        (b"\xff" * 1000, VIOLATION),
        ("x" * 10_000_000, "message_too_large"),
        (f'{OPEN[:-1]}, "padding": "{"x" * 10_000_000}"}}', "message_too_large"),
        (GENERATE, VIOLATION),
        ('{"type": "open_inference_session"}', INVALID),
        ('{"type": "open_inference_session", "max_length": null}', INVALID),
        ('{"type": "open_inference_session", "max_length": ""}', INVALID),
        ('{"type": "open_inference_session", "max_length": 0}', INVALID),
        ('{"type": "open_inference_session", "max_length": -64}', INVALID),
        ('{"type": "open_inference_session", "max_length": 6.4}', INVALID),
        ('{"type": "open_inference_session", "max_length": "long"}', INVALID),
        ('{"type": "open_inference_session", "max_length": "NaN"}', INVALID),
        ('{"type": "open_inference_session", "max_length": NaN}', VIOLATION),
        ('{"type": "open_inference_session", "max_length": 1e999}', VIOLATION),
        ('{"type": "open_inference_session", "max_length": [64]}', INVALID),
        ('{"type": "open_inference_session", "max_length": {"a": 64}}', INVALID),
        ('{"type": "open_inference_session", "max_length": true}', INVALID),
        ('{"type": "open_inference_session", "max_length": 4097}', "maximum_length_exceeded"),
        ('{"type": "open_inference_session", "max_length": 1e300}', "maximum_length_exceeded"),
        ('{"type": "open_inference_session", "max_length": 64, "model": "no/such"}', "unknown_model"),
        ('{"type": "open_inference_session", "max_length": 64, "model": 5}', INVALID),
        ('{"type": "open_inference_session", "max_length": 64, "model": ["reciting"]}', INVALID),
    ],
    ids=lambda value: repr(value)[:70],
)
def test_a_bad_first_frame_gets_its_error(websocket: ClientConnection, frame: str | bytes, code: str) -> None:
    websocket.send(frame)
    assert receive_error(websocket)["code"] == code


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({}, INVALID),
        ({"inputs": "B"}, INVALID),
        ({"inputs": "B", "max_new_tokens": 0}, INVALID),
        ({"inputs": "B", "max_new_tokens": -1}, INVALID),
        ({"inputs": "B", "max_new_tokens": [1]}, INVALID),
        ({"inputs": "B", "max_new_tokens": "one"}, INVALID),
        ({"inputs": "B", "max_length": 1}, "maximum_length_exceeded"),
        ({"inputs": ["B"], "max_new_tokens": 1}, INVALID),
        ({"inputs": 5, "max_new_tokens": 1}, INVALID),
        ({"max_new_tokens": 1}, INVALID),
        ({"inputs": "", "max_new_tokens": 1}, INVALID),
        ({"inputs": "A" * 1000, "max_new_tokens": 1}, "maximum_length_exceeded"),
        ({"inputs": "B", "max_new_tokens": 1, "temperature": "NaN"}, INVALID),
        ({"inputs": "B", "max_new_tokens": 1, "stop_sequence": 5}, INVALID),
        ({"inputs": "B", "max_new_tokens": 1, "stop_sequence": ["###"]}, INVALID),
        ({"inputs": "B", "max_new_tokens": 1, "stop_sequence": ""}, INVALID),
        ({"inputs": "B", "max_new_tokens": 1, "stop_sequence": "x" * 10_000}, INVALID),
        ({"inputs": "B", "max_new_tokens": 1, "stop_sequence": "#", "extra_stop_sequences": 5}, INVALID),
        ({"inputs": "B", "max_new_tokens": 1, "stop_sequence": "#", "extra_stop_sequences": {}}, INVALID),
        ({"inputs": "B", "max_new_tokens": 1, "stop_sequence": "#", "extra_stop_sequences": [5]}, INVALID),
        ({"inputs": "B", "max_new_tokens": 1, "stop_sequence": "#", "extra_stop_sequences": [""]}, INVALID),
        (
            {
                "inputs": "B",
                "max_new_tokens": 1,
                "stop_sequence": "#",
                "extra_stop_sequences": [str(number) for number in range(1000)],
            },
            INVALID,
        ),
        ({"inputs": "B", "max_new_tokens": 1, "model": "no/such"}, "unknown_model"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_generate_request_gets_its_error(
    websocket: ClientConnection, request_: dict[str, Any], code: str
) -> None:
    websocket.send(OPEN)
    websocket.send(json.dumps({"type": "generate", **request_}))
    assert receive(websocket) == {"ok": True}
    assert receive_error(websocket)["code"] == code


@pytest.mark.parametrize("key", ["inputs", "stop_sequence", "extra_stop_sequences"])
def test_half_a_surrogate_pair_is_no_text(websocket: ClientConnection, key: str) -> None:
    websocket.send(OPEN)
    request = {"type": "generate", "max_new_tokens": 1, "inputs": "B", key: "\ud83d"}
    websocket.send(json.dumps(request))  # as the escape \\ud83d
    assert receive(websocket) == {"ok": True}
    assert receive_error(websocket)["code"] == VIOLATION


def test_a_text_frame_that_is_not_utf8_ends_the_connection(websocket: ClientConnection) -> None:
    """As RFC 6455 wants it: such a frame is no message, so nothing is said about it."""
    websocket.send(b'{"type": "\xff"}', text=True)
    with pytest.raises(ConnectionClosed):
        receive(websocket)
    assert websocket.close_code == 1007


def test_a_message_may_come_in_fragments(websocket: ClientConnection) -> None:
    websocket.send(OPEN[index : index + 5] for index in range(0, len(OPEN), 5))
    assert receive(websocket) == {"ok": True}


def test_a_second_session_on_a_connection_is_refused(websocket: ClientConnection) -> None:
    websocket.send(OPEN)
    websocket.send(OPEN)
    assert receive(websocket) == {"ok": True}
    assert receive_error(websocket)["code"] == VIOLATION


def test_what_was_asked_before_a_mistake_is_answered_first(websocket: ClientConnection) -> None:
    for frame in (OPEN, GENERATE, "mistake"):
        websocket.send(frame)
    assert receive(websocket) == {"ok": True}
    assert receive(websocket)["outputs"] == "!"
    assert receive_error(websocket)["code"] == VIOLATION


def test_a_mistake_in_the_middle_of_a_stream_waits_for_its_turn(websocket: ClientConnection) -> None:
    websocket.send('{"type": "open_inference_session", "max_length": 50}')
    websocket.send(STREAM_WITHOUT_END)
    assert receive(websocket) == {"ok": True}
    assert receive(websocket)["outputs"] == "!"
    websocket.send(b"mistake")
    replies = [receive(websocket) for _ in range(48)]
    assert [reply["outputs"] for reply in replies] == [" Hello"] * 48
    assert receive_error(websocket)["code"] == "maximum_length_exceeded"


def test_100_requests_sent_at_once_are_answered_up_to_the_limit(websocket: ClientConnection) -> None:
    websocket.send('{"type": "open_inference_session", "max_length": 1024}')
    assert receive(websocket) == {"ok": True}
    websocket.send('{"type": "generate", "inputs": "B", "max_new_tokens": 200}')  # keeps the others waiting
    for _ in range(99):
        websocket.send('{"type": "generate", "max_new_tokens": 1}')
    replies = [receive(websocket) for _ in range(1 + 16)]
    assert [reply["token_count"] for reply in replies] == [200, *[1] * 16]
    assert receive_error(websocket)["code"] == "too_many_requests"
