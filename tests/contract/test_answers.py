"""Answers that outlive their connection, and even their server, with the real worker and a real database."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from websockets.sync.client import ClientConnection, connect

from petals_chat.gateway.visitors import COOKIE
from tests.contract.conftest import CHAT_TEMPLATE, CONFIGURATION, TEMPLATED, model_entry
from tests.contract.serving import Server, running_server
from tests.contract.wire import TIMEOUT_SECONDS, receive, receive_error, wait_until
from tests.engine.test_exactness import LocalModel

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
TOKENS = 60
WITHOUT_END = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "B"}]
"""What the reciting model, which is the default, goes on with for as long as there is room."""


def new_id() -> str:
    return str(uuid.uuid4())


def start(client: ClientConnection, **parameters: Any) -> str:
    """Begin an answer; gives its generation's id."""
    client.send(json.dumps({"type": "answer", **parameters}))
    generation: str = receive(client)["generation"]
    return generation


def receive_rest(client: ClientConnection) -> list[Any]:
    """All pieces up to the last one of an answer."""
    pieces: list[Any] = []
    while not pieces or not pieces[-1]["stop"]:
        reply = receive(client)
        if "queue_place" not in reply:
            pieces.append(reply)
    return pieces


def text_of(pieces: list[Any]) -> str:
    return "".join(piece["outputs"] for piece in pieces)


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> str:
    """What transformers answers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    local = LocalModel(checkpoints[TEMPLATED])
    tokens = local.tokenizer.apply_chat_template(
        HELLO, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    text = local.text_after(tokens, local.generate(tokens, TOKENS))
    torch.set_num_threads(threads)
    for end in (local.tokenizer.eos_token, "<|eot_id|>", "</s>"):
        text = text.partition(end)[0]
    return text.lstrip()


@pytest.mark.parametrize("seen", [0, 1, 2, 7])
def test_an_answer_broken_off_anywhere_equals_transformers(server: Server, expected: str, seen: int) -> None:
    with connect(server.v2_url) as client:
        generation = start(client, model=TEMPLATED, messages=HELLO, max_new_tokens=TOKENS)
        pieces: list[Any] = []
        while len(pieces) < seen:
            pieces.append(receive(client))
    position = pieces[-1]["position"] if pieces else 0
    with connect(server.v2_url) as client:
        client.send(json.dumps({"type": "attach", "generation": generation, "position": position}))
        pieces += receive_rest(client)
        client.send(json.dumps({"type": "attach", "generation": generation}))
        assert text_of(receive_rest(client)) == text_of(pieces)
    assert text_of(pieces) == expected
    assert sum(piece["token_count"] for piece in pieces) == pieces[-1]["position"] <= TOKENS
    assert pieces[-1]["prompt_tokens"] > 0


def test_a_cut_answer_goes_on_as_if_it_had_not_been_cut(server: Server, expected: str) -> None:
    with connect(server.v2_url) as client:
        start(client, model=TEMPLATED, messages=HELLO, max_new_tokens=20)
        begun = text_of(receive_rest(client))
        messages = [*HELLO, {"role": "assistant", "content": begun}]
        start(client, model=TEMPLATED, messages=messages, max_new_tokens=5)
        rest = text_of(receive_rest(client))
    assert expected.startswith(begun)
    assert rest


def test_the_next_answer_of_a_chat_goes_on_from_the_context_of_the_last(server: Server) -> None:
    question = [{"role": "user", "content": new_id()}]
    with connect(server.v2_url) as client:
        start(client, model=TEMPLATED, messages=question, max_new_tokens=1)
        first = receive_rest(client)[-1]
        more = [*question, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Go on"}]
        start(client, model=TEMPLATED, messages=more, max_new_tokens=1)
        second = receive_rest(client)[-1]
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == first["prompt_tokens"]


def test_a_stopped_answer_frees_the_worker_at_once(
    server: Server, figures: Callable[..., tuple[int, int]]
) -> None:
    wait_until(lambda: figures() == (0, 0))
    with connect(server.v2_url) as client:
        generation = start(client, messages=WITHOUT_END)
        receive(client)
    wait_until(lambda: figures() == (1, 1))
    with connect(server.v2_url) as client:
        client.send(json.dumps({"type": "attach", "generation": generation}))
        pieces = [receive(client)]
        client.send(json.dumps({"type": "stop", "generation": generation}))
        pieces += receive_rest(client)
    assert pieces[-1]["finish_reason"] == "stopped"
    assert pieces[-1]["position"] < 4000
    wait_until(lambda: figures() == (0, 0))


def test_an_error_of_the_engine_ends_an_answer(websocket: ClientConnection) -> None:
    start(websocket, model=TEMPLATED, messages=[{"role": "assistant", "content": "Hello"}] * 2)
    assert receive_error(websocket)["code"] == "invalid_parameter"


def test_an_answer_past_all_room_ends_with_its_text(websocket: ClientConnection) -> None:
    start(websocket, model=TEMPLATED, messages=HELLO)
    last = receive_rest(websocket)[-1]
    assert last["finish_reason"] in ("context_full", "stop")


@pytest.fixture(scope="module")
def config(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a server of this module's own."""
    config = tmp_path_factory.mktemp("killed") / "petals-chat.toml"
    config.write_text(CONFIGURATION + model_entry("reciting", checkpoints["reciting"]))
    return config


class _Killed(Exception):
    """Ends what is left of a server that was killed."""


def test_a_server_that_is_killed_leaves_what_was_answered(config: Path) -> None:
    cookies = httpx.Cookies()
    chat, question, answer = new_id(), new_id(), new_id()
    record = {"chat": chat, "message": answer, "parent": question}

    def messages(http: httpx.Client) -> list[Any]:
        found: list[Any] = http.get(f"/api/chats/{chat}").json()["messages"]
        return found

    def kept(http: httpx.Client) -> Any:
        """The answer as the database has it; while it is made, the others are told more."""
        return http.get(f"/api/chats/{chat}/export").json()["chats"][0]["messages"][1]

    with suppress(_Killed), running_server(config) as server:
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_SECONDS) as http:
            http.get("/api/history")
            http.post("/api/chats", json={"id": chat, "title": "Cats"})
            http.post(f"/api/chats/{chat}/messages", json={"id": question, "content": "Hello"})
            cookies.update(http.cookies)
            headers = {"Cookie": f"{COOKIE}={cookies[COOKIE]}"}
            with connect(server.v2_url, additional_headers=headers) as client:
                start(client, messages=WITHOUT_END[:1], record=record, max_new_tokens=1)
                receive_rest(client)
                wait_until(lambda: messages(http)[1]["state"] == "complete")
                start(client, messages=WITHOUT_END, record=record)
            wait_until(lambda: len(kept(http)["content"]) > 10)
            written = kept(http)
            running = messages(http)[1]
            assert (running["state"], running["generation"] is None) == ("answering", False)
        server.process.kill()
        server.process.wait()
        raise _Killed
    with running_server(config) as server:
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_SECONDS, cookies=cookies) as http:
            interrupted = messages(http)[1]
        assert (interrupted["state"], interrupted["generation"]) == ("interrupted", None)
        assert interrupted["content"].startswith(written["content"])
        assert interrupted["tokens"] >= written["tokens"] > 0
        with connect(server.v2_url) as client:
            client.send(json.dumps({"type": "attach", "generation": running["generation"]}))
            assert receive_error(client)["code"] == "unknown_generation"
