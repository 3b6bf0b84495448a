"""The endpoints over a real server, with a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from petals_chat.engine.interface import ModelStatus
from petals_chat.errors import MissingBlocksError, TooManyRequestsError, WorkerLostError
from petals_chat.gateway.openai import event_stream
from petals_chat.protocol.messages import ChatMessage, ChatPrompt, EncodedText, ToolStyle
from tests.fakes import END, FakeTokenizer, ready
from tests.gateway.gateways import Gateway, running_gateway, settings_with, until

HELLO: dict[str, Any] = {"model": "org/model", "messages": [{"role": "user", "content": "Hello there"}]}
CAT: dict[str, Any] = {"model": "org/model", "prompt": "A cat sat"}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"


async def post(gateway: Gateway, path: str, **body: Any) -> Any:
    response = await gateway.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def events(gateway: Gateway, path: str, **body: Any) -> list[str]:
    """The data of the events of a stream."""
    async with gateway.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line async for line in response.aiter_lines() if line and not line.startswith("event: ")]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


async def chunks(gateway: Gateway, path: str, **body: Any) -> list[Any]:
    *data, last = await events(gateway, path, **body)
    assert last == "[DONE]"
    return [json.loads(each) for each in data]


def deltas(chunks: list[Any]) -> list[tuple[Any, Any]]:
    return [(choice["delta"], choice["finish_reason"]) for chunk in chunks for choice in chunk["choices"]]


async def error_of(response: httpx.Response) -> Any:
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_models_are_listed_and_described(gateway: Gateway) -> None:
    listed = (await gateway.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["org/model", "org/private"]
    model = listed["data"][0]
    assert model == {
        "id": "org/model",
        "object": "model",
        "created": model["created"],
        "owned_by": "org",
        "max_model_len": 2048,
    }
    for name in ("org/model", "org%2Fmodel", "old/name"):
        assert (await gateway.http.get(f"/v1/models/{name}")).json() == model
    missing = await gateway.http.get("/v1/models/no/such")
    assert missing.status_code == 404
    assert (await error_of(missing))["code"] == "model_not_found"


async def test_a_chat_completion(gateway: Gateway) -> None:
    reply = await post(gateway, CHAT, max_tokens=3, **HELLO)
    assert reply == {
        "id": reply["id"],
        "object": "chat.completion",
        "created": reply["created"],
        "model": "org/model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " t0 t1 t2", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert reply["id"].startswith("chatcmpl-")
    (request,) = gateway.engine.requests
    assert request.inputs == ChatPrompt((ChatMessage("user", "Hello there"),))
    assert gateway.engine.opened == [("org/model", 2048)]
    assert gateway.engine.owners_of_stateless == ["127.0.0.1"]
    assert gateway.engine.sessions == {}


async def test_a_completion(gateway: Gateway) -> None:
    reply = await post(gateway, COMPLETIONS, **CAT)
    assert reply["object"] == "text_completion"
    assert reply["id"].startswith("cmpl-")
    (choice,) = reply["choices"]
    assert choice["text"].split()[-1] == "t15"
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_the_text_that_ends_an_answer_is_no_part_of_it(is_stream: bool) -> None:
    async with running_gateway() as gateway:
        gateway.engine.tokens = [" a", "#", "b", "##", "#", "never"]
        reply = await answer(gateway, is_stream, stop=["###"], **CAT)
        assert reply == (" a#b", "stop")
        gateway.engine.tokens = [" a", "#", END]
        reply = await answer(gateway, is_stream, stop=["###"], **CAT)
        assert reply == (" a#", "stop")
        gateway.engine.tokens = [" a", "#", "##"]
        reply = await answer(gateway, is_stream, stop=["###"], max_tokens=2, **CAT)
        assert reply == (" a#", "length")


async def answer(gateway: Gateway, is_stream: bool, **body: Any) -> tuple[str, str]:
    if not is_stream:
        (choice,) = (await post(gateway, COMPLETIONS, **body))["choices"]
        return choice["text"], choice["finish_reason"]
    choices = [chunk["choices"][0] for chunk in await chunks(gateway, COMPLETIONS, **body)]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


async def test_the_stop_token_of_a_model_ends_its_chats_but_not_its_completions(gateway: Gateway) -> None:
    gateway.engine.tokens = [" a", "##", "# b", END]
    assert (await post(gateway, COMPLETIONS, **CAT))["choices"][0]["text"] == " a### b"
    gateway.engine.tokens = [" a", "##", "#", " b"]
    assert (await post(gateway, CHAT, **HELLO))["choices"][0]["message"]["content"] == " a"


async def test_a_context_that_is_full_ends_the_answer(gateway: Gateway) -> None:
    reply = await post(gateway, CHAT, max_tokens=10**6, **HELLO)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == 2048


async def test_a_streamed_chat_has_its_chunks_in_order(gateway: Gateway) -> None:
    received = await chunks(gateway, CHAT, max_tokens=2, **HELLO)
    assert deltas(received) == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": " t0"}, None),
        ({"content": " t1"}, None),
        ({}, "length"),
    ]
    assert {chunk["object"] for chunk in received} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in received}) == 1
    assert all("usage" not in chunk for chunk in received)


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, HELLO), (COMPLETIONS, CAT)])
async def test_usage_comes_last_and_on_request(gateway: Gateway, path: str, prompt: dict[str, Any]) -> None:
    *before, last = await chunks(
        gateway, path, max_tokens=2, stream_options={"include_usage": True}, **prompt
    )
    assert [chunk["usage"] for chunk in before] == [None] * len(before)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    assert last["object"] == before[0]["object"]


async def test_several_answers_at_once(gateway: Gateway) -> None:
    reply = await post(gateway, COMPLETIONS, model="default", prompt=["A cat", "B"], n=20, max_tokens=2)
    assert [choice["index"] for choice in reply["choices"]] == list(range(40))
    assert {choice["text"] for choice in reply["choices"]} == {" t0 t1"}
    assert reply["usage"]["prompt_tokens"] == 3
    assert reply["usage"]["completion_tokens"] == 80
    received = await chunks(gateway, CHAT, n=3, max_tokens=2, **HELLO)
    texts = ["", "", ""]
    for chunk in received:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [" t0 t1"] * 3
    assert [delta["role"] for delta, _ in deltas(received)[:3]] == ["assistant"] * 3


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({**HELLO, "model": "no/such"}, 404, "model", "model_not_found"),
        ({**HELLO, "model": "org/private"}, 403, None, "model_not_public"),
        ({"model": "org/model"}, 400, "messages", "invalid_parameter"),
        ({"messages": HELLO["messages"]}, 400, "model", "invalid_parameter"),
        ({**HELLO, "tools": [{}]}, 400, "tools[0].function", "invalid_parameter"),
        ({**HELLO, "user": "x" * 2_000_000}, 413, None, "message_too_large"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_bad_requests_have_their_http_status(
    gateway: Gateway, body: dict[str, Any], status: int, param: str | None, code: str, is_stream: bool
) -> None:
    response = await gateway.http.post(CHAT, json={**body, "stream": is_stream})
    assert response.status_code == status
    error = await error_of(response)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_what_fails_before_the_first_token_has_its_http_status(
    gateway: Gateway, is_stream: bool
) -> None:
    gateway.engine.open_error = TooManyRequestsError("too many")
    response = await gateway.http.post(CHAT, json={**HELLO, "stream": is_stream, "n": 2})
    assert response.status_code == 429
    gateway.engine.open_error = None
    gateway.engine.generate_error = MissingBlocksError([3])
    response = await gateway.http.post(CHAT, json={**HELLO, "stream": is_stream})
    assert response.status_code == 503
    assert await error_of(response) == {
        "message": "No servers holding blocks [3] are online: this part of the model is not served at the moment",
        "type": "server_error",
        "param": None,
        "code": "missing_blocks",
    }


async def test_what_fails_in_the_middle_of_a_stream_is_its_last_event(gateway: Gateway) -> None:
    received = []
    async with gateway.http.stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
        async for line in response.aiter_lines():
            received.append(line)
            if "t5" in line:
                gateway.engine.generate_error = WorkerLostError("org/model")
    last = json.loads([line for line in received if line][-1].removeprefix("data: "))
    assert last["error"]["code"] == "worker_lost"
    assert "[DONE]" not in "".join(received)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_goes_away_ends_its_generation(gateway: Gateway, is_stream: bool) -> None:
    gateway.engine.may_generate.clear()
    asking = asyncio.create_task(gateway.http.post(CHAT, json={**HELLO, "stream": is_stream, "n": 2}))
    await until(lambda: gateway.engine.running == 2)
    asking.cancel()
    await until(lambda: gateway.engine.running == 0 and not gateway.engine.sessions)
    await asyncio.gather(asking, return_exceptions=True)


@pytest.fixture
async def impatient_gateway(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    """One whose streams give a sign of life after much less than 10 seconds."""
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_SECONDS", 0.05)
    async with running_gateway() as gateway:
        yield gateway


async def test_a_quiet_stream_has_comments(impatient_gateway: Gateway) -> None:
    gateway = impatient_gateway
    gateway.engine.may_generate.clear()
    received = []
    body = {**HELLO, "stream": True, "max_tokens": 1}
    async with gateway.http.stream("POST", CHAT, json=body) as response:
        async for line in response.aiter_lines():
            received.append(line)
            if received.count(": still working") == 3:
                gateway.engine.may_generate.set()
    said = [line for line in received if line]
    assert '"role":"assistant"' in said[0]
    assert said[1:4] == [": still working"] * 3
    assert '"content":" t0"' in said[-3]
    assert said[-1] == "data: [DONE]"


async def test_a_server_that_stops_ends_a_stream_with_an_error() -> None:
    body = json.dumps({**HELLO, "stream": True}).encode()
    async with running_gateway() as gateway:
        reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await until(lambda: gateway.engine.tokens_pulled > 4)
        gateway.engine.may_generate.clear()
    received = await reader.read()
    writer.close()
    await writer.wait_closed()
    last = [line for line in received.decode().splitlines() if line.startswith("data: ")][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"


async def test_a_request_may_not_take_longer_than_allowed() -> None:
    async with running_gateway(settings_with(limits={"request_timeout_seconds": 0.1})) as gateway:
        gateway.engine.may_generate.clear()
        response = await gateway.http.post(CHAT, json=HELLO)
    assert response.status_code == 503
    assert (await error_of(response))["code"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/images"), ("GET", "/v1/chat/completions"), ("POST", "/v1/embeddings"), ("GET", "/v1/")],
)
async def test_what_is_not_there_gets_an_error_of_the_same_shape(
    gateway: Gateway, method: str, path: str
) -> None:
    response = await gateway.http.request(method, path)
    assert response.status_code == 404
    error = await error_of(response)
    assert error["code"] == "unknown_url"
    assert f"{method} {path}" in error["message"]


@pytest.mark.parametrize(("path", "code"), [("models/a%0Ab", "model_not_found"), ("a%0Ab/c", "unknown_url")])
async def test_a_line_break_in_an_address_is_like_any_other_letter(
    gateway: Gateway, path: str, code: str
) -> None:
    response = await gateway.http.get(f"/v1/{path}")
    assert response.status_code == 404
    assert (await error_of(response))["code"] == code


async def test_the_documentation_has_the_fields(gateway: Gateway) -> None:
    paths = (await gateway.http.get("/openapi.json")).json()["paths"]
    for path, prompt in ((CHAT, "messages"), (COMPLETIONS, "prompt")):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {prompt, "temperature", "stop", "stream"} <= set(schema["properties"])


async def test_a_response_whole_and_in_a_stream(gateway: Gateway) -> None:
    body: dict[str, Any] = {
        "model": "org/model",
        "input": "Hello there",
        "instructions": "Be kind.",
        "max_output_tokens": 2,
        "metadata": {"a": "b"},
    }
    reply = await post(gateway, RESPONSES, **body)
    assert reply["object"] == "response"
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (message,) = reply["output"]
    assert message["content"] == [
        {"type": "output_text", "text": " t0 t1", "annotations": [], "logprobs": []}
    ]
    assert (reply["metadata"], reply["store"], reply["instructions"]) == ({"a": "b"}, False, "Be kind.")
    assert reply["usage"]["total_tokens"] == reply["usage"]["input_tokens"] + 2
    (request,) = gateway.engine.requests
    assert request.inputs == ChatPrompt(
        (ChatMessage("system", "Be kind."), ChatMessage("user", "Hello there"))
    )
    streamed = [json.loads(each) for each in (await events(gateway, RESPONSES, **body))[:-1]]
    assert [each["sequence_number"] for each in streamed] == list(range(len(streamed)))
    assert [each["type"] for each in streamed] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    last = streamed[-1]["response"]
    assert last["output"][0]["content"] == message["content"]
    assert {*last} == {*reply}


async def test_calls_of_functions_are_told_from_text(gateway: Gateway) -> None:
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    gateway.engine.tokens = ["So", ": ", *call]
    gateway.engine.statuses["org/model"] = calling()
    tools = [{"type": "function", "function": {"name": "f"}}]
    (choice,) = (await post(gateway, CHAT, **HELLO, tools=tools))["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "So: ")
    (made,) = choice["message"]["tool_calls"]
    assert made == {
        "id": made["id"],
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": 1}'},
    }
    streamed = deltas(await chunks(gateway, CHAT, **HELLO, tools=tools))
    assert "".join(delta.get("content") or "" for delta, _ in streamed) == "So: "
    (calls,) = [delta["tool_calls"] for delta, _ in streamed if "tool_calls" in delta]
    assert (calls[0]["index"], calls[0]["function"]) == (0, made["function"])
    assert streamed[-1] == ({}, "tool_calls")
    tool = {"type": "function", "name": "f", "parameters": None, "strict": None}
    response = await post(gateway, RESPONSES, model="org/model", input="Hello", tools=[tool])
    assert [item["type"] for item in response["output"]] == ["message", "function_call"]
    assert response["status"] == "completed"
    streamed_items = [
        (each["output_index"], each["item"]["type"])
        for each in map(
            json.loads,
            (await events(gateway, RESPONSES, model="org/model", input="Hello", tools=[tool]))[:-1],
        )
        if each["type"] == "response.output_item.done"
    ]
    assert streamed_items == [(0, "message"), (1, "function_call")]


async def test_texts_of_tokens_are_made_for_those_alone_who_ask(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    class Text(bytes):
        def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
            decoded.append(bytes(self))
            return super().decode(encoding, errors)

    async def encode(*_: object, **__: object) -> EncodedText:
        return EncodedText((97,), (Text(b"a"),))

    monkeypatch.setattr(FakeTokenizer, "encode", encode)
    assert (await post(gateway, "/tokenize", prompt="a"))["token_strs"] is None
    assert decoded == []
    assert (await post(gateway, "/tokenize", prompt="a", return_token_strs=True))["token_strs"] == ["a"]
    assert decoded == [b"a"]


@pytest.mark.parametrize("path", [CHAT, RESPONSES, "/tokenize"])
async def test_tools_with_numbers_that_cannot_be_sent_to_a_worker_are_refused(
    gateway: Gateway, path: str
) -> None:
    gateway.engine.statuses["org/model"] = calling()
    function = {"name": "f", "parameters": {"properties": {"a": {"maximum": 10**23}}}}
    if path == RESPONSES:
        body = {"model": "org/model", "input": "Hello", "tools": [{"type": "function", **function}]}
    else:
        body = {**HELLO, "tools": [{"type": "function", "function": function}]}
    response = await gateway.http.post(path, json=body)
    assert response.status_code == 400
    assert "tools: their whole numbers must be from -2**63 to 2**64 - 1" in response.text


def calling() -> ModelStatus:
    """The state of a model that can call functions."""
    status = ready()
    assert status.worker is not None
    worker = msgspec.structs.replace(status.worker, tool_style=ToolStyle.HERMES)
    return msgspec.structs.replace(status, worker=worker)


async def test_what_goes_wrong_within_a_response_ends_it(gateway: Gateway) -> None:
    async with gateway.http.stream(
        "POST", RESPONSES, json={"model": "org/model", "input": "Hello", "stream": True}
    ) as response:
        lines = response.aiter_lines()
        while "delta" not in await anext(lines):
            pass
        gateway.engine.generate_error = WorkerLostError("org/model")
        rest = [line async for line in lines if line.startswith("data:")]
    error, failed = (json.loads(line.removeprefix("data: ")) for line in rest[-2:])
    assert (error["type"], error["code"]) == ("error", "worker_lost")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")


async def test_the_tokenizer_can_be_asked(gateway: Gateway) -> None:
    reply = await post(gateway, "/tokenize", prompt="ab", model="org/model", return_token_strs=True)
    assert reply == {"count": 3, "max_model_len": 2048, "tokens": [94, 97, 98], "token_strs": ["^", "a", "b"]}
    assert (await post(gateway, "/tokenize", prompt="ab", add_special_tokens=False))["tokens"] == [97, 98]
    assert (await post(gateway, "/tokenize", **HELLO))["token_strs"] is None
    assert await post(gateway, "/detokenize", tokens=[97, 98]) == {"prompt": "ab"}
    info = (await gateway.http.get("/tokenizer_info?model=old/name")).json()
    assert (info["bos_token"], info["eos_token"], info["model_max_length"]) == ("^", END, 2048)
    assert (await gateway.http.get("/tokenizer_info?model=no/such")).status_code == 404
    assert (await gateway.http.post("/tokenize", content=b"{")).status_code == 400


async def test_an_echo_of_token_ids_is_text(gateway: Gateway) -> None:
    reply = await post(
        gateway, COMPLETIONS, model="default", prompt=[[65, 66], [67]], echo=True, max_tokens=1
    )
    assert [choice["text"] for choice in reply["choices"]] == ["AB t0", "C t0"]
