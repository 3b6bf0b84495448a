"""JSON by schema, calls of functions and responses, asked by the `openai` packages for Python and JavaScript."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from pydantic import BaseModel, Field

from petals_chat.swarm.host_options import HostReady
from tests.contract.openai_server import running_openai_server
from tests.contract.serving import Server
from tests.contract.test_openai import is_valid
from tests.contract.wire import TIMEOUT_SECONDS

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CALLING = ["hermes", "llama3", "mistral"]
UNIT = {"type": "string", "enum": ["C", "F"]}
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"unit": UNIT, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": WEATHER_SCHEMA}}
TIME: Any = {"type": "function", "function": {"name": "time"}}
JAVASCRIPT = Path(__file__).parent / "javascript"
DOCUMENT = Path(__file__).parents[2] / "docs" / "openai.md"


@pytest.fixture(scope="module")
def tool_server(
    checkpoints: dict[str, Path], random_host: HostReady, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("openai")
    with running_openai_server(checkpoints["byte_level"], random_host, directory) as server:
        yield server


@pytest.fixture(scope="module")
def client(tool_server: Server) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{tool_server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_SECONDS
    ) as client:
        yield client


class Weather(BaseModel):
    """As `WEATHER_SCHEMA`, for the SDK's own helper."""

    unit: Literal["C", "F"]
    days: Annotated[int, Field(ge=1, le=9)]


def assert_weather(text: str | None) -> None:
    value = json.loads(text or "")
    assert set(value) == {"unit", "days"}
    assert value["unit"] in UNIT["enum"]
    assert 1 <= value["days"] <= 9


@pytest.mark.parametrize("model", ["plain", "hermes"])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_is_json_that_the_schema_allows(client: OpenAI, model: str, temperature: float) -> None:
    wanted: Any = {
        "type": "json_schema",
        "json_schema": {"name": "weather", "schema": WEATHER_SCHEMA, "strict": True},
    }
    parameters: Any = {
        "model": model,
        "messages": HELLO,
        "temperature": temperature,
        "seed": 3,
        "response_format": wanted,
    }
    reply = client.chat.completions.create(**parameters)
    assert is_valid(reply)
    assert reply.choices[0].finish_reason == "stop"
    assert_weather(reply.choices[0].message.content)
    stream: Any = client.chat.completions.create(**parameters, stream=True)
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in stream) == reply.choices[0].message.content
    )


def test_some_json_object_can_be_asked_for(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="plain",
        messages=HELLO,
        temperature=0,
        max_tokens=40,
        response_format={"type": "json_object"},
        logprobs=True,
    )
    assert (reply.choices[0].message.content or "").startswith("{")
    assert reply.choices[0].logprobs is not None


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"$ref": "http://example.org/schema"}, "not present in a registry"),
    ],
)
def test_a_schema_that_cannot_be_used_is_a_bad_request(client: OpenAI, schema: Any, reason: str) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=reason) as caught:
            client.chat.completions.create(
                model="plain", messages=HELLO, response_format=wanted, stream=stream
            )
        assert caught.value.param == "response_format"
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        client.chat.completions.create(model="hermes", messages=HELLO, tools=[tool], tool_choice="required")
    assert caught.value.param == "tools"


@pytest.mark.parametrize("model", CALLING)
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["any", "named"]
)
def test_a_call_of_a_function_can_be_demanded(client: OpenAI, model: str, choice: Any) -> None:
    tools = [WEATHER] if choice == "required" else [TIME, WEATHER]
    parameters: Any = {
        "model": model,
        "messages": HELLO,
        "temperature": 0,
        "tools": tools,
        "tool_choice": choice,
    }
    reply = client.chat.completions.create(**parameters)
    assert is_valid(reply)
    (choice_made,) = reply.choices
    assert choice_made.finish_reason == "tool_calls"
    assert choice_made.message.content is None
    (call,) = choice_made.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert_weather(call.function.arguments)
    with client.chat.completions.stream(**parameters) as stream:
        for event in stream:
            if event.type == "chunk":
                assert is_valid(event.chunk)
    (streamed,) = stream.get_final_completion().choices
    assert streamed.finish_reason == "tool_calls"
    (same,) = streamed.message.tool_calls or []
    assert (same.function.name, same.function.arguments) == (call.function.name, call.function.arguments)


@pytest.mark.parametrize("model", CALLING)
def test_a_chat_goes_on_after_a_call(client: OpenAI, model: str) -> None:
    call: Any = {
        "id": "call_123456789",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"unit": "C", "days": 2}'},
    }
    messages: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_123456789", "content": "sunny"},
    ]
    parameters: Any = {
        "model": model,
        "messages": messages,
        "tools": [WEATHER],
        "temperature": 0,
        "max_tokens": 8,
    }
    reply = client.chat.completions.create(**parameters)
    assert is_valid(reply)
    assert reply.choices[0].message.content
    chunks = list(client.chat.completions.create(**parameters, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == reply.choices[0].message.content


@pytest.mark.parametrize(
    "parameters",
    [{"tools": [WEATHER]}, {"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}],
)
def test_a_model_without_functions_says_so(client: OpenAI, parameters: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="this model cannot call functions"):
        client.chat.completions.create(**{"model": "plain", "messages": HELLO, **parameters})


def test_a_response_to_a_text(client: OpenAI) -> None:
    response = client.responses.create(
        model="plain", input="Hello", instructions="Be kind.", temperature=0, max_output_tokens=8
    )
    assert isinstance(response, Response)
    chat = client.chat.completions.create(
        model="plain",
        messages=[{"role": "system", "content": "Be kind."}, *HELLO],
        temperature=0,
        max_tokens=8,
    )
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.error) == ("incomplete", None)
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert is_valid(response.output[0])
    assert is_valid(response.usage)


def test_a_response_in_a_stream(client: OpenAI) -> None:
    parameters: Any = {
        "model": "plain",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hi", "annotations": []}],
            },
            {"role": "user", "content": "And you?"},
        ],
        "temperature": 0,
        "max_output_tokens": 8,
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }
    whole = client.responses.create(**parameters)
    events: list[Any] = list(client.responses.create(**parameters, stream=True))
    assert events[-1].response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == (
        whole.output_text
    )
    part: Any = whole.output[0]
    assert len(part.content[0].logprobs) == 8
    assert all(len(each.top_logprobs) == 2 for each in part.content[0].logprobs)


@pytest.mark.parametrize("model", CALLING)
def test_a_response_can_be_a_call_or_json(client: OpenAI, model: str) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": WEATHER_SCHEMA, "strict": True}
    parameters: Any = {"model": model, "temperature": 0, "tools": [tool], "tool_choice": "required"}
    response = client.responses.create(input="Hello", **parameters)
    (call,) = response.output
    assert call.type == "function_call"
    assert_weather(call.arguments)
    with client.responses.stream(input="Hello", **parameters) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert streamed.arguments == call.arguments
    assert kinds[-5:] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    items: Any = [
        {"role": "user", "content": "Hello"},
        {"type": "function_call", "call_id": call.call_id, "name": "weather", "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    parsed = client.responses.parse(model=model, input=items, temperature=0, text_format=Weather)
    assert_weather(parsed.output_text)
    assert isinstance(parsed.output_parsed, Weather)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"input": []}, "input"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "background": True}, "background"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, None),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, None),
        ({"input": "a", "include": ["file_search_call.results"]}, "include"),
        ({"input": "a " * 2000}, "input"),
    ],
)
def test_what_a_response_cannot_have_is_a_bad_request(
    client: OpenAI, parameters: Any, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="plain", **parameters)
    assert param is None or caught.value.param == param


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `openai` package for JavaScript."""
    directory = tmp_path_factory.mktemp("javascript")
    for file in JAVASCRIPT.iterdir():
        shutil.copy(file, directory)
    npm = shutil.which("npm")
    installed = npm is not None and (
        subprocess.run(
            [npm, "ci", "--no-audit", "--no-fund"], cwd=directory, capture_output=True, check=False
        ).returncode
        == 0
    )
    if not installed:
        if "CI" in os.environ:
            pytest.fail("the openai package for JavaScript cannot be installed")
        pytest.skip("the openai package for JavaScript cannot be installed")
    return directory


@pytest.mark.parametrize("name", ["completions", "chat", "tools", "responses", "errors"])
def test_the_package_for_javascript_reads_all_replies(
    tool_server: Server, node_modules: Path, name: str
) -> None:
    result = subprocess.run(
        ["node", "contract.mjs", f"{tool_server.url}/v1", name],
        cwd=node_modules,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{name}: ok\n"


EXAMPLES = re.findall(r"^```js\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_for_javascript_runs(tool_server: Server, node_modules: Path, example: str) -> None:
    (node_modules / "example.mjs").write_text(example.replace("localhost:5000", tool_server.address))
    result = subprocess.run(
        ["node", "example.mjs"],
        cwd=node_modules,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"\w{2,}", result.stdout)
