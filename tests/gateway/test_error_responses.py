"""How errors look to clients."""

from __future__ import annotations

import json

import pytest
from starlette.responses import Response

from petals_chat.errors import (
    AttentionCacheFullError,
    InternalError,
    InvalidParameterError,
    MessageTooLargeError,
    MissingBlocksError,
    ModelNotPublicError,
    PetalsChatError,
    ProtocolViolationError,
    TooManyRequestsError,
    UnknownModelError,
    WorkerLostError,
    error_classes,
    error_from_report,
)
from petals_chat.gateway.error_responses import ErrorResponses

PLAIN = ErrorResponses(debug=False)
DEBUGGING = ErrorResponses(debug=True)


def content(response: Response) -> dict[str, object]:
    values: dict[str, object] = json.loads(bytes(response.body))
    return values


def raised(error: PetalsChatError) -> PetalsChatError:
    try:
        raise error
    except PetalsChatError as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "status", "close_code"),
    [
        (InvalidParameterError("top_p", "no"), 400, 1008),
        (UnknownModelError("a", ["b"]), 404, 1008),
        (ModelNotPublicError("a"), 403, 1008),
        (MessageTooLargeError(9), 413, 1009),
        (TooManyRequestsError("no"), 429, 1013),
        (AttentionCacheFullError(), 429, 1013),
        (WorkerLostError("a"), 503, 1011),
        (MissingBlocksError([1]), 503, 1011),
        (InternalError(), 500, 1011),
        (ZeroDivisionError(), 500, 1011),
    ],
)
def test_each_error_has_its_status_and_close_code(error: Exception, status: int, close_code: int) -> None:
    assert PLAIN.http(error).status_code == status
    assert PLAIN.websocket(error)[1] == close_code


@pytest.mark.parametrize("kind", list(error_classes()))
def test_every_error_can_be_shown_by_every_api(kind: type[PetalsChatError]) -> None:
    error = kind.__new__(kind)
    PetalsChatError.__init__(error, "sentence")
    expected = {"ok": False, "code": kind.code, "traceback": f"{error.name}: sentence"}
    frame, close_code, reason = PLAIN.websocket(error)
    assert json.loads(frame) == content(PLAIN.http(error)) == content(PLAIN.v1(error)) == expected
    assert 1000 <= close_code < 1016
    assert len(reason) < 124


def test_only_a_body_that_is_too_large_has_another_status_than_200_in_v1() -> None:
    statuses = {
        PLAIN.v1(error_from_report(error.report())).status_code
        for error in (UnknownModelError("a", []), WorkerLostError("a"), MissingBlocksError([1]))
    }
    assert statuses == {200}
    assert PLAIN.v1(MessageTooLargeError(9)).status_code == 413


def test_a_sentence_of_many_lines_becomes_one() -> None:
    error = ProtocolViolationError("first\nsecond\r\nthird")
    traceback = content(PLAIN.http(error))["traceback"]
    assert traceback == "ProtocolViolationError: first second third"


def test_in_debug_mode_the_frames_come_before_the_sentence() -> None:
    lines = str(content(DEBUGGING.http(raised(UnknownModelError("a", []))))["traceback"]).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("KeyError: model 'a'")


def test_in_debug_mode_a_workers_frames_are_shown_instead_of_the_gateways() -> None:
    error = raised(error_from_report(raised(WorkerLostError("a")).report()))
    traceback = str(content(DEBUGGING.http(error))["traceback"])
    assert traceback.startswith(error.remote_traceback.rstrip())
    assert traceback.splitlines()[-1].startswith("WorkerLostError: ")


def test_an_unexpected_error_is_logged_and_its_text_is_kept_from_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reply = content(PLAIN.http(ZeroDivisionError("secret")))
    assert reply["code"] == "internal_error"
    assert "secret" not in str(reply)
    assert "ZeroDivisionError: secret" in caplog.text
