"""Documentation of the OpenAI-compatible API in the terms of OpenAPI: what requests may say, and what replies have."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from pydantic import BaseModel


class Model(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All models, the default one first."""

    object: Literal["list"]
    data: list[Model]


class PromptTokensDetails(BaseModel):
    """How many of the prompt's tokens were processed for an earlier request."""

    cached_tokens: int


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(BaseModel):
    """How probable a token was."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenTokenLogprob(TokenLogprob):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """The answer's tokens."""

    content: list[ChosenTokenLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """The tokens; the first one of a prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Function(BaseModel):
    """Which function was called, and with what."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: Function


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The reply, unless it is a stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The reply, unless it is a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class InputTokensDetails(PromptTokensDetails):
    """The same; nothing is paid for keeping them."""

    cache_write_tokens: Literal[0]


class ResponseUsage(BaseModel):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: dict[Literal["reasoning_tokens"], int]
    total_tokens: int


class OutputText(BaseModel):
    """A text of the answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChosenTokenLogprob]


class OutputMessage(BaseModel):
    """A message of the answer."""

    id: str
    type: Literal["message"]
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCall(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function_call"]
    status: Literal["completed"]
    call_id: str
    name: str
    arguments: str


class Response(BaseModel):
    """The reply, unless it is a stream. Further fields repeat the request, or say that it has none of them."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: dict[Literal["reason"], str] | None
    model: str
    output: list[OutputMessage | FunctionCall]
    usage: ResponseUsage
    store: Literal[False]


class Tokenized(BaseModel):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The text."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What a tokenizer is."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str


class ErrorObject(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """Why a request failed."""

    error: ErrorObject


FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request cannot be done as it stands, or not now."},
    "5XX": {"model": Failure, "description": "The server, or the model, cannot answer."},
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "description": "An event. Its data is JSON, or `[DONE]` at the end.",
                    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
                    "required": ["data"],
                }
            }
        }
    },
}
"""The other form of replies that can be streams."""
MODEL_IN_QUERY: dict[str, Any] = {
    "parameters": [
        {
            "name": "model",
            "in": "query",
            "required": False,
            "description": "Name of the model; without it, the server's default model.",
            "schema": {"type": "string"},
        }
    ]
}


def request_body(parameters: type[msgspec.Struct]) -> dict[str, Any]:
    """The ``requestBody`` of an operation that takes these parameters as JSON."""
    (schema,), components = msgspec.json.schema_components([parameters])
    content = {"application/json": {"schema": _inlined(schema, components)}}
    return {"requestBody": {"content": content, "required": True}}


def _inlined(schema: Any, components: dict[str, Any]) -> Any:
    """The schema with its parts in it, not beside it."""
    if isinstance(schema, list):
        return [_inlined(part, components) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(reference := schema.get("$ref"), str):
        return _inlined(components[reference.rpartition("/")[2]], components)
    # A discriminator would name parts that are not there any more.
    return {name: _inlined(part, components) for name, part in schema.items() if name != "discriminator"}
