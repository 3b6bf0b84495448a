"""What a model's tokenizer knows, in the replies that evaluation harnesses read (they are those of vLLM)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request

from petals_chat.engine.interface import Engine
from petals_chat.errors import InvalidParameterError
from petals_chat.gateway.openai.parameters import (
    MAX_MESSAGES,
    MAX_TOOLS,
    FunctionTool,
    Message,
    TokenId,
    definitions_of,
    parse,
)
from petals_chat.protocol.messages import ChatPrompt
from petals_chat.settings import ModelSettings

MAX_TOKENS = 2**20
"""Token ids in one request."""


class TokenizeParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The body of ``POST /tokenize``."""

    model: str | None = None
    """Name of the model; without it, the server's default model."""
    prompt: str | None = None
    """A text; either this or ``messages``."""
    messages: Annotated[tuple[Message, ...], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    """A chat, which becomes the prompt for the assistant's next message."""
    tools: Annotated[tuple[FunctionTool, ...], Meta(max_length=MAX_TOOLS)] | None = None
    """Functions that the assistant of the chat may call."""
    add_special_tokens: bool | None = None
    """Begin a text with its special tokens; true if not given. Chats have what their template writes."""
    return_token_strs: bool | None = None
    """Tell each token's text, too."""

    def inputs(self) -> str | ChatPrompt:
        """What is to be turned into token ids.

        Raises:
            InvalidParameterError: there is no text and no chat, or both; or the chat's fields do not fit together.
        """
        if (self.prompt is None) == (self.messages is None):
            raise InvalidParameterError("prompt", "either it or messages is needed")
        if self.prompt is not None:
            return self.prompt
        messages = self.messages or ()
        for index, message in enumerate(messages):
            message.check(f"messages[{index}]")
        return ChatPrompt(
            tuple(message.as_chat_message() for message in messages),
            tools=definitions_of(self.tools or ()),
        )


class DetokenizeParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    """Name of the model; without it, the server's default model."""
    tokens: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_TOKENS)]
    """Token ids."""


class Tokenizers:
    """The replies.

    Args:
        find: the model of this name, if the request may use it.
        session_limit: how many tokens prompt and answer of a model may have.
    """

    def __init__(
        self,
        engine: Engine,
        find: Callable[[Request, str | None], ModelSettings],
        session_limit: Callable[[ModelSettings], int],
    ) -> None:
        self._engine = engine
        self._find = find
        self._session_limit = session_limit

    async def tokenize(self, request: Request, body: bytes) -> dict[str, Any]:
        """Text to token ids."""
        parameters = parse(TokenizeParameters, body, {})
        model = self._find(request, parameters.model)
        encoded = await self._engine.tokenizer(model.key).encode(
            parameters.inputs(), add_special_tokens=parameters.add_special_tokens is not False
        )
        texts = None
        if parameters.return_token_strs:
            texts = [text.decode(errors="replace") for text in encoded.texts]
        return {
            "count": len(encoded.tokens),
            "max_model_len": self._session_limit(model),
            "tokens": encoded.tokens,
            "token_strs": texts,
        }

    async def detokenize(self, request: Request, body: bytes) -> dict[str, Any]:
        """Token ids to text."""
        parameters = parse(DetokenizeParameters, body, {})
        model = self._find(request, parameters.model)
        return {"prompt": await self._engine.tokenizer(model.key).decode(parameters.tokens)}

    async def describe(self, request: Request, body: bytes) -> dict[str, Any]:
        """What the tokenizer is; the model's name stands in the query."""
        model = self._find(request, request.query_params.get("model"))
        description = await self._engine.tokenizer(model.key).describe()
        return {
            "tokenizer_class": description.kind,
            "vocab_size": description.vocab_size,
            "model_max_length": self._session_limit(model),
            "bos_token": description.bos_token,
            "eos_token": description.eos_token,
            "pad_token": description.pad_token,
            "unk_token": description.unk_token,
            "chat_template": description.chat_template,
        }
