"""``petals-chat chat`` as people use it, in a terminal and in a pipe; the gateway has a fake engine."""

from __future__ import annotations

import asyncio
import itertools
import os
import pty
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from petals_chat.engine.interface import ModelState, ModelStatus
from petals_chat.errors import AttentionCacheFullError, MissingBlocksError
from petals_chat.gateway.app import create_app
from petals_chat.gateway.clients import hash_of
from petals_chat.settings import (
    ApiKeySettings,
    ApiSettings,
    ChatSettings,
    LimitSettings,
    ModelSettings,
    ServerSettings,
    Settings,
)
from petals_chat.terminal_chat import (
    INTRODUCTION,
    ChatFormat,
    Exchange,
    next_question,
    printable,
    visible_text,
    whole_chat,
)
from tests.asgi_server import running_server
from tests.fakes import FakeEngine
from tests.gateway.gateways import until

MODELS = (
    ModelSettings(
        key="swarm/beluga",
        repository="swarm/beluga",
        name="Beluga (70B)",
        family="Llama 2",
        chat=ChatSettings(max_session_length=2048),
    ),
    ModelSettings(key="swarm/falcon", repository="swarm/falcon", name="Falcon (180B)", family="Falcon"),
)
HASHES = ChatFormat("###", "###", ("</s>",), {})
CTRL_C, CTRL_D = "\x03", "\x04"
# A terminal sends SIGINT for Ctrl-C to the session whose controlling terminal it is.
IN_A_TERMINAL = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "from petals_chat.cli import main; sys.exit(main())"
)


@asynccontextmanager
async def gateway(
    *, root_path: str = "", limits: LimitSettings | None = None, api: ApiSettings | None = None
) -> AsyncIterator[tuple[str, FakeEngine]]:
    server = ServerSettings(root_path=root_path)
    settings = Settings(
        server=server, limits=limits or LimitSettings(), api=api or ApiSettings(), models=MODELS
    )
    engine = FakeEngine(*(model.key for model in MODELS))
    async with running_server(create_app(settings, engine), settings) as address:
        yield f"http://{address}{root_path}", engine
    assert engine.sessions == {}
    assert engine.running == 0


@pytest.fixture
async def server() -> AsyncIterator[tuple[str, FakeEngine]]:
    async with gateway() as server:
        yield server


@asynccontextmanager
async def ended(process: Process) -> AsyncIterator[Process]:
    """The process, which is gone after the block in any case."""
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def pipe(text: str, *arguments: str) -> tuple[int | None, str, str]:
    """Exit code, standard output and standard error of ``petals-chat chat`` with this input."""
    command = (sys.executable, "-m", "petals_chat", "chat", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    async with ended(process), asyncio.timeout(30):
        output, errors = await process.communicate(text.encode())
    return process.returncode, output.decode(), errors.decode()


class Terminal:
    """``petals-chat chat`` in a pseudo-terminal."""

    def __init__(self, process: Process, master: int) -> None:
        self._process = process
        self._master = master
        self._more = asyncio.Event()
        self.screen = ""
        """Everything that was written so far."""
        asyncio.get_running_loop().add_reader(master, self._read)

    @classmethod
    @asynccontextmanager
    async def running(cls, *arguments: str) -> AsyncIterator[Terminal]:
        master, slave = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", IN_A_TERMINAL, "chat", *arguments),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)
        async with ended(process):
            terminal = cls(process, master)
            try:
                yield terminal
            finally:
                asyncio.get_running_loop().remove_reader(master)
                os.close(master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    async def shows(self, *texts: str) -> None:
        """Wait until the texts have been written, in this order; what is before their end is forgotten."""
        for text in texts:
            try:
                async with asyncio.timeout(30):
                    while text not in self.screen:
                        self._more.clear()
                        await self._more.wait()
            except TimeoutError:
                pytest.fail(f"{text!r} was not shown, but {self.screen!r}")
            self.screen = self.screen.partition(text)[2]

    async def exit_code(self) -> int:
        async with asyncio.timeout(30):
            return await self._process.wait()

    def _read(self) -> None:
        try:
            self.screen += os.read(self._master, 65536).decode().replace("\r\n", "\n")
        except OSError:  # Linux' word for the end of a terminal
            asyncio.get_running_loop().remove_reader(self._master)
        self._more.set()


def test_a_new_session_is_told_the_whole_chat_without_stop_texts() -> None:
    exchanges = [Exchange("One?", " First.###"), Exchange("Two?", " Second.</s>"), Exchange("Three?", " Th")]
    assert whole_chat(exchanges, HASHES) == (
        f"{INTRODUCTION}###Human: One?###Assistant: First.###Human: Two?###Assistant: Second."
        "###Human: Three?###Assistant: Th"
    )


@pytest.mark.parametrize(("previous", "separator"), [(" First.###", ""), (" First.</s>", "###")])
def test_an_open_session_is_told_one_turn_separated_once(previous: str, separator: str) -> None:
    assert next_question(previous, "Two?", HASHES) == f"{separator}Human: Two?###Assistant:"


def test_stop_text_is_never_shown_however_it_is_cut() -> None:
    answer = " a # b ## c###"
    shown = [visible_text(answer[:end], HASHES, complete=False) for end in range(len(answer))]
    shown.append(visible_text(answer, HASHES, complete=True))
    assert shown[-1] == "a # b ## c"
    for earlier, later in itertools.pairwise(shown):
        assert later.startswith(earlier)


def test_a_model_cannot_take_over_the_terminal() -> None:
    assert printable("\x1b]0;title\x07\x1b[2Jone\r\n\ttwo\x9b3 é🌸") == "]0;title[2Jone\n\ttwo3 é🌸"


async def test_a_piped_message_is_answered_with_the_answer_alone(server: tuple[str, FakeEngine]) -> None:
    url, engine = server
    engine.tokens = [" Hel", "lo 🌸", "!", "###"]
    assert await pipe("One line,\nand another\n", url) == (0, "Hello 🌸!\n", "")
    assert engine.requests[0].inputs == f"{INTRODUCTION}###Human: One line,\nand another###Assistant:"
    assert engine.opened == [("swarm/beluga", 2048)]


async def test_model_temperature_and_length_of_the_answer_can_be_chosen(
    server: tuple[str, FakeEngine],
) -> None:
    url, engine = server
    engine.statuses["swarm/falcon"] = engine.statuses["swarm/beluga"]
    options = ("--model", "swarm/falcon", "--max-new-tokens", "3", "--temperature", "0")
    assert await pipe("Count!", url, *options) == (0, "t0 t1 t2\n", "")
    assert [key for key, _ in engine.opened] == ["swarm/falcon"]
    assert not engine.requests[0].sampling.do_sample


@pytest.mark.parametrize(
    ("options", "text", "sentence"),
    [
        (
            ["--model", "no/model"],
            "Hi",
            "there is no model no/model here. Models: swarm/beluga, swarm/falcon",
        ),
        ([], " \n", "nothing to answer"),
        (["ftp://localhost"], "Hi", "ftp://localhost is not the address of a page"),
    ],
)
async def test_a_wrong_use_is_told_in_a_sentence(
    server: tuple[str, FakeEngine], options: Sequence[str], text: str, sentence: str
) -> None:
    url = [] if "ftp://localhost" in options else [server[0]]
    code, output, errors = await pipe(text, *url, *options)
    assert (code, output) == (1, "")
    assert sentence in errors
    assert errors.count("\n") == 1


async def test_an_error_of_the_server_is_told_in_its_own_sentence(server: tuple[str, FakeEngine]) -> None:
    url, engine = server
    engine.generate_error = MissingBlocksError([3])
    code, output, errors = await pipe("Hi", url)
    assert (code, output) == (1, "")
    assert errors == f"petals-chat: {engine.generate_error}\n"


async def test_a_server_that_asks_for_a_key_is_given_it(tmp_path: Path) -> None:
    key, file = "sk-terminal", tmp_path / "key"
    file.write_text(f"{key}\n")
    api = ApiSettings(keys=(ApiKeySettings(name="terminal", hash=hash_of(key)),))
    async with gateway(api=api) as (url, engine):
        engine.tokens = ["Yes."]
        for option in (f"--api-key={key}", f"--api-key=@{file}"):
            assert await pipe("Hi", url, option) == (0, "Yes.\n", "")
        code, output, errors = await pipe("Hi", url)
        assert (code, output) == (1, "")
        assert "asks for an API key" in errors
        code, _, errors = await pipe("Hi", url, f"--api-key=@{tmp_path / 'none'}")
        assert (code, "cannot be read" in errors) == (2, True)


async def test_a_server_that_is_not_there_is_told_in_a_sentence() -> None:
    code, _, errors = await pipe("Hi", "localhost:1")
    assert (code, errors) == (1, "petals-chat: http://localhost:1/ cannot be reached: Connection refused\n")


async def test_something_else_than_a_server_is_told_in_a_sentence() -> None:
    async def greet(request: Request) -> PlainTextResponse:
        return PlainTextResponse("Hello")

    app = Starlette(routes=[Route("/{path:path}", greet)])
    async with running_server(app, Settings(models=MODELS)) as address:
        code, _, errors = await pipe("Hi", address)
    assert (code, errors) == (1, f"petals-chat: http://{address}/ answers, but is no Petals Chat server\n")


async def test_the_address_may_have_a_path() -> None:
    async with gateway(root_path="/some/chat") as (url, engine):
        engine.tokens = [" Hello.", "###"]
        assert await pipe("Hi", url) == (0, "Hello.\n", "")


async def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(server: tuple[str, FakeEngine]) -> None:
    url, engine = server
    async with Terminal.running(url) as terminal:
        await terminal.shows("Beluga (70B) at", "Do not enter sensitive data", "> ")
        terminal.type("Count!\n")
        await terminal.shows("t0 t1 t2")
        terminal.type(CTRL_C)
        await terminal.shows("(stopped)", "> ")
        await until(lambda: engine.running == 0 and not engine.sessions)
        engine.tokens = [" As you wish.", "###"]
        terminal.type("Enough\n")
        await terminal.shows("As you wish.\n", "> ")
        told = engine.requests[-1].inputs
        assert isinstance(told, str)
        assert told.startswith(f"{INTRODUCTION}###Human: Count!###Assistant: t0 t1 t2")
        assert told.endswith("###Human: Enough###Assistant:")
        terminal.type(CTRL_D)
        assert await terminal.exit_code() == 0


async def test_ctrl_c_at_the_prompt_leaves(server: tuple[str, FakeEngine]) -> None:
    async with Terminal.running(server[0]) as terminal:
        await terminal.shows("> ")
        terminal.type(CTRL_C)
        assert await terminal.exit_code() == 0


async def test_an_open_session_is_continued_and_new_begins_another(server: tuple[str, FakeEngine]) -> None:
    url, engine = server
    engine.tokens = [" First.", "###", " Second.", "</s>"]
    async with Terminal.running(url) as terminal:
        terminal.type("One?\n")
        await terminal.shows("First.\n", "> ")
        terminal.type("Two?\n")
        await terminal.shows("Second.\n", "> ")
        assert len(engine.opened) == 1
        assert engine.requests[-1].inputs == "Human: Two?###Assistant:"
        terminal.type("/new\n")
        await terminal.shows("A new chat.", "> ")
        terminal.type("Three?\n")
        await terminal.shows("First.\n", "> ")
        assert engine.requests[-1].inputs == f"{INTRODUCTION}###Human: Three?###Assistant:"


async def test_an_error_does_not_end_the_chat(server: tuple[str, FakeEngine]) -> None:
    url, engine = server
    engine.open_error = AttentionCacheFullError()
    async with Terminal.running(url) as terminal:
        terminal.type("One?\n")
        await terminal.shows("petals-chat: the swarm's attention cache is full", "> ")
        engine.open_error = None
        engine.tokens = [" Hello.", "###"]
        terminal.type("Two?\n")
        await terminal.shows("Hello.\n", "> ")
        assert engine.requests[-1].inputs == f"{INTRODUCTION}###Human: Two?###Assistant:"


async def test_pasted_lines_are_one_message(server: tuple[str, FakeEngine]) -> None:
    url, engine = server
    engine.tokens = [" Read.", "###"]
    async with Terminal.running(url) as terminal:
        await terminal.shows("> ")
        terminal.type("\x1b[200~One line\nand another\x1b[201~\n")  # as terminals mark what is pasted
        await terminal.shows("Read.\n", "> ")
    assert [request.inputs for request in engine.requests] == [
        f"{INTRODUCTION}###Human: One line\nand another###Assistant:"
    ]


async def test_models_and_their_states_are_listed(server: tuple[str, FakeEngine]) -> None:
    url, engine = server
    engine.statuses["swarm/falcon"] = ModelStatus(ModelState.LOADING)
    async with Terminal.running(url) as terminal:
        terminal.type("/models\n")
        await terminal.shows("Llama 2\n* swarm/beluga  Beluga (70B)\n")
        await terminal.shows("Falcon\n  swarm/falcon  Falcon (180B) (still loading)\n", "> ")
        terminal.type("/what\n")
        await terminal.shows("There is no command /what.", "/help", "> ")


async def test_a_chat_goes_on_after_its_idle_session_was_closed() -> None:
    limits = LimitSettings(connection_idle_timeout_seconds=0.2)
    async with gateway(limits=limits) as (url, engine), Terminal.running(url) as terminal:
        engine.tokens = [" First.", "###"]
        terminal.type("One?\n")
        await terminal.shows("First.\n", "> ")
        await until(lambda: not engine.sessions)
        terminal.type("Two?\n")
        await terminal.shows("First.\n", "> ")
        assert engine.requests[-1].inputs == (
            f"{INTRODUCTION}###Human: One?###Assistant: First.###Human: Two?###Assistant:"
        )
