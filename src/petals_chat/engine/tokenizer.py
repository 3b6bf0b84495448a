"""The model's tokenizer, reduced to what sessions need."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from transformers import AutoTokenizer
from transformers.utils import cached_file

from petals_chat.engine.chat_prompts import ChatEncoder
from petals_chat.engine.grammars import GrammarCompiler, TokenGrammar
from petals_chat.engine.token_bytes import TokenBytes
from petals_chat.engine.turns import Turns
from petals_chat.errors import ConfigurationError, InvalidParameterError
from petals_chat.generation.sampling import Logprobs
from petals_chat.protocol.messages import (
    ChatPrompt,
    EncodedText,
    TokenizerDescription,
    TokenLogprobs,
    TokenProbability,
    ToolStyle,
)

Result = TypeVar("Result")

IN_LOOP_SIZE = 4096
"""So many characters or tokens take 2 to 4 ms, about a step of the other sessions; what is longer has a thread. A
megabyte takes up to 2 s."""
MESSAGE_SIZE = 32
"""What a message of a chat adds to its text: the template's part is rendered and tokenised for each."""


class Tokenizer:
    """Text to token ids and back.

    The coroutines let the event loop go on meanwhile: long texts are done in a thread, one after the other, clients in
    turn. One that is cancelled before its turn is not begun.

    Args:
        chat_template: Jinja, in place of the tokenizer's own.
        chat_separator: stands between the turns of a chat if there is no template at all.

    Raises:
        ConfigurationError: the repository has no tokenizer that can be loaded, or the template cannot be used.
    """

    def __init__(
        self,
        repository: str,
        revision: str | None,
        config: dict[str, object],
        *,
        chat_template: str | None = None,
        chat_separator: str = "\n",
    ) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{repository}: its tokenizer cannot be loaded: {error}") from error
        self.end_of_sequence_ids = _end_of_sequence_ids(repository, revision, config)
        """Tokens that end a text; a model may have several."""
        self._chat = ChatEncoder(self._tokenizer, chat_template, chat_separator)
        self._grammars = GrammarCompiler(self._tokenizer, self.end_of_sequence_ids)
        self._token_bytes = TokenBytes(self._tokenizer)
        # Beside the loop: transformers sets options of the tokenizer with the first call only, which has been by now.
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._turns = Turns(1)

    async def encode_aside(
        self, inputs: str | ChatPrompt | tuple[int, ...], *, at_start: bool, owner: str = ""
    ) -> list[int]:
        """As `encode`."""
        return await self._aside(_size(inputs), lambda: self.encode(inputs, at_start=at_start), owner)

    async def spell_aside(self, inputs: str | ChatPrompt, *, at_start: bool) -> EncodedText:
        """The tokens that `encode` gives, with their texts."""
        return await self._aside(_size(inputs), lambda: self.spelled(self.encode(inputs, at_start=at_start)))

    async def decode_aside(self, tokens: tuple[int, ...]) -> str:
        """As `decode`, of tokens that may be wrong.

        Raises:
            InvalidParameterError: there is no such token id.
        """
        return await self._aside(len(tokens), lambda: self.decode(self.encode(tokens, at_start=False)))

    async def _aside(self, size: int, work: Callable[[], Result], owner: str = "") -> Result:
        if size <= IN_LOOP_SIZE:
            return work()
        async with self._turns.turn(owner):
            to_do = [work]
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: to_do.pop()())
            finally:
                to_do.clear()  # one that is cancelled while the thread still does another is not begun

    def encode(self, inputs: str | ChatPrompt | tuple[int, ...], *, at_start: bool) -> list[int]:
        """Token ids of ``inputs``; a text begins with its special tokens (BOS) only ``at_start`` of a session.

        Raises:
            InvalidParameterError: the model's chat template refuses the chat, or there is no such token id.
        """
        if isinstance(inputs, ChatPrompt):
            return self._chat.encode(inputs)
        if isinstance(inputs, tuple):
            self._check_ids(inputs)
            return list(inputs)
        ids: list[int] = self._tokenizer(inputs, add_special_tokens=at_start)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special tokens included."""
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def spelled(self, tokens: Sequence[int]) -> EncodedText:
        """The tokens with their texts."""
        return EncodedText(tuple(tokens), tuple(map(self._token_bytes.of, tokens)))

    def compile(self, grammar: str, vocab_size: int) -> TokenGrammar:
        """See `GrammarCompiler.compile`."""
        return self._grammars.compile(grammar, vocab_size)

    @property
    def tool_style(self) -> ToolStyle | None:
        """How the model writes calls of functions; None if its chats have none."""
        return self._chat.tool_style

    @property
    def description(self) -> TokenizerDescription:
        """What the tokenizer is."""
        tokenizer = self._tokenizer
        return TokenizerDescription(
            kind=type(tokenizer).__name__,
            vocab_size=len(tokenizer),
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            unk_token=tokenizer.unk_token,
            chat_template=self._chat.template,
        )

    def describe(self, logprobs: Logprobs) -> TokenLogprobs:
        """The log probabilities with the tokens' texts."""
        return TokenLogprobs(
            TokenProbability(self._token_bytes.of(logprobs.token), logprobs.logprob),
            tuple(TokenProbability(self._token_bytes.of(token), logprob) for token, logprob in logprobs.top),
        )

    def _check_ids(self, ids: tuple[int, ...]) -> None:
        size = len(self._tokenizer)
        for token in ids:
            if not 0 <= token < size:
                raise InvalidParameterError("inputs", f"token ids go from 0 to {size - 1}, not to {token}")


def _size(inputs: str | ChatPrompt | tuple[int, ...]) -> int:
    """Characters, or tokens; of a chat with functions, which are not counted, more than the loop may do."""
    if not isinstance(inputs, ChatPrompt):
        return len(inputs)
    if inputs.tools:
        return IN_LOOP_SIZE + 1
    texts = [inputs.answer_prefix]
    for message in inputs.messages:
        texts += [message.content, *(call.arguments for call in message.tool_calls)]
    return sum(map(len, texts)) + MESSAGE_SIZE * len(inputs.messages)


def _end_of_sequence_ids(repository: str, revision: str | None, config: dict[str, object]) -> frozenset[int]:
    """As ``generate()`` takes them: from generation_config.json, else from config.json; one id or a list."""
    file = cached_file(
        repository,
        "generation_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    generation_config = json.loads(Path(file).read_text()) if file else {}
    ids = generation_config.get("eos_token_id", config.get("eos_token_id"))
    return frozenset([ids] if isinstance(ids, int) else ids or ())
