"""``petals-chat chat [URL]``: a chat in the terminal, or one answer for what is piped in.

It reads and prints; what a chat is stands in `petals_chat.terminal_chat`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from petals_chat.settings import Settings
from petals_chat.terminal_chat import Chat, ChatError, ChatModel, Server, printable

_PROMPT = "> "
_NOTICE = "Do not enter sensitive data: the owners of the machines that run the model may be able to read it."
_HELP = """\
/new     forget this chat and start another
/models  list the server's models (choose one with --model)
/help    show this
Ctrl-C stops an answer; Ctrl-C or Ctrl-D at the prompt leaves."""
_STATE_WORDS = {
    "loading": "still loading",
    "full": "full: answers wait in a queue",
    "broken": "broken: nobody runs some of its parts",
    "unavailable": "not running",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The server, and how it shall answer."""
    parser.add_argument(
        "url",
        nargs="?",
        default="http://localhost:5000",
        metavar="URL",
        help="address of the server's page (default: %(default)s)",
    )
    parser.add_argument("--model", metavar="KEY", help="which of its models (default: the server's own)")
    parser.add_argument(
        "--api-key",
        type=_api_key,
        metavar="KEY",
        help="for a server that asks for one; @FILE reads it from a file, which other users of the machine cannot see",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="end an answer after N tokens (default: when the model ends it)",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        metavar="T",
        help="higher = more varied, 0 = always the likeliest token (default: the model's own)",
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Chat until the end of the input; returns the exit code."""
    overrides: dict[str, bool | float] = {}
    if arguments.temperature is not None:
        overrides = {"do_sample": True, "temperature": arguments.temperature}
    try:
        server = Server(arguments.url, arguments.api_key)
        models = server.models()
        model = _choose(models, arguments.model)
        with Chat(server, model, overrides, arguments.max_new_tokens) as chat:
            if sys.stdin.isatty():
                _converse(chat, server, model)
            else:
                _print_answer(chat, sys.stdin.read().strip())
    except ChatError as error:
        print(f"petals-chat: {error}", file=sys.stderr)
        return 1
    return 0


def _choose(models: Sequence[ChatModel], key: str | None) -> ChatModel:
    for model in models:
        if model.key == key or (key is None and model.default):
            return model
    raise ChatError(f"there is no model {key} here. Models: {', '.join(model.key for model in models)}")


def _converse(chat: Chat, server: Server, model: ChatModel) -> None:
    _prepare_line_editing()
    state = f" ({_STATE_WORDS[model.state]})" if model.state in _STATE_WORDS else ""
    print(f"{printable(model.name)}{state} at {server.url} - /help lists the commands.\n{_NOTICE}")
    while True:
        try:
            print()
            line = input(_PROMPT).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.startswith("/"):
            _run_command(line, chat, server, model)
        elif line:
            _print_answer_or_error(chat, line)


def _prepare_line_editing() -> None:
    """Let `input` edit lines, keep their history (in memory alone), and take pasted lines as one message."""
    try:
        import readline
    except ImportError:  # a Python built without it; lines can be typed all the same
        return
    readline.parse_and_bind("set enable-bracketed-paste on")


def _run_command(line: str, chat: Chat, server: Server, model: ChatModel) -> None:
    if line == "/new":
        chat.reset()
        print("A new chat.")
    elif line == "/models":
        try:
            _print_models(server.models(), model)
        except ChatError as error:
            print(f"petals-chat: {error}")
    else:
        print(_HELP if line == "/help" else f"There is no command {line.split()[0]}.\n{_HELP}")


def _print_models(models: Sequence[ChatModel], current: ChatModel) -> None:
    width = max(len(model.key) for model in models)
    family = None
    for model in models:
        if model.family != family:
            family = model.family
            print(printable(family))
        mark = "*" if model.key == current.key else " "
        state = f" ({_STATE_WORDS[model.state]})" if model.state in _STATE_WORDS else ""
        print(printable(f"{mark} {model.key:{width}}  {model.name}{state}"))


def _print_answer_or_error(chat: Chat, question: str) -> None:
    try:
        _print_answer(chat, question)
    except ChatError as error:
        print(f"petals-chat: {error}")
    except KeyboardInterrupt:
        print("\n(stopped)")


def _print_answer(chat: Chat, question: str) -> None:
    if not question:
        raise ChatError("there is nothing to answer: the input is empty")
    with closing(chat.answer(question)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print()


def _api_key(text: str) -> str:
    if text.startswith("@"):
        try:
            text = Path(text[1:]).expanduser().read_text().strip()
        except (OSError, UnicodeError) as error:
            raise argparse.ArgumentTypeError(f"{text[1:]} cannot be read: {error}") from None
    if not text.isascii() or not text.isprintable() or not text:
        raise argparse.ArgumentTypeError("a key consists of printable ASCII characters, like sk-...")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, like 100")
    return int(text)


def _temperature(text: str) -> float:
    try:
        temperature = float(text)
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 10")
    return temperature
