"""The parameters of the v1 and v2 APIs: what they mean, what they may be, and what is made of them.

Values come as strings (forms, query strings) or as JSON values; where they were found is not known here.
The models below are also what the API's documentation shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from petals_chat.errors import InvalidParameterError
from petals_chat.protocol.messages import ChatMessage, ChatPrompt, GenerationRequest, SamplingParameters
from petals_chat.settings import ChatSettings, LimitSettings

DEFAULT_SESSION_LENGTH = 1024
"""Tokens of a v1 session for which no ``max_length`` was given."""

MAX_MESSAGES = 4096
"""Messages of a chat that is answered."""

_LARGEST = 2**31 - 1
"""Far over any model's limits. Larger numbers mean the same, and would not fit into the engine's messages."""
_GREEDY_BELOW = 1e-6
"""A lower temperature cannot be told from greedy decoding, but makes logits overflow when divided by it."""
_MAX_SHOWN_CHARS = 60
_EMPTY_MEANS_EMPTY = frozenset({"inputs", "stop_sequence", "extra_stop_sequences"})
"""In all other parameters, an empty string is what an empty field of a form sends: nothing was given."""


_EXPECTED = {
    "model": "the name of a model",
    "inputs": "a text without lone surrogates",
    "max_new_tokens": "a whole number of at least 1",
    "max_length": "a whole number of at least 1",
    "queue_places": "true, false, 1 or 0",
    "do_sample": "true, false, 1 or 0",
    "temperature": "a number from 0 to 100",
    "top_k": "a whole number of at least 0",
    "top_p": "a number from 0 to 1",
    "repetition_penalty": "a number from 0.01 to 100",
    "seed": "a whole number from 0 to 2**63 - 1",
    "session_id": "the id of an open session",
    "stop_sequence": "a text without lone surrogates, or null",
    "extra_stop_sequences": "a text or a list of texts, without lone surrogates, or null",
    "messages": f'a list of 1 to {MAX_MESSAGES} messages like {{"role": "user", "content": "Hello"}}',
    "record": '{"chat": ..., "message": ..., "parent": ...}, each a UUID in lower case',
    "generation": "the id of an answer",
    "position": "a whole number of at least 0",
}


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("pydantic would read it as 0 or 1")
    return value


def _whole_number(value: object) -> object:
    # JavaScript writes 64 and 64.0 as it likes; pydantic takes such a float only up to 2**63.
    return int(value) if isinstance(value, float) and value.is_integer() else _refuse_bool(value)


def _refuse_lone_surrogates(value: str) -> str:
    # UTF-8 has none, so no model could be given such a text, nor a client get it back.
    value.encode()  # its UnicodeEncodeError is a ValueError, which pydantic reports
    return value


def _bounded(value: int) -> int:
    return min(value, _LARGEST)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_refuse_lone_surrogates)]
Number = BeforeValidator(_refuse_bool)
WholeNumber = BeforeValidator(_whole_number)
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")]
TokenCount = Annotated[int, Field(ge=1), AfterValidator(_bounded), WholeNumber]


class _Parameters(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    model: Annotated[str | None, Field(examples=["petals-team/StableBeluga2"])] = None
    """Name of the model; without it, the server's default model."""


class SessionParameters(_Parameters):
    """What a session is opened with."""

    max_length: Annotated[TokenCount, Field(examples=[1024])]
    """Tokens of context that the session can hold: prompts and answers together."""
    queue_places: bool = False
    """Send a frame with ``queue_place`` whenever the place in the queue for the swarm's memory changes."""


class _Amount(_Parameters):
    inputs: Annotated[Text | None, Field(examples=["A cat sat on"])] = None
    """New text. Without it, the session goes on from where it is."""
    max_new_tokens: Annotated[TokenCount | None, Field(examples=[16])] = None
    """Tokens to generate. More than the context has room for is cut down to that."""
    max_length: TokenCount | None = None
    """Tokens of the whole context, with what was there before; not used if max_new_tokens is given."""


class _Sampling(_Parameters):
    do_sample: bool = False
    """false or 0: always take the likeliest token. true or 1: draw it at random."""
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), Number] = 1.0
    """When sampling: below 1 is more predictable, above 1 more surprising; 0 is like do_sample=false."""
    top_k: Annotated[int, Field(ge=0), AfterValidator(_bounded), WholeNumber] = 0
    """When sampling: draw from this many of the likeliest tokens; null or 0 = from all."""
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), Number] = 1.0
    """When sampling: draw from the likeliest tokens that together have this probability."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False), Number] = 1.0
    """Over 1 makes tokens less likely that the session, with its prompts, already has; 1 = off."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), WholeNumber] | None = None
    """When sampling: the same seed gives the same text."""

    @property
    def sampling(self) -> SamplingParameters:
        """How to choose tokens. What means greedy decoding becomes exactly that."""
        if not self.do_sample or self.temperature < _GREEDY_BELOW:
            return SamplingParameters(repetition_penalty=self.repetition_penalty)
        return SamplingParameters(
            do_sample=True,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


class GenerationParameters(_Sampling, _Amount):
    """What to generate, and how. One of ``max_new_tokens`` and ``max_length`` is needed."""

    @property
    def context_limit(self) -> int | None:
        """``max_length``, if it counts: ``max_new_tokens`` wins if both are given."""
        return self.max_length if self.max_new_tokens is None else None

    def single_chunk_request(self) -> GenerationRequest:
        """The request for all of the text at once."""
        return GenerationRequest(
            inputs=self.inputs,
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            max_length=self.context_limit,
        )

    def streaming_request(self, stop_sequences: tuple[str, ...]) -> GenerationRequest:
        """The request for a chunk per ``max_new_tokens`` tokens, until a stop sequence comes."""
        return GenerationRequest(
            inputs=self.inputs,
            sampling=self.sampling,
            max_length=self.context_limit,
            chunk_tokens=self.max_new_tokens,
            stop_sequences=stop_sequences,
        )


class GenerationParametersV1(GenerationParameters):
    """The body of ``POST /api/v1/generate``. One of ``max_new_tokens`` and ``max_length`` is needed."""

    session_id: str | None = None
    """An open session to go on with; without it, the request has a session of its own."""


class SessionParametersV1(_Parameters):
    """What a v1 session is opened with."""

    max_length: Annotated[TokenCount | None, Field(examples=[1024])] = None
    """Tokens of context that the session can hold: prompts and answers together. Without it, 1024 or what the
    model allows, whichever is less."""


class SessionReference(BaseModel):
    """Which v1 session is meant."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    session_id: str
    """The id that open_inference_session returned."""


class GenerationParametersV2(GenerationParameters):
    """A ``generate`` request of the v2 API."""

    stop_sequence: Text | None = None
    """Text that ends the generation, which is then sent piece by piece; None = one reply, with everything."""
    extra_stop_sequences: Annotated[tuple[Text, ...], BeforeValidator(_listed)] = ()
    """More texts that end the generation; they count only together with ``stop_sequence``."""

    def request(self, limits: LimitSettings) -> GenerationRequest:
        """The request, which has stop sequences exactly if its text is to be sent piece by piece.

        Raises:
            InvalidParameterError: the stop sequences are too many, too long, or empty.
        """
        if self.stop_sequence is None:
            return self.single_chunk_request()
        _check_stop_sequence("stop_sequence", self.stop_sequence, limits)
        for sequence in self.extra_stop_sequences:
            _check_stop_sequence("extra_stop_sequences", sequence, limits)
        sequences = tuple(dict.fromkeys((self.stop_sequence, *self.extra_stop_sequences)))
        if len(sequences) > limits.max_stop_sequences:
            raise InvalidParameterError(
                "extra_stop_sequences",
                f"there may be {limits.max_stop_sequences} stop sequences in all, not {len(sequences)}",
            )
        return self.streaming_request(sequences)


class AnswerMessage(BaseModel):
    """One message of the chat that is answered."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: Literal["system", "user", "assistant"]
    content: Text


class AnswerRecord(BaseModel):
    """Where the answer is written down."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    chat: Id
    message: Id
    parent: Id


class AnswerParameters(_Sampling):
    """An ``answer`` request of the v2 API."""

    messages: Annotated[tuple[AnswerMessage, ...], Field(min_length=1, max_length=MAX_MESSAGES)]
    """The chat so far. If its last message is the assistant's, the answer goes on from there."""
    max_new_tokens: TokenCount | None = None
    """Tokens to generate at most; None = as many as the context has room for."""
    record: AnswerRecord | None = None
    """None = the answer is not written down."""

    def request(self, chat: ChatSettings) -> GenerationRequest:
        """The request to the engine, for a model with these settings."""
        messages = tuple(ChatMessage(message.role, message.content) for message in self.messages)
        return GenerationRequest(
            inputs=ChatPrompt(messages, continue_final_message=messages[-1].role == "assistant"),
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            chunk_tokens=1,
            stop_sequences=tuple(dict.fromkeys((chat.stop_token, *chat.extra_stop_sequences))),
            hide_end_of_sequence=True,
        )


class AttachParameters(BaseModel):
    """An ``attach`` request of the v2 API."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    generation: str
    """The answer's id."""
    position: Annotated[int, Field(ge=0), AfterValidator(_bounded), WholeNumber] = 0
    """Tokens of it that the client has."""


class StopParameters(BaseModel):
    """A ``stop`` request of the v2 API."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    generation: str
    """The answer's id."""


ParametersT = TypeVar("ParametersT", bound=BaseModel)
GenerationT = TypeVar("GenerationT", bound=GenerationParameters)


def parse(kind: type[ParametersT], values: Mapping[str, Any]) -> ParametersT:
    """The parameters among ``values``; other keys are ignored, and None counts as not given.

    Raises:
        InvalidParameterError: with the parameter's name, its value, and what it may be.
    """
    given = {}
    for name, value in values.items():
        if isinstance(value, str) and name not in _EMPTY_MEANS_EMPTY:
            value = value.strip() or None
        if value is not None:
            given[name] = value
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _explain(error) from None


def parse_generation(kind: type[GenerationT], values: Mapping[str, Any]) -> GenerationT:
    """`parse` for a request to generate, which must say for how long.

    Raises:
        InvalidParameterError: as `parse`; also if there is neither max_new_tokens nor max_length.
    """
    parameters = parse(kind, values)
    if parameters.max_new_tokens is None and parameters.max_length is None:
        raise InvalidParameterError("max_new_tokens", "it is missing; give max_new_tokens or max_length")
    return parameters


def _explain(error: ValidationError) -> InvalidParameterError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    expected = f"it must be {_EXPECTED[name]}"
    if first["type"] == "missing":
        return InvalidParameterError(name, f"it is missing; {expected}")
    return InvalidParameterError(name, f"{expected}, but {_shown(first['input'])} was given")


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, default=str)
    except ValueError:  # an integer with more digits than Python is willing to print
        return "a huge number"
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."


def _check_stop_sequence(parameter: str, sequence: str, limits: LimitSettings) -> None:
    if not sequence:
        raise InvalidParameterError(
            parameter,
            "an empty text would stop everything at once; give a text, or null for no stop sequence",
        )
    if len(sequence) > limits.max_stop_sequence_chars:
        raise InvalidParameterError(
            parameter,
            f"it may have {limits.max_stop_sequence_chars} characters, not {len(sequence)}",
        )
