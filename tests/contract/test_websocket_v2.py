"""API v2: one session on one connection, and what the replies to its requests look like."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

from tests.contract.serving import Server
from tests.contract.wire import (
    OPEN,
    STREAM_WITHOUT_END,
    TIMEOUT_SECONDS,
    receive,
    receive_error,
    receive_until_stop,
)

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture
def session(websocket: ClientConnection) -> ClientConnection:
    """A connection with its session."""
    websocket.send(OPEN)
    assert receive(websocket) == {"ok": True}
    return websocket


@pytest.mark.parametrize(
    "opening",
    [
        {"max_length": 64},
        {"max_length": 64, "model": None},
        {"max_length": 64, "model": "reciting"},
        {"max_length": "64", "model": "old/name", "unknown": [1]},
        {"max_length": 64.0},
    ],
    ids=str,
)
def test_opening_is_answered_with_ok_alone(websocket: ClientConnection, opening: dict[str, Any]) -> None:
    websocket.send(json.dumps({"type": "open_inference_session", **opening}))
    assert receive(websocket) == {"ok": True}


@pytest.mark.parametrize("none", [{}, {"stop_sequence": None, "extra_stop_sequences": None}], ids=str)
def test_without_a_stop_sequence_there_is_one_reply(session: ClientConnection, none: dict[str, None]) -> None:
    session.send(json.dumps({"type": "generate", "inputs": "A", "max_new_tokens": 11, **none}))
    session.send('{"type": "generate", "inputs": "B", "max_new_tokens": 2}')
    reply = {"ok": True, "outputs": "😀世界 machine", "stop": True, "token_count": 11}
    assert receive(session) == reply
    assert receive(session) == {"ok": True, "outputs": "! Hello", "stop": True, "token_count": 2}


def test_the_single_reply_may_hold_what_would_stop_a_stream(session: ClientConnection) -> None:
    session.send('{"type": "generate", "inputs": "A", "max_new_tokens": 20, "extra_stop_sequences": ["m"]}')
    assert receive(session)["outputs"].startswith("😀世界 machine[END]")


def test_with_a_stop_sequence_each_token_has_a_reply(session: ClientConnection) -> None:
    session.send('{"type": "generate", "inputs": "C", "max_new_tokens": 1, "stop_sequence": "###"}')
    replies = receive_until_stop(session)
    assert replies == [
        {"ok": True, "outputs": "?", "stop": False, "token_count": 1},
        {"ok": True, "outputs": "<|endoftext|>", "stop": True, "token_count": 1},
    ]


@pytest.mark.parametrize("max_new_tokens", [2, 3, 7])
def test_each_max_new_tokens_tokens_have_a_reply(session: ClientConnection, max_new_tokens: int) -> None:
    request = {"type": "generate", "inputs": "B", "max_new_tokens": max_new_tokens, "stop_sequence": "###"}
    session.send(json.dumps(request))
    replies = [receive(session) for _ in range(4)]
    assert [reply["token_count"] for reply in replies] == [max_new_tokens] * 4
    assert [reply["stop"] for reply in replies] == [False] * 4
    assert "".join(reply["outputs"] for reply in replies) == "!" + " Hello" * (4 * max_new_tokens - 1)


def test_max_length_alone_has_one_reply_with_a_stop_sequence_too(session: ClientConnection) -> None:
    session.send('{"type": "generate", "inputs": "B", "max_length": 4, "stop_sequence": "###"}')
    session.send('{"type": "generate", "inputs": "A", "max_length": 60, "stop_sequence": "[END]"}')
    assert receive(session) == {"ok": True, "outputs": "! Hello Hello", "stop": True, "token_count": 3}
    reply = receive(session)
    assert (reply["outputs"], reply["stop"]) == ("😀世界 machine[END]", True)


@pytest.mark.parametrize(
    ("stop_sequence", "extra_stop_sequences", "text"),
    [
        ("[END]", None, "😀世界 machine[END]"),
        ("[END]", [], "😀世界 machine[END]"),
        ("###", "[END]", "😀世界 machine[END]"),
        ("###", ["[END]"], "😀世界 machine[END]"),
        ("###", ["</s>", "[END]"], "😀世界 machine[END]"),
        ("ne[EN", ["[END]"], "😀世界 machine[EN"),
        ("界 m", None, "😀世界 m"),
    ],
)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 100])
def test_stop_texts_end_the_text_across_tokens_and_are_part_of_it(
    session: ClientConnection, stop_sequence: str, extra_stop_sequences: Any, text: str, max_new_tokens: int
) -> None:
    request = {
        "type": "generate",
        "inputs": "A",
        "max_new_tokens": max_new_tokens,
        "stop_sequence": stop_sequence,
        "extra_stop_sequences": extra_stop_sequences,
    }
    session.send(json.dumps(request))
    assert "".join(reply["outputs"] for reply in receive_until_stop(session)) == text


def test_the_stop_text_of_a_prompt_stops_nothing(session: ClientConnection) -> None:
    session.send('{"type": "generate", "inputs": "[END]B", "max_new_tokens": 1, "stop_sequence": "[END]"}')
    assert [receive(session)["outputs"] for _ in range(3)] == ["!", " Hello", " Hello"]


def test_a_reply_never_splits_a_character(session: ClientConnection) -> None:
    """ "😀" has 4 tokens, "世" and "界" have 3 each."""
    session.send('{"type": "generate", "inputs": "A", "max_new_tokens": 1, "stop_sequence": "[END]"}')
    replies = receive_until_stop(session)
    assert [(reply["outputs"], reply["token_count"]) for reply in replies[:4]] == [
        ("😀", 4),
        ("世", 3),
        ("界", 3),
        (" machine", 1),
    ]
    assert REPLACEMENT_CHARACTER not in json.dumps(replies, ensure_ascii=False)


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_character_cut_by_the_end_of_a_request_comes_with_the_next(
    session: ClientConnection, cut: int
) -> None:
    session.send(json.dumps({"type": "generate", "inputs": "A", "max_new_tokens": cut}))
    session.send(json.dumps({"type": "generate", "max_new_tokens": 10 - cut}))
    replies = [receive(session), receive(session)]
    assert replies[0]["outputs"] + replies[1]["outputs"] == "😀世界"
    assert [reply["token_count"] for reply in replies] == [cut, 10 - cut]


def test_every_reply_has_the_same_four_keys(session: ClientConnection) -> None:
    session.send('{"type": "generate", "inputs": "A", "max_new_tokens": 2}')
    session.send('{"type": "generate", "inputs": "C", "max_new_tokens": 1, "stop_sequence": "###"}')
    replies = [receive(session), *receive_until_stop(session)]
    assert {tuple(reply) for reply in replies} == {("ok", "outputs", "stop", "token_count")}
    assert all(reply["ok"] is True and type(reply["token_count"]) is int for reply in replies)


def test_a_session_goes_on_after_its_stop(session: ClientConnection) -> None:
    session.send('{"type": "generate", "inputs": "A", "max_new_tokens": 1, "stop_sequence": "[END]"}')
    receive_until_stop(session)
    session.send('{"type": "generate", "max_new_tokens": 12}')
    assert receive(session)["outputs"].startswith(" tail~~~")
    session.send('{"type": "generate", "inputs": "B", "max_new_tokens": 2}')
    assert receive(session)["outputs"] == "! Hello"


def test_requests_may_be_sent_ahead_of_all_replies(websocket: ClientConnection) -> None:
    websocket.send(OPEN)
    websocket.send('{"type": "generate", "inputs": "B", "max_new_tokens": 1}')
    websocket.send('{"type": "generate", "max_new_tokens": 1}')
    assert [receive(websocket) for _ in range(3)] == [
        {"ok": True},
        {"ok": True, "outputs": "!", "stop": True, "token_count": 1},
        {"ok": True, "outputs": " Hello", "stop": True, "token_count": 1},
    ]


def test_a_model_named_again_in_generate_must_be_the_sessions(session: ClientConnection) -> None:
    session.send('{"type": "generate", "model": "old/name", "inputs": "B", "max_new_tokens": 1}')
    assert receive(session)["outputs"] == "!"
    session.send('{"type": "generate", "model": "byte_level", "inputs": "B", "max_new_tokens": 1}')
    assert receive_error(session)["code"] == "invalid_parameter"


def test_a_session_belongs_to_its_connection(session: ClientConnection, server: Server) -> None:
    with connect(server.v2_url) as other:
        other.send('{"type": "generate", "inputs": "B", "max_new_tokens": 1}')
        assert receive_error(other)["code"] == "protocol_violation"
    session.send('{"type": "generate", "inputs": "B", "max_new_tokens": 1}')
    assert receive(session)["outputs"] == "!"


def test_a_full_session_ends_a_stream_with_an_error(websocket: ClientConnection) -> None:
    websocket.send('{"type": "open_inference_session", "max_length": 4}')
    websocket.send(STREAM_WITHOUT_END)
    replies = [receive(websocket) for _ in range(4)]
    assert [reply.get("outputs") for reply in replies] == [None, "!", " Hello", " Hello"]
    assert "Maximum length exceeded" in receive_error(websocket)["traceback"]


def test_max_new_tokens_far_above_the_limit_ends_with_the_session(websocket: ClientConnection) -> None:
    websocket.send('{"type": "open_inference_session", "max_length": 4}')
    websocket.send('{"type": "generate", "inputs": "B", "max_new_tokens": 4096}')
    replies = [receive(websocket), receive(websocket)]
    assert replies[1] == {"ok": True, "outputs": "! Hello Hello", "stop": True, "token_count": 3}


def test_the_server_pings(server: Server) -> None:
    """Seen in the frames themselves, since clients answer pings without telling."""
    protocol = ClientProtocol(parse_uri(server.v2_url))
    protocol.send_request(protocol.connect())
    host, _, port = server.address.partition(":")
    opcodes: list[Opcode] = []
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS) as client:
        while Opcode.PING not in opcodes:
            client.sendall(b"".join(protocol.data_to_send()))
            protocol.receive_data(client.recv(65536))
            opcodes += [event.opcode for event in protocol.events_received() if isinstance(event, Frame)]
