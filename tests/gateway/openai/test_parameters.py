"""What bodies mean, and what is said of those that mean nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from petals_chat.errors import InvalidParameterError
from petals_chat.gateway.openai.parameters import (
    MAX_CHOICES,
    ChatParameters,
    CommonParameters,
    CompletionParameters,
    parse,
)
from petals_chat.protocol.messages import ChatMessage, ChatPrompt, GenerationRequest, SamplingParameters
from petals_chat.settings import ChatSettings, GenerationDefaults, LimitSettings

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = ChatSettings(
    stop_token="<end>", extra_stop_sequences=(), generation=GenerationDefaults(do_sample=False)
)


def parsed(kind: type[CommonParameters], **body: Any) -> Any:
    return parse(kind, json.dumps(body).encode())


def chat_request(chat: ChatSettings = GREEDY, **body: Any) -> GenerationRequest:
    (request,) = parsed(ChatParameters, **{"messages": HELLO, **body}).plan(chat, LimitSettings()).requests
    assert isinstance(request, GenerationRequest)
    return request


def completion_requests(**body: Any) -> tuple[GenerationRequest, ...]:
    requests: tuple[GenerationRequest, ...] = (
        parsed(CompletionParameters, **{"prompt": "A cat", **body}).plan(LimitSettings()).requests
    )
    return requests


def refused(kind: type[CommonParameters], **body: Any) -> str:
    """The sentence with which the body is refused."""

    def read() -> None:
        parameters = parsed(kind, **body)
        if isinstance(parameters, ChatParameters):
            parameters.plan(GREEDY, LimitSettings())
        else:
            parameters.plan(LimitSettings())

    with pytest.raises(InvalidParameterError) as caught:
        read()
    assert str(caught.value).startswith(f"{caught.value.data['parameter']}: ")
    return str(caught.value)


def test_a_chat_becomes_one_request() -> None:
    assert chat_request() == GenerationRequest(
        ChatPrompt((ChatMessage("user", "Hello"),)), stop_sequences=("<end>",), hide_end_of_sequence=True
    )


def test_messages_may_have_parts_and_the_newer_name_of_the_system() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": "Hi."},
        {"role": "system", "content": "Be kinder."},
    ]
    assert chat_request(messages=messages).inputs == ChatPrompt(
        (
            ChatMessage("system", "Be kind."),
            ChatMessage("user", "Hello"),
            ChatMessage("assistant", "Hi."),
            ChatMessage("system", "Be kinder."),
        )
    )


def test_what_a_chat_does_not_say_is_as_the_model_has_it() -> None:
    generation = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05)
    chat = ChatSettings(generation=generation)
    assert chat_request(chat).sampling == SamplingParameters(True, 0.6, 20, 0.9, 1.05)
    assert chat_request(chat, temperature=1.0, top_k=0, seed=7).sampling == SamplingParameters(
        True, 1.0, 0, 0.9, 1.05, 7
    )


def test_temperature_decides_between_sampling_and_the_likeliest_token() -> None:
    assert chat_request(temperature=0).sampling == SamplingParameters()
    assert chat_request(ChatSettings(), temperature=0).sampling == SamplingParameters()
    assert chat_request(temperature=0.5).sampling.do_sample


def test_what_a_completion_does_not_say_is_as_openai_has_it() -> None:
    assert completion_requests() == (
        GenerationRequest(
            "A cat", SamplingParameters(do_sample=True), max_new_tokens=16, hide_end_of_sequence=True
        ),
    )


def test_several_prompts_have_several_answers_each_with_its_own_randomness() -> None:
    requests = completion_requests(prompt=["A", "B"], n=2, seed=5)
    assert [(request.inputs, request.sampling.seed) for request in requests] == [
        ("A", 5),
        ("A", 6),
        ("B", 5),
        ("B", 6),
    ]
    assert [request.sampling.seed for request in completion_requests(n=2, seed=-1)] == [2**63 - 1, 0]


def test_prompts_may_be_token_ids() -> None:
    assert [request.inputs for request in completion_requests(prompt=[1, 2])] == [(1, 2)]
    assert [request.inputs for request in completion_requests(prompt=[[1], [2, 3]])] == [(1,), (2, 3)]


@pytest.mark.parametrize("temperature", [0, 1])
def test_penalties_and_biases_count_with_and_without_sampling(temperature: float) -> None:
    sampling = chat_request(
        temperature=temperature, frequency_penalty=0.5, presence_penalty=-1, logit_bias={"17": -100, "3": 2.5}
    ).sampling
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -1)
    assert sampling.logit_bias == {17: -100, 3: 2.5}


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    assert chat_request().sampling.top_logprobs is None
    assert chat_request(logprobs=False).sampling.top_logprobs is None
    assert chat_request(logprobs=True).sampling.top_logprobs == 0
    assert chat_request(logprobs=True, top_logprobs=5).sampling.top_logprobs == 5
    assert completion_requests(logprobs=0)[0].sampling.top_logprobs == 0
    assert completion_requests(logprobs=3)[0].sampling.top_logprobs == 3


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": None}, None),
    ],
)
def test_the_length_of_an_answer_has_two_names(body: dict[str, Any], tokens: int | None) -> None:
    assert chat_request(**body).max_new_tokens == tokens


def test_stop_sequences_come_before_those_of_the_model() -> None:
    assert chat_request(stop="a").stop_sequences == ("a", "<end>")
    assert chat_request(stop=["a", "b", "a", "<end>"]).stop_sequences == ("a", "b", "<end>")
    assert completion_requests(stop=["a"])[0].stop_sequences == ("a",)


def test_only_streams_come_token_by_token() -> None:
    assert chat_request(stream=False).chunk_tokens is None
    assert chat_request(stream=True).chunk_tokens == 1


def test_fields_that_change_nothing_are_ignored() -> None:
    plain = chat_request()
    assert plain == chat_request(
        user="Ada",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        parallel_tool_calls=True,
        reasoning_effort="low",
        something_new=[1],
        tools=[],
        tool_choice="none",
        functions=None,
        response_format={"type": "text"},
        modalities=["text"],
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("function_call", "auto"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
    ],
)
def test_fields_that_cannot_be_honoured_are_refused_by_name(name: str, value: Any) -> None:
    assert refused(ChatParameters, messages=HELLO, **{name: value}).startswith(
        f"{name}: this server does not"
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "messages: it is missing"),
        ({"messages": []}, "messages: it must be `list` of length >= 1".replace("`", "")),
        ({"messages": "Hello"}, "messages: it must be list, got str"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: it is missing"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role: invalid enum value 'tool'"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content: it must be str | list, got null",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type: invalid value 'image_url'",
        ),
        ({"messages": HELLO, "temperature": 3}, "temperature: it must be float <= 2.0"),
        ({"messages": HELLO, "temperature": "1"}, "temperature: it must be float | null, got str"),
        ({"messages": HELLO, "top_logprobs": 1}, "top_logprobs: it needs logprobs to be true"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens: it must be int >= 1"),
        ({"messages": HELLO, "n": 129}, f"n: it must be int <= {MAX_CHOICES}"),
        ({"messages": HELLO, "stop": ""}, "stop: an empty text would stop everything at once"),
        ({"messages": HELLO, "stop": ["a"] * 17}, "stop: there may be 16 stop sequences, not 17"),
        ({"messages": HELLO, "stop": "a" * 257}, "stop: a stop sequence may have 256 characters, not 257"),
        (
            {"messages": HELLO, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage: it must be bool | null, got int",
        ),
    ],
)
def test_bad_chats_are_refused_with_a_reason(body: dict[str, Any], sentence: str) -> None:
    assert refused(ChatParameters, **body) == sentence


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt: it is missing"),
        ({"prompt": []}, "prompt: a list must have at least one text or token id"),
        ({"prompt": [[1], []]}, "prompt: a list must have at least one text or token id"),
        (
            {"prompt": [1, "a"]},
            "prompt: a list must have only texts, only token ids, or only lists of them",
        ),
        ({"prompt": "a", "logprobs": 21}, "logprobs: it must be int <= 20"),
        (
            {"prompt": "a", "n": 17, "logprobs": 0},
            "prompt: one request may have 16 answers with logprobs, not 1 times 17",
        ),
        (
            {"prompt": "a", "echo": True, "logprobs": 0},
            "echo: this server does not know the log probabilities of a prompt",
        ),
        ({"prompt": [1], "echo": True}, "echo: this server returns prompts of text only, not of token ids"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias: it must be int, got str"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias[...]: it must be float <= 100.0"),
        ({"prompt": "a", "presence_penalty": -3}, "presence_penalty: it must be float >= -2.0"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt: one request may have 128 answers, not 65 times 2"),
        ({"prompt": "a", "suffix": "b"}, "suffix: this server does not support it; leave it out"),
        ({"prompt": "a", "best_of": 3}, "best_of: this server does not support it; leave it out"),
    ],
)
def test_bad_completions_are_refused_with_a_reason(body: dict[str, Any], sentence: str) -> None:
    assert refused(CompletionParameters, **body) == sentence


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"a"', b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}']
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidParameterError, match=r"^body: it"):
        parse(CompletionParameters, body)
