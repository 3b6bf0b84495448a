"""The error tree: stable codes, sentences, and the way across the socket."""

import pytest

from petals_chat.errors import (
    AttentionCacheFullError,
    EngineError,
    ErrorReport,
    MaximumLengthExceededError,
    MissingBlocksError,
    PetalsChatError,
    SessionExpiredError,
    UnknownModelError,
    error_classes,
    error_from_report,
)


def test_every_code_belongs_to_one_class() -> None:
    codes = [kind.code for kind in error_classes() if kind is not PetalsChatError]
    assert len(codes) == len(set(codes))


def test_an_error_crosses_the_socket_with_its_kind_sentence_data_and_traceback() -> None:
    with pytest.raises(MissingBlocksError) as raised:
        raise MissingBlocksError([3, 4])
    received = error_from_report(raised.value.report())
    assert isinstance(received, MissingBlocksError)
    assert received.message == raised.value.message
    assert received.data == {"blocks": (3, 4)}
    assert "test_errors.py" in received.remote_traceback


def test_an_unknown_code_becomes_an_engine_error() -> None:
    error = error_from_report(ErrorReport("from_the_future", "something new"))
    assert type(error) is EngineError
    assert error.message == "something new"


@pytest.mark.parametrize(
    ("error", "name", "substring"),
    [
        (MissingBlocksError([0]), "MissingBlocksError", "No servers holding blocks"),
        (UnknownModelError("x", ["y"]), "KeyError", "'x'"),
        (
            MaximumLengthExceededError("too long", limit=8),
            "MaximumLengthExceededError",
            "Maximum length exceeded",
        ),
        (AttentionCacheFullError(), "AttentionCacheFullError", "attention cache is full"),
        (SessionExpiredError("abc"), "SessionExpiredError", "Session abc expired"),
    ],
)
def test_clients_find_the_words_they_look_for(error: PetalsChatError, name: str, substring: str) -> None:
    assert error.name == name
    assert substring in error.message
