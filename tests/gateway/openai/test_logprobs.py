"""Log probabilities come with the text that they belong to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from petals_chat.errors import InvalidParameterError
from petals_chat.gateway.openai import logprobs as logprobs_module
from petals_chat.gateway.openai.logprobs import (
    ChatLogprobsWriter,
    CompletionLogprobsWriter,
    LogprobsFilter,
    LogprobsWriter,
    PlacedLogprobs,
    check_collected,
)
from petals_chat.protocol.messages import FinishReason, TokenLogprobs, TokenProbability


def tokens(*texts: str | bytes) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(TokenProbability(text if isinstance(text, bytes) else text.encode(), -0.5), ())
        for text in texts
    ]


def given(
    logprobs: LogprobsFilter, *texts: str | bytes, certain: int, reason: FinishReason | None = None
) -> list[bytes]:
    return [each.token.chosen.text for each in logprobs.add(tokens(*texts), certain, reason)]


def written(writer: LogprobsWriter, placed: Sequence[PlacedLogprobs]) -> Any:
    """The JSON of these tokens, one after the other."""
    for each in placed:
        writer.add([each])
    return json.loads(msgspec.json.encode(writer.value()))


def offsets(echoed: str, *texts: str) -> list[int]:
    """Where the tokens of a prompt, and one that follows, begin."""
    logprobs = LogprobsFilter(echoed)
    placed = [*logprobs.add_prompt(tokens(*texts)), *logprobs.add(tokens("!"), 1, FinishReason.LENGTH)]
    return [each.offset for each in placed]


def test_what_a_tokenizer_puts_in_front_of_a_prompt_takes_no_place() -> None:
    assert offsets("Hello you", "Hello", " you") == [0, 5, 9]
    assert offsets("Hello you", "<s>", "Hello", " you") == [0, 0, 5, 9]
    assert offsets("Hello you", "<s>", " Hello", " you") == [0, 0, 5, 9]
    assert offsets("<s> Hello", "<s>", " Hello") == [0, 3, 9]


def test_tokens_wait_for_their_text() -> None:
    logprobs = LogprobsFilter()
    assert given(logprobs, "ab", "##", certain=2) == [b"ab"]
    assert given(logprobs, "c", certain=5) == [b"##", b"c"]


def test_tokens_of_the_stop_text_do_not_come() -> None:
    logprobs = LogprobsFilter()
    assert given(logprobs, "ab", "#", certain=2) == [b"ab"]
    assert given(logprobs, "##", certain=2, reason=FinishReason.STOP_SEQUENCE) == []


def test_a_token_with_the_beginning_of_the_stop_text_is_part_of_the_answer() -> None:
    logprobs = LogprobsFilter()
    assert given(logprobs, "a#", "##", certain=1, reason=FinishReason.STOP_SEQUENCE) == [b"a#"]


def test_the_token_that_ends_the_sequence_does_not_come() -> None:
    logprobs = LogprobsFilter()
    assert given(logprobs, "ab", "</s>", certain=2, reason=FinishReason.END_OF_SEQUENCE) == [b"ab"]


def test_all_tokens_of_an_answer_that_is_cut_off_come() -> None:
    logprobs = LogprobsFilter()
    assert given(logprobs, "ab", b"\xe4", certain=2, reason=FinishReason.LENGTH) == [b"ab", b"\xe4"]


def test_both_forms() -> None:
    best = (TokenProbability(b" b", -0.25), TokenProbability(b"\xe4", -3.0))
    placed = LogprobsFilter().add(
        [
            TokenLogprobs(TokenProbability(b"a", -1.0), ()),
            TokenLogprobs(TokenProbability(b" b", -0.25), best),
        ],
        3,
        FinishReason.LENGTH,
    )
    assert written(CompletionLogprobsWriter(), placed) == {
        "tokens": ["a", " b"],
        "token_logprobs": [-1.0, -0.25],
        "top_logprobs": [{"a": -1.0}, {" b": -0.25, "\N{REPLACEMENT CHARACTER}": -3.0}],
        "text_offset": [0, 1],
    }
    assert written(ChatLogprobsWriter(), placed) == {
        "content": [
            {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []},
            {
                "token": " b",
                "logprob": -0.25,
                "bytes": [32, 98],
                "top_logprobs": [
                    {"token": " b", "logprob": -0.25, "bytes": [32, 98]},
                    {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -3.0, "bytes": [228]},
                ],
            },
        ],
        "refusal": None,
    }


def test_of_tokens_that_look_the_same_the_likeliest_counts() -> None:
    top = (TokenProbability(b"\xe4", -0.5), TokenProbability(b"\xe5", -1.0))
    placed = [PlacedLogprobs(0, TokenLogprobs(TokenProbability(b"\xe6", -2.0), top))]
    described = written(CompletionLogprobsWriter(), placed)
    assert described["token_logprobs"] == [-2.0]
    assert described["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -0.5}]


def test_without_tokens_there_is_nothing() -> None:
    assert written(ChatLogprobsWriter(), []) is None
    assert written(CompletionLogprobsWriter(), []) is None


def test_what_is_kept_for_the_end_of_a_reply_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    writers = [ChatLogprobsWriter(), CompletionLogprobsWriter()]
    for writer in writers:
        writer.add([PlacedLogprobs(0, token) for token in tokens("a", "b")])
        assert 0 < writer.size <= len(msgspec.json.encode(writer.value()))
    monkeypatch.setattr(logprobs_module, "MAX_COLLECTED_BYTES", sum(writer.size for writer in writers))
    check_collected(writers)
    writers[0].add([PlacedLogprobs(2, token) for token in tokens("c")])
    with pytest.raises(InvalidParameterError, match="fewer of them"):
        check_collected(writers)


def test_the_first_token_of_a_prompt_has_no_probability() -> None:
    first = PlacedLogprobs(0, TokenLogprobs(TokenProbability(b"a", None), ()))
    assert written(CompletionLogprobsWriter(), [first]) == {
        "tokens": ["a"],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }
