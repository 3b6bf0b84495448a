"""Each error of the tree in the shape of the OpenAI API."""

from __future__ import annotations

import pytest

from petals_chat.errors import (
    AttentionCacheFullError,
    InternalError,
    InvalidApiKeyError,
    InvalidParameterError,
    MaximumLengthExceededError,
    MessageTooLargeError,
    MissingBlocksError,
    ModelLoadingError,
    ModelNotAllowedError,
    ModelNotPublicError,
    PetalsChatError,
    RateLimitExceededError,
    TooManyRequestsError,
    UnknownModelError,
)
from petals_chat.gateway.error_responses import http_status
from petals_chat.gateway.openai.errors import error_reply


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (InvalidParameterError("n", "x"), 400, "invalid_request_error", "n", "invalid_parameter"),
        (InvalidParameterError("inputs", "x"), 400, "invalid_request_error", "prompt", "invalid_parameter"),
        (
            MaximumLengthExceededError("x", limit=1),
            400,
            "invalid_request_error",
            "prompt",
            "context_length_exceeded",
        ),
        (UnknownModelError("a", ["b"]), 404, "invalid_request_error", "model", "model_not_found"),
        (ModelNotPublicError("a"), 403, "invalid_request_error", None, "model_not_public"),
        (ModelNotAllowedError("a"), 403, "invalid_request_error", None, "model_not_allowed"),
        (InvalidApiKeyError(is_missing=True), 401, "invalid_request_error", None, "invalid_api_key"),
        (RateLimitExceededError(1, "x", 2.5), 429, "rate_limit_error", None, "rate_limit_exceeded"),
        (MessageTooLargeError(1), 413, "invalid_request_error", None, "message_too_large"),
        (TooManyRequestsError("x"), 429, "rate_limit_error", None, "too_many_requests"),
        (AttentionCacheFullError(), 429, "rate_limit_error", None, "attention_cache_full"),
        (ModelLoadingError("a"), 503, "server_error", None, "model_loading"),
        (MissingBlocksError([1]), 503, "server_error", None, "missing_blocks"),
        (InternalError(), 500, "server_error", None, "internal_error"),
    ],
)
def test_an_error_has_its_status_type_field_and_code(
    error: PetalsChatError, status: int, kind: str, param: str | None, code: str
) -> None:
    assert http_status(error) == status
    reply = error_reply(error, {"inputs": "prompt"}).error
    assert (reply.type, reply.param, reply.code) == (kind, param, code)
    assert reply.message


def test_the_sentence_names_the_field_that_the_client_sent() -> None:
    reply = error_reply(
        InvalidParameterError("inputs", "a new session needs some text"), {"inputs": "prompt"}
    )
    assert reply.error.message == "prompt: a new session needs some text"
    error = InvalidParameterError("messages[2].content", "it is missing")
    reply = error_reply(error, {"messages": "input"})
    assert (reply.error.param, reply.error.message) == ("input", "input: it is missing")
