"""The Responses API in its stateless core: its parameters, as those of a chat, and its replies. No I/O.

Nothing is stored: a request brings all of the conversation along, and a response cannot be asked for again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from petals_chat.errors import InvalidParameterError
from petals_chat.gateway.openai.errors import ErrorReply
from petals_chat.gateway.openai.event_stream import event
from petals_chat.gateway.openai.logprobs import ContentLogprobsWriter, check_collected, described
from petals_chat.gateway.openai.parameters import (
    MAX_MESSAGES,
    MAX_TOOLS,
    CalledFunction,
    ChatParameters,
    FunctionDefinition,
    FunctionTool,
    JsonObjectResponse,
    JsonSchemaFormat,
    JsonSchemaResponse,
    Message,
    MessageToolCall,
    NamedFunction,
    ResponseFormat,
    TextPart,
    TextResponse,
    ToolChoice,
    parse,
)
from petals_chat.gateway.openai.replies import Choice, Json, Piece, ReplyWriter, Usage
from petals_chat.protocol.messages import ToolCall

LOGPROBS = "message.output_text.logprobs"
"""What ``include`` has to name for log probabilities."""


_OPENING = ("response.created", "response.in_progress")


class InputText(msgspec.Struct, frozen=True, tag_field="type", tag="input_text"):
    """A part of a message that is sent."""

    text: str


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """A part of a message that the model once wrote."""

    text: str


class RefusalText(msgspec.Struct, frozen=True, tag_field="type", tag="refusal"):
    """A part of a message in which a model once refused."""

    refusal: str

    @property
    def text(self) -> str:
        """The refusal as any other text."""
        return self.refusal


Part = InputText | OutputText | RefusalText


class MessageItem(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[Part, ...]


class CallItem(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call of a function by the model."""

    call_id: str
    name: str
    arguments: str


class CallOutputItem(msgspec.Struct, frozen=True, tag_field="type", tag="function_call_output"):
    """What a call gave."""

    call_id: str
    output: str | tuple[Part, ...]


class ReasoningItem(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    """What another model thought; it is left out."""


Item = MessageItem | CallItem | CallOutputItem | ReasoningItem


class JsonSchemaText(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON that a schema allows."""

    name: str
    schema: dict[str, Any] | bool
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True):
    """What the text of the answer has to be."""

    format: TextResponse | JsonObjectResponse | JsonSchemaText | None = None


class ResponseTool(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    type: Literal["function"]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(msgspec.Struct, frozen=True):
    """Which function has to be called."""

    name: str
    type: Literal["function"]


class ResponseParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The body of ``POST /v1/responses``."""

    model: str
    """Name of the model; "default" is the server's default model."""
    input: str | Annotated[tuple[Item, ...], Meta(min_length=1, max_length=MAX_MESSAGES)]
    """The conversation so far: a text of the user, or messages, calls and what these gave."""
    instructions: str | None = None
    """A message of the system in front of it."""
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**53)] | None = None
    """Tokens of the answer at most."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """Below 1 is more predictable, above 1 more surprising; 0 always takes the likeliest token."""
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Draw from the likeliest tokens that together have this probability."""
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    """Over 0 makes a token less likely each time that the answer has it."""
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    """Over 0 makes tokens less likely that the answer has."""
    text: TextOptions | None = None
    """``format``: any text, or JSON."""
    tools: Annotated[tuple[ResponseTool, ...], Meta(max_length=MAX_TOOLS)] | None = None
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    """Whether it has to call one, and which."""
    parallel_tool_calls: bool | None = None
    """False: only the first call of an answer counts."""
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """Tell the log probabilities of so many of the likeliest tokens in each place."""
    include: tuple[str, ...] | None = None
    """``message.output_text.logprobs``: tell the log probabilities of the answer's tokens."""
    stream: bool | None = None
    """Send the answer piece by piece, as server-sent events."""
    metadata: dict[str, str] | None = None
    """Repeated in the response."""

    def as_chat(self) -> ChatParameters:
        """The same request as a chat.

        Raises:
            InvalidParameterError: ``include`` names what there is not.
        """
        for name in self.include or ():
            if name not in (LOGPROBS, "reasoning.encrypted_content"):  # models here have none of the latter
                raise InvalidParameterError("include", f"this server does not have {name!r}")
        logprobs = LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        choice = self.tool_choice
        return ChatParameters(
            model=self.model,
            messages=self._messages(),
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            response_format=self._format(),
            tools=tuple(
                FunctionTool(FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict))
                for tool in self.tools or ()
            ),
            tool_choice=(
                ToolChoice(NamedFunction(choice.name)) if isinstance(choice, ResponseToolChoice) else choice
            ),
            parallel_tool_calls=self.parallel_tool_calls,
            logprobs=logprobs,
            top_logprobs=self.top_logprobs if logprobs else None,
            stream=self.stream,
        )

    def _messages(self) -> tuple[Message, ...]:
        messages = [] if self.instructions is None else [Message("system", self.instructions)]
        if isinstance(self.input, str):
            return (*messages, Message("user", self.input))
        for item in self.input:
            match item:
                case MessageItem():
                    messages.append(Message(item.role, _plain(item.content)))
                case CallItem():
                    call = MessageToolCall(item.call_id, CalledFunction(item.name, item.arguments))
                    last = messages[-1] if messages else None
                    if last and last.role == "assistant":  # one message has a turn's text and calls
                        messages[-1] = msgspec.structs.replace(
                            last, tool_calls=(*(last.tool_calls or ()), call)
                        )
                    else:
                        messages.append(Message("assistant", tool_calls=(call,)))
                case CallOutputItem():
                    messages.append(Message("tool", _plain(item.output), tool_call_id=item.call_id))
        if not messages:
            raise InvalidParameterError("input", "it has no message")
        return tuple(messages)

    def _format(self) -> ResponseFormat | None:
        wanted = self.text.format if self.text else None
        if isinstance(wanted, JsonSchemaText):
            return JsonSchemaResponse(
                JsonSchemaFormat(wanted.name, wanted.schema, wanted.description, wanted.strict)
            )
        return wanted


UNSUPPORTED: Mapping[str, Callable[[Any], bool]] = {
    "background": lambda value: value is False,
    "conversation": lambda value: False,
    "context_management": lambda value: not value,
    "max_tool_calls": lambda value: False,
    "moderation": lambda value: False,
    "previous_response_id": lambda value: False,
    "prompt": lambda value: False,
    "truncation": lambda value: value == "disabled",
}
"""Fields that would change the answer, and the values with which they do not."""


def parse_response(body: bytes) -> ResponseParameters:
    """The parameters in a JSON body.

    Raises:
        InvalidParameterError: with the parameter's name, and what is wrong with it.
    """
    return parse(ResponseParameters, body, UNSUPPORTED, complete=_with_types)


def _with_types(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body with the types of messages, which may be left out, in it."""
    items = values.get("input")
    if not isinstance(items, list):
        return values
    typed = [
        {"type": "message", **item} if isinstance(item, dict) and "role" in item else item for item in items
    ]
    return {**values, "input": typed}


class ResponsesWriter(ReplyWriter):
    """Writes a response.

    Args:
        model: key of the model.
        defaults: ``temperature`` and ``top_p`` where the request has none.
    """

    def __init__(self, model: str, parameters: ResponseParameters, **defaults: float) -> None:
        self._parameters = parameters
        self._head = self._describe(model, parameters, defaults)
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._logprobs = ContentLogprobsWriter()
        self._next_number = len(_OPENING)  # the opening is written when the first event after it is known
        self._has_message = False

    def collect(self, choice: Choice, piece: Piece) -> None:
        """Keep the log probabilities."""
        self._logprobs.add(piece.logprobs)
        check_collected((self._logprobs,))

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The response."""
        return msgspec.json.encode(self._finished(choices[0], usage))

    def opening(self, choices: int) -> list[bytes]:
        """Says that the response is being made."""
        response = {**self._head, "status": "in_progress", "output": []}
        return [_numbered(number, name, {"response": response}) for number, name in enumerate(_OPENING)]

    def piece(self, choice: Choice, piece: Piece) -> list[bytes]:
        """A delta of the text; at the end, what is done, and the calls."""
        self.collect(choice, piece)
        events = []
        if piece.text or piece.logprobs:
            events += self._message_begins()
            logprobs = [described(each.token) for each in piece.logprobs]
            events.append(self._text_event("delta", delta=piece.text, logprobs=logprobs))
        if choice.finish_reason is not None:
            if not choice.calls:
                events += self._message_begins()
            events += self._message_ends(choice)
            first = int(self._has_message)
            for index, call in enumerate(choice.calls, start=first):
                events += self._call_events(index, call)
        return events

    def closing(self, choices: Sequence[Choice], usage: Usage) -> list[bytes]:
        """The whole response."""
        response = self._finished(choices[0], usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def failure(self, error: ErrorReply) -> list[bytes]:
        """The error, and the response that failed."""
        problem = error.error
        response = {
            **self._head,
            "status": "failed",
            "output": [],
            "error": {"code": "server_error", "message": problem.message},
        }
        return [
            self._event("error", code=problem.code, message=problem.message, param=problem.param),
            self._event("response.failed", response=response),
        ]

    def _message_begins(self) -> list[bytes]:
        if self._has_message:
            return []
        self._has_message = True
        item = {**self._message("in_progress", ""), "content": []}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place, part=_text_part("", [])),
        ]

    def _message_ends(self, choice: Choice) -> list[bytes]:
        if not self._has_message:
            return []
        item = self._message(_status(choice), choice.text)
        return [
            self._text_event("done", text=choice.text, logprobs=self._logprobs.value()),
            self._event("response.content_part.done", **self._place, part=item["content"][0]),
            self._event("response.output_item.done", output_index=0, item=item),
        ]

    def _call_events(self, index: int, call: ToolCall) -> list[bytes]:
        item = _call_item(call)
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "status": "in_progress", "arguments": ""}
        arguments = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event(f"{arguments}.delta", **place, delta=call.arguments),
            self._event(f"{arguments}.done", **place, name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    @property
    def _place(self) -> Json:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _text_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(f"response.output_text.{kind}", **self._place, **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        number = self._next_number
        self._next_number += 1
        return _numbered(number, name, fields)

    def _message(self, status: str, text: str) -> Json:
        return {
            "id": self._message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [_text_part(text, self._logprobs.value())],
        }

    def _finished(self, choice: Choice, usage: Usage) -> Json:
        status = _status(choice)
        output = [_call_item(call) for call in choice.calls]
        if choice.text or not choice.calls:
            output.insert(0, self._message(status, choice.text))
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "output": output,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    @staticmethod
    def _describe(model: str, parameters: ResponseParameters, defaults: Mapping[str, float]) -> Json:
        """All that does not change while the response is made."""
        wanted = (parameters.text and parameters.text.format) or TextResponse()
        temperature, top_p = parameters.temperature, parameters.top_p
        return {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": parameters.instructions,
            "max_output_tokens": parameters.max_output_tokens,
            "max_tool_calls": None,
            "model": model,
            "output": [],
            "parallel_tool_calls": parameters.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": None,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": None,
            "service_tier": "default",
            "store": False,
            "background": False,
            "temperature": defaults["temperature"] if temperature is None else temperature,
            "text": {"format": msgspec.to_builtins(wanted)},
            "tool_choice": (
                "auto" if parameters.tool_choice is None else msgspec.to_builtins(parameters.tool_choice)
            ),
            "tools": [msgspec.to_builtins(tool) for tool in parameters.tools or ()],
            "top_logprobs": parameters.top_logprobs or 0,
            "top_p": defaults["top_p"] if top_p is None else top_p,
            "presence_penalty": parameters.presence_penalty or 0,
            "frequency_penalty": parameters.frequency_penalty or 0,
            "truncation": "disabled",
            "usage": None,
            "metadata": parameters.metadata or {},
        }


def _numbered(number: int, name: str, fields: Json) -> bytes:
    return event(msgspec.json.encode({"type": name, "sequence_number": number, **fields}), name)


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


def _text_part(text: str, logprobs: object) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _call_item(call: ToolCall) -> Json:
    return {
        "id": f"fc_{call.id.removeprefix('call_')}",
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _plain(content: str | tuple[Part, ...]) -> str | tuple[TextPart, ...]:
    return content if isinstance(content, str) else tuple(TextPart(part.text) for part in content)
