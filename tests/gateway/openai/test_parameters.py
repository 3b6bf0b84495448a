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
    Plan,
    parse,
)
from petals_chat.protocol.messages import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    SamplingParameters,
    ToolCall,
    ToolStyle,
)
from petals_chat.settings import ChatSettings, GenerationDefaults, LimitSettings

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
NO_FUNCTIONS = "this model cannot call functions: its chat template does not provide for them"
GREEDY = ChatSettings(
    stop_token="<end>", extra_stop_sequences=(), generation=GenerationDefaults(do_sample=False)
)


def parsed(kind: type[CommonParameters], **body: Any) -> Any:
    return parse(kind, json.dumps({"model": "org/model", **body}).encode())


def chat_request(chat: ChatSettings = GREEDY, **body: Any) -> GenerationRequest:
    (request,) = chat_plan(chat, **body).requests
    return request


def chat_plan(chat: ChatSettings = GREEDY, style: ToolStyle | None = ToolStyle.HERMES, **body: Any) -> Plan:
    plan: Plan = parsed(ChatParameters, **{"messages": HELLO, **body}).plan(chat, LimitSettings(), style)
    return plan


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
            parameters.plan(GREEDY, LimitSettings(), None)
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


def test_functions_are_handed_to_the_chat_template() -> None:
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    plan = chat_plan(messages=messages, tools=[WEATHER], parallel_tool_calls=False)
    assert plan.tools is not None
    assert (plan.tools.is_forced, plan.tools.only_one) == (False, True)
    (request,) = plan.requests
    assert request.inputs == ChatPrompt(
        (
            ChatMessage("user", "Hello"),
            ChatMessage("assistant", "", (ToolCall("call_1", "weather", "{}"),)),
            ChatMessage("tool", "sunny", tool_call_id="call_1"),
        ),
        tools=(WEATHER,),
    )
    assert request.sampling.grammar is None


def test_an_answer_can_be_made_to_be_a_call() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    for choice, names in (("required", 2), ({"type": "function", "function": {"name": "weather"}}, 1)):
        plan = chat_plan(tools=[WEATHER, other], tool_choice=choice)
        assert plan.tools is not None
        assert len(plan.tools.definitions) == names
        (request,) = plan.requests
        assert isinstance(request.inputs, ChatPrompt)
        assert request.inputs.answer_prefix == "<tool_call>"
        assert '"const": "weather"' in (request.sampling.grammar or "")
        assert request.stop_sequences == ()
    with pytest.raises(InvalidParameterError, match="there is no function 'third'"):
        chat_plan(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "third"}})
    assert chat_plan(tools=[WEATHER], tool_choice="none", style=None).tools is None


def test_json_is_made_sure_of_by_a_grammar() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    request = chat_request(response_format=wanted, stop="!")
    assert (request.sampling.grammar or "").startswith("start: %json {")
    assert request.stop_sequences == ("!",)
    assert chat_request(response_format={"type": "json_object"}).sampling.grammar is not None


def test_an_echo_with_log_probabilities_has_those_of_the_prompt() -> None:
    (request,) = completion_requests(prompt=[1, 2], echo=True, logprobs=1, max_tokens=0)
    assert (request.prompt_logprobs, request.max_new_tokens) == (1, 0)
    assert completion_requests(echo=True)[0].prompt_logprobs is None


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
        ("functions", [{}]),
        ("function_call", "auto"),
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
        (
            {"messages": [{"role": "tool", "content": ""}]},
            "messages[0].tool_call_id: a message of role tool needs it",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content: it is missing",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type: invalid value 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
            "messages[0].tool_calls: only messages of the assistant have them",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
            f"messages: they have calls of functions, but {NO_FUNCTIONS}",
        ),
        ({"messages": HELLO, "tools": [WEATHER]}, f"tools: {NO_FUNCTIONS}"),
        (
            {"messages": HELLO, "tools": [{"type": "web_search"}]},
            "tools[0].type: invalid enum value 'web_search'",
        ),
        (
            {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name: it must be str matching regex '^[a-zA-Z0-9_.-]{1,64}$'",
        ),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice: it needs tools"),
        ({"messages": HELLO, "tool_choice": "maybe"}, "tool_choice: invalid enum value 'maybe'"),
        (
            {"messages": HELLO, "response_format": {"type": "xml"}},
            "response_format.type: invalid value 'xml'",
        ),
        (
            {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.name: it is missing",
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
            {"prompt": "a", "n": 7, "logprobs": 20},
            "prompt: 7 answers with 20 top log probabilities are too many: answers, times one more than these, may "
            "be 128",
        ),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens: it must be int >= 0"),
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
