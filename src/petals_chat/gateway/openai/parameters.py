"""What requests to the OpenAI-compatible API may say, and what the engine is to do for them. No I/O.

Names, types and limits are those of the public OpenAI specification; ``top_k`` and ``repetition_penalty`` are additions
that other servers of open models have too. Fields that change nothing here (``user``, ``metadata``, ``store`` ...) are
ignored. Fields that would change the answer in a way that this server cannot are refused, unless they ask for what is
done anyway.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta

from petals_chat.errors import InvalidParameterError
from petals_chat.gateway.openai.tools import Tools, json_grammar
from petals_chat.protocol.messages import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    SamplingParameters,
    ToolCall,
    ToolStyle,
)
from petals_chat.settings import ChatSettings, GenerationDefaults, LimitSettings

MAX_CHOICES = 128
"""Answers to one request: those to all its prompts together."""
MAX_MESSAGES = 4096

MAX_TOOLS = 128
MAX_DESCRIBED = 128
"""Tokens whose log probabilities are told in one place, those of all answers together: it bounds a reply's size."""

MAX_LOGIT_BIASES = 1024
CHUNK_TOKENS_WITH_LOGPROBS = 16
"""Keeps messages from the engine small where many tokens are described."""

_DEFAULT_COMPLETION_TOKENS = 16
_GREEDY_BELOW = 1e-5
"""Temperatures under this one mean greedy decoding: no draw could tell the difference."""

_Count = Annotated[int, Meta(ge=1, le=2**53)]
_Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
_Logprobs = Annotated[int, Meta(ge=0, le=20)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """A part of a message; only parts of text are taken."""

    text: str


class CalledFunction(msgspec.Struct, frozen=True):
    """A function, and what it was called with."""

    name: str
    arguments: str


class MessageToolCall(msgspec.Struct, frozen=True):
    """A call of a function in an earlier message of the assistant."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True):
    """A message of the chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    tool_calls: Annotated[tuple[MessageToolCall, ...], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())

    def check(self, place: str) -> None:
        """Raise `InvalidParameterError` if its fields do not fit together."""
        if self.tool_calls and self.role != "assistant":
            raise InvalidParameterError(f"{place}.tool_calls", "only messages of the assistant have them")
        if self.role == "tool" and self.tool_call_id is None:
            raise InvalidParameterError(f"{place}.tool_call_id", "a message of role tool needs it")
        if self.content is None and not self.tool_calls:
            raise InvalidParameterError(f"{place}.content", "it is missing")

    def as_chat_message(self) -> ChatMessage:
        """The message in the engine's words."""
        calls = tuple(
            ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ()
        )
        return ChatMessage(_ROLES[self.role], self.text, calls, self.tool_call_id)


class FunctionDefinition(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True):
    """A tool; functions are the only ones."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True):
    """The name of a function."""

    name: str


class ToolChoice(msgspec.Struct, frozen=True):
    """Which function has to be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchemaFormat(msgspec.Struct, frozen=True):
    """The JSON schema of an answer."""

    name: str
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class TextResponse(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectResponse(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """Some JSON object."""


class JsonSchemaResponse(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON that a schema allows."""

    json_schema: JsonSchemaFormat


ResponseFormat = TextResponse | JsonObjectResponse | JsonSchemaResponse


TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream has beyond the text."""

    include_usage: bool | None = None


class CommonParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both kinds of completions have."""

    model: str
    """Name of the model; "default" is the server's default model."""
    n: _Choices | None = None
    """Answers to each prompt."""
    stop: str | tuple[str, ...] | None = None
    """Texts that end the answer, and are not part of it."""
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """The same seed gives the same answer."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """Below 1 is more predictable, above 1 more surprising; 0 always takes the likeliest token."""
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Draw from the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    """Draw from this many of the likeliest tokens; 0 = from all. Not a field of OpenAI."""
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    """Over 1 makes tokens less likely that prompt or answer already have; 1 = off. Not a field of OpenAI."""
    frequency_penalty: _Penalty | None = None
    """Over 0 makes a token less likely each time that the answer has it."""
    presence_penalty: _Penalty | None = None
    """Over 0 makes tokens less likely that the answer has."""
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIASES)]
        | None
    ) = None
    """Added to the logits of these token ids: -100 forbids a token, 100 demands it."""
    max_tokens: _Count | None = None
    """Tokens of an answer at most."""
    stream: bool | None = None
    """Send the answer piece by piece, as server-sent events."""
    stream_options: StreamOptions | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether the stream is to end with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _stop_sequences(self, limits: LimitSettings) -> tuple[str, ...]:
        sequences = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if len(sequences) > limits.max_stop_sequences:
            raise InvalidParameterError(
                "stop", f"there may be {limits.max_stop_sequences} stop sequences, not {len(sequences)}"
            )
        for sequence in sequences:
            if not sequence:
                raise InvalidParameterError("stop", "an empty text would stop everything at once")
            if len(sequence) > limits.max_stop_sequence_chars:
                raise InvalidParameterError(
                    "stop",
                    f"a stop sequence may have {limits.max_stop_sequence_chars} characters, not {len(sequence)}",
                )
        return tuple(dict.fromkeys(sequences))

    def _sampling(self, defaults: GenerationDefaults, top_logprobs: int | None) -> SamplingParameters:
        likeliest = SamplingParameters(
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            top_logprobs=top_logprobs,
        )
        temperature = _first(self.temperature, defaults.temperature if defaults.do_sample else 0.0)
        if temperature < _GREEDY_BELOW:
            return likeliest
        return msgspec.structs.replace(
            likeliest,
            do_sample=True,
            temperature=temperature,
            top_k=_first(self.top_k, defaults.top_k),
            top_p=_first(self.top_p, defaults.top_p),
            seed=self.seed,
        )

    def _check_described(self, field: str, choices: int, top_logprobs: int | None) -> None:
        if top_logprobs is not None and choices * (top_logprobs + 1) > MAX_DESCRIBED:
            raise InvalidParameterError(
                field,
                f"{choices} answers with {top_logprobs} top log probabilities are too many: answers, times one more "
                f"than these, may be {MAX_DESCRIBED}",
            )

    def _chunk_tokens(self, top_logprobs: int | None) -> int | None:
        if self.stream:
            return 1
        return None if top_logprobs is None else CHUNK_TOKENS_WITH_LOGPROBS


class ChatParameters(CommonParameters, frozen=True, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[tuple[Message, ...], Meta(min_length=1, max_length=MAX_MESSAGES)]
    """The chat so far."""
    max_completion_tokens: _Count | None = None
    """The newer name of ``max_tokens``; it counts if both are given."""
    logprobs: bool | None = None
    """Tell the log probabilities of the answer's tokens."""
    top_logprobs: _Logprobs | None = None
    """Tell also those of so many of the likeliest tokens in each place; needs ``logprobs``."""
    response_format: ResponseFormat | None = None
    """What the answer has to be: any text, or JSON."""
    tools: Annotated[tuple[FunctionTool, ...], Meta(max_length=MAX_TOOLS)] | None = None
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    """Whether it has to call one, and which."""
    parallel_tool_calls: bool | None = None
    """False: only the first call of an answer counts."""

    def plan(self, chat: ChatSettings, limits: LimitSettings, tool_style: ToolStyle | None) -> Plan:
        """What to generate; what the request does not say is as the model's settings have it.

        Args:
            tool_style: how the model calls functions; None if it cannot.

        Raises:
            InvalidParameterError: the stop sequences are too many, too long, or empty; or other fields do not fit
                together, or the model cannot call functions.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParameterError("top_logprobs", "it needs logprobs to be true")
        top_logprobs = self.top_logprobs or 0 if self.logprobs else None
        self._check_messages(tool_style)
        tools = self._tools(tool_style)
        grammar = _grammar(self.response_format)
        if tools and tools.is_forced:
            if grammar is not None:
                raise InvalidParameterError(
                    "response_format", "an answer that has to be a call cannot have it"
                )
            grammar = tools.grammar
        # An answer in JSON ends by itself, and may have any text in it.
        own_ends = () if grammar is not None else (chat.stop_token, *chat.extra_stop_sequences)
        ends = (*self._stop_sequences(limits), *own_ends)
        template = GenerationRequest(
            inputs=ChatPrompt(
                tuple(message.as_chat_message() for message in self.messages),
                tools=tools.definitions if tools else (),
                answer_prefix=tools.answer_prefix if tools else "",
            ),
            sampling=msgspec.structs.replace(self._sampling(chat.generation, top_logprobs), grammar=grammar),
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            chunk_tokens=self._chunk_tokens(top_logprobs),
            stop_sequences=tuple(dict.fromkeys(ends)),
            hide_end_of_sequence=True,
        )
        _limit_choices("n", 1, self.n or 1)
        self._check_described("n", self.n or 1, top_logprobs)
        return Plan.of([template], self.n or 1, tools=tools)

    def _check_messages(self, tool_style: ToolStyle | None) -> None:
        for index, message in enumerate(self.messages):
            message.check(f"messages[{index}]")
            if tool_style is None and (message.tool_calls or message.role == "tool"):
                raise InvalidParameterError("messages", f"they have calls of functions, but {_NO_TOOLS}")

    def _tools(self, tool_style: ToolStyle | None) -> Tools | None:
        choice = self.tool_choice
        if not self.tools:
            if choice not in (None, "none", "auto"):
                raise InvalidParameterError("tool_choice", "it needs tools")
            return None
        if choice == "none":
            return None
        if tool_style is None:
            raise InvalidParameterError("tools", _NO_TOOLS)
        tools = self.tools
        if isinstance(choice, ToolChoice):
            tools = tuple(tool for tool in tools if tool.function.name == choice.function.name)
            if not tools:
                raise InvalidParameterError("tool_choice", f"there is no function {choice.function.name!r}")
        return Tools(
            tool_style,
            definitions_of(tools),
            is_forced=choice not in (None, "auto"),
            only_one=self.parallel_tool_calls is False,
        )


class CompletionParameters(CommonParameters, frozen=True, kw_only=True):
    """The body of ``POST /v1/completions``."""

    prompt: str | tuple[str | TokenId | tuple[TokenId, ...], ...]
    """The text that is continued, as a text or as token ids; or several such texts."""
    max_tokens: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    """Tokens of an answer at most; 0 for nothing but the prompt, with ``echo``."""
    logprobs: _Logprobs | None = None
    """Tell the log probabilities of the answer's tokens, and of so many of the likeliest tokens in each place."""
    echo: bool | None = None
    """Put the prompt in front of the answer."""

    def plan(self, limits: LimitSettings) -> Plan:
        """What to generate; what the request does not say is as OpenAI has it.

        Raises:
            InvalidParameterError: the prompts or stop sequences are too many, too long, or empty; or other fields do
                not fit together.
        """
        prompts = self._prompts()
        choices = self.n or 1
        _limit_choices("prompt", len(prompts), choices)
        self._check_described("prompt", len(prompts) * choices, self.logprobs)
        template = GenerationRequest(
            inputs=None,
            sampling=self._sampling(_OPENAI_DEFAULTS, self.logprobs),
            max_new_tokens=_first(self.max_tokens, _DEFAULT_COMPLETION_TOKENS),
            chunk_tokens=self._chunk_tokens(self.logprobs),
            stop_sequences=self._stop_sequences(limits),
            hide_end_of_sequence=True,
            prompt_logprobs=self.logprobs if self.echo else None,
        )
        requests = [msgspec.structs.replace(template, inputs=prompt) for prompt in prompts]
        return Plan.of(requests, choices, echo=bool(self.echo))

    def _prompts(self) -> Sequence[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            prompts: Sequence[str | tuple[int, ...]] = [self.prompt]
        elif all(isinstance(part, int) for part in self.prompt):
            prompts = [cast(tuple[int, ...], self.prompt)]
        elif all(isinstance(part, str) for part in self.prompt) or all(
            isinstance(part, tuple) for part in self.prompt
        ):
            prompts = cast(Sequence[str | tuple[int, ...]], self.prompt)
        else:
            raise InvalidParameterError(
                "prompt", "a list must have only texts, only token ids, or only lists of them"
            )
        if () in prompts:
            raise InvalidParameterError("prompt", "a list must have at least one text or token id")
        return prompts


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to generate for a request."""

    requests: tuple[GenerationRequest, ...]
    """One for each choice, the choices of one prompt side by side."""
    choices_per_prompt: int
    echo: bool = False
    """The prompt's text is part of the answer."""
    tools: Tools | None = None
    """Functions that the model may call."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[GenerationRequest],
        choices_per_prompt: int,
        *,
        echo: bool = False,
        tools: Tools | None = None,
    ) -> Plan:
        """That each of these is done so often, with other randomness each time."""
        requests = tuple(
            _with_other_seed(prompt, number) for prompt in prompts for number in range(choices_per_prompt)
        )
        return cls(requests, choices_per_prompt, echo, tools)


ParametersT = TypeVar("ParametersT", bound=msgspec.Struct)

_ROLES: Mapping[str, Literal["system", "user", "assistant", "tool"]] = {
    "system": "system",
    "developer": "system",  # its newer name
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_NO_TOOLS = "this model cannot call functions: its chat template does not provide for them"
_OPENAI_DEFAULTS = GenerationDefaults(temperature=1.0, top_p=1.0)


def parse(
    kind: type[ParametersT],
    body: bytes,
    unsupported: Mapping[str, Callable[[Any], bool]] | None = None,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda values: values,
) -> ParametersT:
    """The parameters in a JSON body.

    Args:
        unsupported: fields that would change the answer, and tests of values with which they do not; None = those of
            completions.
        complete: fills in what may be left out.

    Raises:
        InvalidParameterError: with the parameter's name, and what is wrong with it.
    """
    try:
        values = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise InvalidParameterError("body", "it is not valid UTF-8") from None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidParameterError("body", f"it is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidParameterError("body", "it must be a JSON object")
    _refuse_unsupported(values, _UNSUPPORTED if unsupported is None else unsupported)
    try:
        return msgspec.convert(complete(values), kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explain(error) from None


def definitions_of(tools: Iterable[FunctionTool]) -> tuple[dict[str, Any], ...]:
    """The tools in the form that chat templates take.

    Raises:
        InvalidParameterError: one has a whole number that cannot be sent to a worker.
    """
    definitions = tuple(msgspec.to_builtins(tool) for tool in tools)
    try:
        msgspec.msgpack.encode(definitions)
    except OverflowError:
        raise InvalidParameterError("tools", "their whole numbers must be from -2**63 to 2**64 - 1") from None
    return definitions


def _refuse_unsupported(values: Mapping[str, Any], unsupported: Mapping[str, Callable[[Any], bool]]) -> None:
    for name, asks_for_nothing in unsupported.items():
        value = values.get(name)
        if value is not None and not asks_for_nothing(value):
            raise InvalidParameterError(name, "this server does not support it; leave it out")


def _is_empty(value: object) -> bool:
    return not value


def _never(value: object) -> bool:
    return False


_UNSUPPORTED: Mapping[str, Callable[[Any], bool]] = {
    "audio": _never,
    "best_of": lambda value: value == 1,
    "function_call": lambda value: value == "none",
    "functions": _is_empty,
    "modalities": lambda value: value == ["text"],
    "moderation": _never,
    "suffix": _is_empty,
    "web_search_options": _never,
}
"""The fields that would change the answer, and the values with which they do not."""


def _explain(error: msgspec.ValidationError) -> InvalidParameterError:
    """In the words of msgspec, which end with the place: "Expected `int`, got `str` - at `$.max_tokens`"."""
    explained = _EXPLANATION.fullmatch(str(error))
    problem, place = explained.groups("") if explained else (str(error), "")
    if missing := _MISSING.fullmatch(problem):
        place, problem = f"{place}.{missing[1]}", "it is missing"
    name = place.removeprefix(".")
    problem = problem.replace("`", "").replace("Expected", "it must be", 1).replace("array", "list")
    return InvalidParameterError(name or "body", problem[:1].lower() + problem[1:])


_EXPLANATION = re.compile(r"(.*?)(?: - at (?:`key` in )?`\$(.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`")


def _limit_choices(field: str, prompts: int, choices_per_prompt: int) -> None:
    if prompts * choices_per_prompt > MAX_CHOICES:
        raise InvalidParameterError(
            field, f"one request may have {MAX_CHOICES} answers, not {prompts} times {choices_per_prompt}"
        )


def _grammar(response_format: ResponseFormat | None) -> str | None:
    if isinstance(response_format, JsonObjectResponse):
        return json_grammar({"type": "object"})
    if isinstance(response_format, JsonSchemaResponse):
        return json_grammar(_first(response_format.json_schema.schema, {"type": "object"}))
    return None


def _with_other_seed(request: GenerationRequest, number: int) -> GenerationRequest:
    seed = request.sampling.seed
    if seed is None:
        return request
    # Not negative, since Python's generator takes no notice of the sign.
    sampling = msgspec.structs.replace(request.sampling, seed=(seed + number) % 2**63)
    return msgspec.structs.replace(request, sampling=sampling)


_Value = TypeVar("_Value")


def _first(given: _Value | None, default: _Value) -> _Value:
    return default if given is None else given
