"""A chat over the WebSocket API v2, for the terminal: the wording of the turns, the session, its errors.

It knows no terminal and prints nothing; `petals_chat.commands.chat` does. It is a client like any other: it
knows of the server what /api/models and the v2 API say. A session's context is the chat's text, so a session
that was lost, or ended to stop an answer, is replaced by telling a new one the whole chat.
"""

from __future__ import annotations

import dataclasses
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from http import HTTPStatus
from typing import Self
from urllib.parse import urlsplit

import msgspec
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

INTRODUCTION = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 2.0
_TEXT_CONTROLS = "\n\t"

GenerationParameters = Mapping[str, bool | int | float]


class ChatError(Exception):
    """Why there is no answer, or no more of it, as a sentence for people; ``code`` is the server's for it."""

    def __init__(self, sentence: str, code: str = "") -> None:
        super().__init__(sentence)
        self.code = code


class ChatFormat(msgspec.Struct, frozen=True):
    """How a model wants its chats worded; see `petals_chat.settings.ChatSettings`."""

    sep_token: str
    stop_token: str
    extra_stop_sequences: tuple[str, ...]
    generation: dict[str, bool | int | float]

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Everything that ends an answer."""
        return (self.stop_token, *self.extra_stop_sequences)

    @property
    def separator(self) -> str:
        """What stands between the turns."""
        return self.sep_token or "\n"


class ChatModel(msgspec.Struct, frozen=True):
    """An entry of /api/models."""

    key: str
    name: str
    family: str
    state: str
    default: bool
    max_session_length: int
    chat: ChatFormat


class _ModelList(msgspec.Struct, frozen=True):
    models: tuple[ChatModel, ...]


class _Reply(msgspec.Struct, frozen=True):
    ok: bool
    outputs: str | None = None
    stop: bool = False
    token_count: int = 0
    code: str = ""
    traceback: str = ""


@dataclasses.dataclass
class Exchange:
    """A question and its answer."""

    question: str
    answer: str = ""
    """As the model wrote it, stop text included."""
    finished: bool = False


def whole_chat(exchanges: Sequence[Exchange], chat_format: ChatFormat) -> str:
    """The text for a new session; what there is of the last answer is part of it."""
    turns = (
        _turn(each.question, chat_format) + _without_stop_text(each.answer, chat_format) for each in exchanges
    )
    return chat_format.separator.join([INTRODUCTION, *turns])


def next_question(previous_answer: str, question: str, chat_format: ChatFormat) -> str:
    """The text for a session whose context ends with ``previous_answer``."""
    separator = "" if previous_answer.endswith(chat_format.separator) else chat_format.separator
    return separator + _turn(question, chat_format)


def visible_text(answer: str, chat_format: ChatFormat, *, complete: bool) -> str:
    """What people see of an answer. While more may come, an end that could become stop text is held back."""
    text = _without_stop_text(answer, chat_format)
    if not complete:
        held = max(
            (
                length
                for stop_text in chat_format.stop_texts
                for length in range(1, len(stop_text))
                if text.endswith(stop_text[:length])
            ),
            default=0,
        )
        text = text[: len(text) - held]
    return printable(text).strip()


def printable(text: str) -> str:
    """The text without the control characters with which it could take over a terminal."""
    return "".join(
        character
        for character in text
        if character in _TEXT_CONTROLS or unicodedata.category(character) != "Cc"
    )


def _is_same_server(url: str, other: str) -> bool:
    old, new = urlsplit(url), urlsplit(other)
    return old.hostname == new.hostname and new.scheme in (old.scheme, "https")


class Server:
    """A Petals Chat server.

    Args:
        url: of its page, as in a browser; without a scheme, http.
        api_key: for servers that ask for one.

    Raises:
        ChatError: that is no such URL.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.url = (url if "://" in url else f"http://{url}").rstrip("/") + "/"
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ChatError(f"{url} is not the address of a page, like http://localhost:5000")

    def models(self) -> tuple[ChatModel, ...]:
        """Ask for the models. Where the page has moved to another address, so does ``url``.

        Raises:
            ChatError: no Petals Chat server answers.
        """
        path = "api/models"
        try:
            with urllib.request.urlopen(self.url + path, timeout=_CONNECT_SECONDS) as response:  # noqa: S310
                models = msgspec.json.decode(response.read(), type=_ModelList).models
                moved_to = response.url.removesuffix(path)
        except (urllib.error.HTTPError, msgspec.MsgspecError):
            raise ChatError(f"{self.url} answers, but is no Petals Chat server") from None
        except urllib.error.URLError as error:
            raise ChatError(f"{self.url} cannot be reached: {_reason(error.reason)}") from None
        except OSError as error:
            raise ChatError(f"{self.url} cannot be reached: {_reason(error)}") from None
        if self.headers and not _is_same_server(self.url, moved_to):
            raise ChatError(
                f"{self.url} leads to {moved_to}, which is another server: it would get the API key"
            )
        self.url = moved_to
        return models

    @property
    def websocket_url(self) -> str:
        """Where the v2 API is."""
        return f"ws{self.url.removeprefix('http')}api/v2/generate"


class Chat:
    """One chat with one model. A context manager, which ends the session.

    Args:
        overrides: generation parameters, instead of the model's own defaults.
        max_new_tokens: an answer is ended after so many tokens; None = when the model ends it.
    """

    def __init__(
        self,
        server: Server,
        model: ChatModel,
        overrides: GenerationParameters | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        self._server = server
        self._model = model
        self._generation = {**model.chat.generation, **(overrides or {})}
        self._max_new_tokens = max_new_tokens
        self._exchanges: list[Exchange] = []
        self._connection: ClientConnection | None = None
        self._connected = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._disconnect()

    def reset(self) -> None:
        """Forget everything that was said."""
        self._disconnect()
        self._exchanges.clear()

    def answer(self, question: str) -> Generator[str, None, None]:
        """The answer to the question, in pieces.

        To stop it, close the iterator, or interrupt it with an exception.

        Raises:
            ChatError: there is no more of it.
        """
        # A question that never got an answer would only confuse the model.
        self._exchanges = [each for each in self._exchanges if each.finished or each.answer]
        exchange = Exchange(question)
        self._exchanges.append(exchange)
        try:
            yield from self._answer(exchange)
        except InvalidStatus as error:
            if error.response.status_code != HTTPStatus.UNAUTHORIZED:
                raise ChatError(f"{self._server.url} refuses the connection: {_reason(error)}") from None
            asks = "does not know this API key" if self._server.headers else "asks for an API key: --api-key"
            raise ChatError(f"{self._server.url} {asks}") from None
        except (WebSocketException, msgspec.MsgspecError, OSError) as error:
            self._disconnect()
            raise ChatError(f"the connection to {self._server.url} was lost: {_reason(error)}") from None
        except BaseException:
            self._disconnect()
            raise

    def _answer(self, exchange: Exchange) -> Iterator[str]:
        if self._connection is not None and self._connection.state is State.OPEN:
            previous = self._exchanges[-2]
            inputs = next_question(previous.answer, exchange.question, self._model.chat)
            try:
                yield from self._generate(exchange, inputs)
                return
            except (ConnectionClosed, ChatError) as error:
                # The server closes sessions that are idle; a new one is told everything.
                idle = isinstance(error, ConnectionClosed) or error.code == "session_expired"
                if exchange.answer or not idle:
                    raise
        self._connect()
        yield from self._generate(exchange, whole_chat(self._exchanges, self._model.chat))

    def _generate(self, exchange: Exchange, inputs: str) -> Iterator[str]:
        chat_format = self._model.chat
        self._send(
            {
                "type": "generate",
                "inputs": inputs,
                "max_new_tokens": 1,  # one reply for each token
                "stop_sequence": chat_format.stop_token,
                "extra_stop_sequences": chat_format.extra_stop_sequences,
                **self._generation,
            }
        )
        shown, tokens = "", 0
        while not exchange.finished:
            reply = self._receive()
            exchange.answer += reply.outputs or ""
            exchange.finished = reply.stop
            tokens += reply.token_count
            enough = self._max_new_tokens is not None and tokens >= self._max_new_tokens
            text = visible_text(exchange.answer, chat_format, complete=reply.stop or enough)
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
            if enough and not reply.stop:
                self._disconnect()
                return

    def _connect(self) -> None:
        self._disconnect()
        connection = self._connected.enter_context(
            connect(
                self._server.websocket_url,
                compression=None,
                additional_headers=self._server.headers,
                open_timeout=_CONNECT_SECONDS,
                close_timeout=_CLOSE_SECONDS,
            )
        )
        self._connection = connection
        self._send(
            {
                "type": "open_inference_session",
                "model": self._model.key,
                "max_length": self._model.max_session_length,
            }
        )
        self._receive()

    def _disconnect(self) -> None:
        self._connection = None
        self._connected.close()

    def _send(self, request: dict[str, object]) -> None:
        assert self._connection is not None
        self._connection.send(msgspec.json.encode(request).decode())

    def _receive(self) -> _Reply:
        assert self._connection is not None
        reply = msgspec.json.decode(self._connection.recv(), type=_Reply)
        if not reply.ok:
            raise ChatError(_sentence(reply.traceback), reply.code)
        return reply


def _turn(question: str, chat_format: ChatFormat) -> str:
    return f"Human: {question}{chat_format.separator}Assistant:"


def _without_stop_text(text: str, chat_format: ChatFormat) -> str:
    for stop_text in chat_format.stop_texts:
        if text.endswith(stop_text):
            return text.removesuffix(stop_text)
    return text


def _sentence(traceback: str) -> str:
    """The sentence in the last line, which is ``ErrorName: sentence``."""
    last_line = traceback.rstrip().rpartition("\n")[2]
    return printable(last_line.partition(": ")[2] or last_line)


def _reason(error: object) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
