"""Log probabilities come with the text that they belong to."""

from __future__ import annotations

from petals_chat.gateway.openai.logprobs import LogprobsFilter, chat_logprobs, completion_logprobs
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
    assert completion_logprobs(placed) == {
        "tokens": ["a", " b"],
        "token_logprobs": [-1.0, -0.25],
        "top_logprobs": [{"a": -1.0}, {" b": -0.25, "\N{REPLACEMENT CHARACTER}": -3.0}],
        "text_offset": [0, 1],
    }
    assert chat_logprobs(placed) == {
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


def test_without_tokens_there_is_nothing() -> None:
    assert chat_logprobs([]) is None
    assert completion_logprobs([]) is None
