"""Texts that take long to tokenise hold nobody up."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from petals_chat.engine.tokenizer import IN_LOOP_SIZE, Tokenizer
from petals_chat.errors import InvalidParameterError
from petals_chat.protocol.messages import ChatMessage, ChatPrompt
from tests.tiny_tokenizers import save_tokenizer

LONG_TEXT = "The quick brown fox jumps over the lazy dog. " * 5000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer("byte_level", directory)
    return Tokenizer(str(directory), None, {})


@pytest.fixture
def held(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The tokenizer tells which text it begins, and goes on when the event is set."""
    encode, go_on = tokenizer.encode, threading.Event()

    def waiting_encode(inputs: str | ChatPrompt | tuple[int, ...], *, at_start: bool) -> list[int]:
        assert go_on.wait(60)
        return encode(inputs, at_start=at_start)

    monkeypatch.setattr(tokenizer, "encode", waiting_encode)
    return go_on


class Text(str):
    """One that can be referred to weakly."""


def chat_of(text: str) -> ChatPrompt:
    return ChatPrompt((ChatMessage("user", text),))


async def test_the_loop_goes_on_while_a_long_text_is_tokenised(tokenizer: Tokenizer) -> None:
    for inputs in (LONG_TEXT, chat_of(LONG_TEXT)):
        encoding = asyncio.create_task(tokenizer.encode_aside(inputs, at_start=True))
        turns = 0
        while not encoding.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 10
        assert await encoding == tokenizer.encode(inputs, at_start=True)


async def test_many_messages_and_functions_are_long_too(tokenizer: Tokenizer, held: threading.Event) -> None:
    """If it were done in the loop, nobody could let it go on."""
    message = ChatMessage("user", "Hi")
    prompts = (
        ChatPrompt((message,) * IN_LOOP_SIZE),
        ChatPrompt((message,), tools=({"type": "function", "function": {"name": "look"}},)),
        (1,) * (IN_LOOP_SIZE + 1),
    )
    for prompt in prompts:
        held.clear()
        encoding = asyncio.create_task(tokenizer.encode_aside(prompt, at_start=True))
        await asyncio.sleep(0)
        held.set()
        assert await encoding == tokenizer.encode(prompt, at_start=True)


async def test_short_texts_pass_long_ones(tokenizer: Tokenizer) -> None:
    encoding = asyncio.create_task(tokenizer.encode_aside(LONG_TEXT, at_start=True))
    await asyncio.sleep(0)
    await tokenizer.encode_aside("Hello", at_start=True)
    assert not encoding.done()
    await encoding


@pytest.fixture
def begun(tokenizer: Tokenizer, held: threading.Event, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first letters of the texts that were begun."""
    encode, begun = tokenizer.encode, list[str]()

    def noted_encode(inputs: str, *, at_start: bool) -> list[int]:
        begun.append(inputs[0])
        return encode(inputs, at_start=at_start)

    monkeypatch.setattr(tokenizer, "encode", noted_encode)
    return begun


async def test_what_is_cancelled_before_its_turn_is_not_begun(
    tokenizer: Tokenizer, held: threading.Event, begun: list[str]
) -> None:
    tasks = [
        asyncio.create_task(tokenizer.encode_aside(letter + LONG_TEXT, at_start=True)) for letter in "abc"
    ]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.wait(tasks[1:2])
    held.set()
    await asyncio.gather(tasks[0], tasks[2])
    assert begun == ["a", "c"]


async def test_clients_with_long_texts_take_turns(
    tokenizer: Tokenizer, held: threading.Event, begun: list[str]
) -> None:
    tasks = [
        asyncio.create_task(tokenizer.encode_aside(letter + LONG_TEXT, at_start=True, owner=owner))
        for letter, owner in zip("abcd", ("x", "x", "x", "y"), strict=True)
    ]
    await asyncio.sleep(0)
    held.set()
    await asyncio.gather(*tasks)
    assert begun == ["a", "b", "d", "c"]


async def test_what_is_cancelled_before_its_turn_is_not_kept(
    tokenizer: Tokenizer, held: threading.Event
) -> None:
    running = asyncio.create_task(tokenizer.encode_aside(LONG_TEXT, at_start=True))
    text = Text(LONG_TEXT)
    waiting = asyncio.create_task(tokenizer.encode_aside(text, at_start=True))
    await asyncio.sleep(0)
    kept = weakref.ref(text)
    waiting.cancel()
    await asyncio.wait((waiting,))
    del text, waiting
    gc.collect()
    is_kept = kept() is not None
    held.set()
    await running
    assert not is_kept


async def test_long_and_short_give_the_same(tokenizer: Tokenizer) -> None:
    for text in ("Hello, many machines", LONG_TEXT):
        spelled = await tokenizer.spell_aside(text, at_start=True)
        assert spelled == tokenizer.spelled(tokenizer.encode(text, at_start=True))
        assert await tokenizer.decode_aside(spelled.tokens) == text
        with pytest.raises(InvalidParameterError, match="token ids go from 0"):
            await tokenizer.decode_aside((*spelled.tokens, 10**6))
