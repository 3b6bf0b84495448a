"""What must not appear in uvicorn's log."""

from __future__ import annotations

import logging

import pytest

from petals_chat.gateway.log_privacy import keep_texts_out_of_uvicorns_log


@pytest.fixture(params=["uvicorn.access", "uvicorn.error"])
def logger(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> logging.Logger:
    keep_texts_out_of_uvicorns_log()
    caplog.set_level("DEBUG", request.param)
    return logging.getLogger(request.param)


def test_query_strings_are_cut_off(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    logger.info('%s - "%s %s HTTP/%s" %d', "::1", "POST", "/a?inputs=secret", "1.1", 200)
    assert caplog.messages == ['::1 - "POST /a HTTP/1.1" 200']


def test_frames_are_not_logged(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    logger.debug("< TEXT %r", "secret")
    assert caplog.messages == []


def test_other_lines_stay_as_they_are(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    logger.warning("What? %s, %d", "really?", 5)
    logger.info("no arguments")
    assert caplog.messages == ["What? really?, 5", "no arguments"]
