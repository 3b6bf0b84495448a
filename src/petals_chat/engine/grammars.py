"""Grammars that a text must match, compiled for a model's tokenizer by llguidance."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from petals_chat.errors import InvalidParameterError

MAX_ERROR_CHARS = 300


class GrammarCompiler:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: of transformers.
        end_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = sorted(end_ids)

    def compile(self, grammar: str, vocab_size: int) -> TokenGrammar:
        """The grammar at the beginning of a text. The first one takes about a second, others some milliseconds.

        Args:
            grammar: in the Lark syntax of llguidance.
            vocab_size: number of logits.

        Raises:
            InvalidParameterError: it is no grammar, or too large, or the tokenizer is of a kind that cannot be used.
        """
        matcher = LLMatcher(self._tokens(vocab_size), grammar, log_level=0)
        if matcher.is_error():
            raise _invalid(matcher.get_error())
        return TokenGrammar(matcher, vocab_size)

    @functools.cache  # noqa: B019 - lives as long as the process
    def _tokens(self, vocab_size: int) -> LLTokenizer:
        size = max(vocab_size, len(self._tokenizer))
        try:
            return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self._end_ids or None)
        except ValueError:
            raise _invalid("it cannot be used with this model's tokenizer") from None


class TokenGrammar:
    """Where a text is in its grammar: see `petals_chat.generation.sampling.TokenMask`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next, bool [vocab_size]; at the end of the text, only those that end it."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: self._vocab_size]
        return torch.from_numpy(bits).bool()

    def add(self, token: int) -> None:
        """Go on by a token that is allowed.

        Raises:
            InvalidParameterError: the grammar turned out to be too large.
        """
        if not self._matcher.consume_token(token):
            raise _invalid(self._matcher.get_error())


def _invalid(problem: str) -> InvalidParameterError:
    problem = problem.partition("\n")[0]
    return InvalidParameterError("grammar", problem[:MAX_ERROR_CHARS])
