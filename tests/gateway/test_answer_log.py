"""What followers of an answer see of it."""

from __future__ import annotations

import pytest

from petals_chat.engine.interface import Chunk
from petals_chat.errors import InvalidParameterError, SwarmUnreachableError
from petals_chat.gateway.answer_log import AnswerLog, End, Failed, Piece, QueuePlace
from petals_chat.history.interface import AnswerState
from petals_chat.protocol.messages import FinishReason


def log_of(*chunks: Chunk, continues: bool = False) -> AnswerLog:
    log = AnswerLog(("###", "</s>"), continues=continues)
    for chunk in chunks:
        log.add(chunk)
    return log


def test_each_token_is_seen_once_from_any_position() -> None:
    log = log_of(Chunk("Hi", 1), Chunk(" you", 2), Chunk("!", 1, FinishReason.END_OF_SEQUENCE, 7, 3))
    assert log.text == "Hi you!"
    assert log.after(0) == Piece("Hi you!", 4, 4)
    assert log.after(1) == Piece(" you!", 3, 4)
    assert log.after(4) == Piece("", 0, 4)
    assert log.end_after(3) == End(Piece("!", 1, 4), "stop", 7, 3)


@pytest.mark.parametrize("position", [2, 5, 2**31 - 1])
def test_a_position_where_no_piece_ended_is_refused(position: int) -> None:
    log = log_of(Chunk("Hi", 1), Chunk(" you", 2))
    with pytest.raises(InvalidParameterError, match="position: no piece of the answer ended at token"):
        log.after(position)


def test_the_stop_text_is_no_part_of_the_answer_and_its_tokens_count() -> None:
    log = log_of(Chunk("Hi", 1), Chunk("#", 1))
    assert log.after(0) == Piece("Hi", 1, 1)
    log.add(Chunk("##", 1, FinishReason.STOP_SEQUENCE))
    assert log.end_after(1) == End(Piece("", 2, 3), "stop", 0, 0)
    assert log.text == "Hi"


def test_what_might_have_become_a_stop_text_is_part_of_a_stopped_answer() -> None:
    log = log_of(Chunk("Hi", 1), Chunk(" #", 1))
    log.stop()
    assert log.end_after(1) == End(Piece(" #", 1, 2), "stopped", 0, 0)
    assert log.state is AnswerState.STOPPED


def test_the_space_that_an_answer_begins_with_is_left_out_unless_it_goes_on_from_a_text() -> None:
    assert log_of(Chunk(" ", 1), Chunk(" Hi", 1), Chunk(" you", 1)).after(0) == Piece("Hi you", 3, 3)
    assert log_of(Chunk(" Hi", 1), continues=True).text == " Hi"


def test_nothing_comes_after_the_end() -> None:
    log = log_of(Chunk("Hi", 1))
    log.stop()
    log.add(Chunk(" you", 1))
    log.fail(SwarmUnreachableError("gone"))
    log.interrupt()
    assert (log.text, log.state, log.error) == ("Hi", AnswerState.STOPPED, None)


@pytest.mark.parametrize(
    ("reason", "said"),
    [(FinishReason.LENGTH, "length"), (FinishReason.CONTEXT_FULL, "context_full")],
)
def test_the_reason_of_the_end_is_told(reason: FinishReason, said: str) -> None:
    log = log_of(Chunk("Hi", 1, reason))
    assert log.finish_reason == said
    assert log.state is AnswerState.COMPLETE


def test_an_answer_that_breaks_off_keeps_its_text() -> None:
    error = SwarmUnreachableError("gone")
    log = log_of(Chunk("Hi", 1))
    log.fail(error)
    assert log.after(0).text == "Hi"
    assert log.end_after(1) == Failed(error)
    assert log.state is AnswerState.FAILED


def test_an_answer_that_the_server_ends_is_interrupted() -> None:
    log = log_of(Chunk("Hi", 1))
    log.interrupt()
    assert log.state is AnswerState.INTERRUPTED
    assert log.error is not None


def test_a_session_that_was_closed_under_an_answer_is_an_error() -> None:
    log = log_of(Chunk("Hi", 1, FinishReason.CANCELLED))
    assert log.error is not None
    assert log.error.code == "session_expired"
    assert log.text == "Hi"


def test_the_place_in_the_queue_is_that_of_now() -> None:
    log = log_of(Chunk("", 0, queue_place=3))
    assert log.waits_for == QueuePlace(3)
    log.add(Chunk("Hi", 1))
    assert log.waits_for is None
