"""The protocol of the v2 API, without a socket or an engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from petals_chat.engine.interface import Chunk
from petals_chat.errors import AttentionCacheFullError, PetalsChatError, UnknownGenerationError
from petals_chat.gateway.answer_log import End, Failed, Piece, QueuePlace
from petals_chat.gateway.models import ModelRegistry
from petals_chat.gateway.session_v2 import (
    REMEMBERED_FRAME_CHARS,
    Action,
    Fail,
    FollowAnswer,
    OpenSession,
    SendFrame,
    SessionV2,
    StartAnswer,
    StartGeneration,
    StopAnswer,
)
from petals_chat.history.interface import Record
from petals_chat.protocol.messages import (
    ChatMessage,
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    SamplingParameters,
)
from petals_chat.settings import LimitSettings
from tests.gateway.gateways import MODEL, PRIVATE_MODEL

OPEN = {"type": "open_inference_session", "model": "org/model", "max_length": 64}
SINGLE = {"type": "generate", "inputs": "A", "max_new_tokens": 3}
STREAMING = {**SINGLE, "max_new_tokens": 1, "stop_sequence": "###"}


def connection(*, same_origin: bool = False, **limits: Any) -> SessionV2:
    return SessionV2(ModelRegistry([MODEL, PRIVATE_MODEL]), LimitSettings(**limits), same_origin=same_origin)


def opened(**limits: Any) -> SessionV2:
    protocol = connection(**limits)
    protocol.receive_text(json.dumps(OPEN))
    protocol.session_opened()
    return protocol


def request_of(actions: list[Action]) -> GenerationRequest:
    (start,) = actions
    assert isinstance(start, StartGeneration)
    return start.request


def error_of(actions: list[Action]) -> PetalsChatError:
    (fail,) = actions
    assert isinstance(fail, Fail)
    return fail.error


def frames(actions: Iterable[Action]) -> list[Any]:
    return [json.loads(action.text) for action in actions if isinstance(action, SendFrame)]


def test_opening_asks_the_engine_and_then_says_ok() -> None:
    protocol = connection()
    assert protocol.receive_text(json.dumps(OPEN)) == [OpenSession("org/model", 64)]
    assert frames(protocol.session_opened()) == [{"ok": True}]


@pytest.mark.parametrize(("name", "key"), [("old/name", "org/model"), (None, "org/model"), ("", "org/model")])
def test_a_model_is_found_by_its_alias_and_by_default(name: str | None, key: str) -> None:
    assert connection().receive_text(json.dumps({**OPEN, "model": name})) == [OpenSession(key, 64)]


def test_a_model_without_public_api_opens_for_the_own_page_alone() -> None:
    frame = json.dumps({**OPEN, "model": "org/private"})
    assert error_of(connection().receive_text(frame)).code == "model_not_public"
    assert connection(same_origin=True).receive_text(frame) == [OpenSession("org/private", 64)]


@pytest.mark.parametrize("request_frame", [SINGLE, STREAMING])
@pytest.mark.parametrize(
    ("wish", "told"),
    [({}, []), ({"queue_places": False}, []), ({"queue_places": True}, [{"ok": True, "queue_place": 2}])],
)
def test_places_in_the_queue_are_told_to_those_who_asked_for_them(
    wish: dict[str, bool], told: list[Any], request_frame: dict[str, Any]
) -> None:
    protocol = connection()
    protocol.receive_text(json.dumps({**OPEN, **wish}))
    protocol.session_opened()
    protocol.receive_text(json.dumps(request_frame))
    assert frames(protocol.chunk_generated(Chunk("", 0, queue_place=2))) == told
    chunk = Chunk("Hi", 1, FinishReason.LENGTH)
    assert [frame["outputs"] for frame in frames(protocol.chunk_generated(chunk))] == ["Hi"]


def test_without_a_stop_sequence_everything_is_asked_for_at_once() -> None:
    frame = json.dumps({**SINGLE, "stop_sequence": None, "extra_stop_sequences": ["</s>"], "num_beams": 4})
    assert request_of(opened().receive_text(frame)) == GenerationRequest("A", max_new_tokens=3)


def test_with_a_stop_sequence_chunks_are_asked_for_without_end() -> None:
    frame = json.dumps({**STREAMING, "extra_stop_sequences": ["</s>", "###"], "max_length": 50})
    assert request_of(opened().receive_text(frame)) == GenerationRequest(
        "A", chunk_tokens=1, stop_sequences=("###", "</s>")
    )


@pytest.mark.parametrize(
    ("extra", "stop_sequences"),
    [(None, ("###",)), ([], ("###",)), ("</s>", ("###", "</s>")), (["a", "b"], ("###", "a", "b"))],
)
def test_extra_stop_sequences_are_a_text_or_a_list_or_null(extra: Any, stop_sequences: tuple[str]) -> None:
    frame = json.dumps({**STREAMING, "extra_stop_sequences": extra})
    assert request_of(opened().receive_text(frame)).stop_sequences == stop_sequences


def test_max_length_bounds_a_stream_if_it_stands_alone() -> None:
    frame = json.dumps({"type": "generate", "inputs": "A", "max_length": 50, "stop_sequence": "###"})
    assert request_of(opened().receive_text(frame)) == GenerationRequest(
        "A", max_length=50, stop_sequences=("###",)
    )


def test_sampling_parameters_reach_the_engine() -> None:
    sampling = {
        "do_sample": 1,
        "temperature": 0.6,
        "top_k": 5,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "seed": 7,
    }
    frame = json.dumps({**SINGLE, **sampling})
    assert request_of(opened().receive_text(frame)).sampling == SamplingParameters(True, 0.6, 5, 0.9, 1.2, 7)


def test_a_single_reply_holds_all_chunks() -> None:
    protocol = opened()
    protocol.receive_text(json.dumps(SINGLE))
    assert protocol.chunk_generated(Chunk(" a", 1)) == []
    actions = protocol.chunk_generated(Chunk(" b", 2, FinishReason.LENGTH))
    assert frames(actions) == [{"ok": True, "outputs": " a b", "stop": True, "token_count": 3}]


def test_a_second_single_reply_does_not_repeat_the_first() -> None:
    protocol = opened()
    for text in (" a", " b"):
        protocol.receive_text(json.dumps(SINGLE))
        (reply,) = frames(protocol.chunk_generated(Chunk(text, 1, FinishReason.LENGTH)))
        assert (reply["outputs"], reply["token_count"]) == (text, 1)


@pytest.mark.parametrize(
    ("reason", "stop"),
    [
        (None, False),
        (FinishReason.STOP_SEQUENCE, True),
        (FinishReason.END_OF_SEQUENCE, True),
        (FinishReason.LENGTH, True),
    ],
)
def test_stop_is_true_when_a_stream_has_come_to_its_end(reason: FinishReason | None, stop: bool) -> None:
    protocol = opened()
    protocol.receive_text(json.dumps(STREAMING))
    actions = protocol.chunk_generated(Chunk(' "é', 1, reason))
    assert frames(actions) == [{"ok": True, "outputs": ' "é', "stop": stop, "token_count": 1}]


def test_a_full_context_ends_a_stream_with_its_text_and_an_error() -> None:
    protocol = opened()
    protocol.receive_text(json.dumps(STREAMING))
    reply, *rest = protocol.chunk_generated(Chunk(" a", 1, FinishReason.CONTEXT_FULL))
    assert frames([reply]) == [{"ok": True, "outputs": " a", "stop": False, "token_count": 1}]
    assert error_of(rest).message.startswith("Maximum length exceeded: the 64 tokens of the session")


def test_a_context_that_the_swarm_limits_is_told_so() -> None:
    protocol = opened()
    protocol.receive_text(json.dumps(STREAMING))
    _, *rest = protocol.chunk_generated(Chunk(" a", 1, FinishReason.CONTEXT_FULL, context_limit=40))
    error = error_of(rest)
    assert "the machines of the swarm allow 40 tokens in one context" in error.message
    assert error.data == {"limit": 40}


@pytest.mark.parametrize("message", [SINGLE, STREAMING])
def test_a_session_that_the_server_ended_has_expired(message: dict[str, Any]) -> None:
    protocol = opened()
    protocol.receive_text(json.dumps(message))
    *_, last = protocol.chunk_generated(Chunk("", 0, FinishReason.CANCELLED))
    assert isinstance(last, Fail)
    assert last.error.code == "session_expired"


def test_requests_wait_for_their_turn() -> None:
    protocol = connection()
    first, second, third = (json.dumps({**SINGLE, "inputs": name}) for name in "ABC")
    assert protocol.receive_text(json.dumps(OPEN)) == [OpenSession("org/model", 64)]
    assert protocol.receive_text(first) == []
    assert protocol.receive_text(second) == []
    (ok, start) = protocol.session_opened()
    assert frames([ok]) == [{"ok": True}]
    assert request_of([start]).inputs == "A"
    assert protocol.receive_text(third) == []
    for following in "BC":
        (_, start) = protocol.chunk_generated(Chunk(" a", 1, FinishReason.LENGTH))
        assert request_of([start]).inputs == following


def test_what_was_asked_before_an_error_is_answered_first() -> None:
    protocol = opened()
    protocol.receive_text(json.dumps(SINGLE))
    assert protocol.receive_text("no JSON") == []
    assert protocol.receive_text(json.dumps(SINGLE)) == []
    assert protocol.receive_bytes() == []
    (reply, fail) = protocol.chunk_generated(Chunk(" a", 1, FinishReason.LENGTH))
    assert frames([reply])[0]["outputs"] == " a"
    assert error_of([fail]).code == "protocol_violation"


def test_an_error_of_the_engine_drops_what_waits() -> None:
    protocol = connection()
    protocol.receive_text(json.dumps(OPEN))
    protocol.receive_text(json.dumps(SINGLE))
    assert error_of(protocol.failed(AttentionCacheFullError())).code == "attention_cache_full"
    assert protocol.receive_text(json.dumps(SINGLE)) == []


def test_only_short_frames_are_remembered_for_clients_that_send_them_again() -> None:
    for length, is_remembered in ((100, True), (REMEMBERED_FRAME_CHARS, False)):
        protocol = opened()
        frame = json.dumps({**SINGLE, "inputs": "A" * length})
        first = request_of(protocol.receive_text(frame))
        protocol.chunk_generated(Chunk("", 0, FinishReason.LENGTH))
        again = request_of(protocol.receive_text(frame))
        assert again == first
        assert (again is first) == is_remembered


def test_no_more_requests_wait_than_the_limit_allows() -> None:
    protocol = opened(max_pending_requests=2)
    for _ in range(10):
        protocol.receive_text(json.dumps(SINGLE))
    answered = 0
    while True:
        reply, following = protocol.chunk_generated(Chunk(" a", 1, FinishReason.LENGTH))
        answered += isinstance(reply, SendFrame)
        if isinstance(following, Fail):
            break
    assert answered == 3
    assert following.error.code == "too_many_requests"


def test_an_idle_connection_expires() -> None:
    error = error_of(opened().idle_timed_out())
    assert error.message == "Session of this connection expired: nothing was asked for in 300 s"


@pytest.mark.parametrize(
    ("frame", "code", "part"),
    [
        ("", "protocol_violation", "not valid JSON"),
        ("nope", "protocol_violation", "not valid JSON"),
        ('{"type": "generate"', "protocol_violation", "not valid JSON"),
        ('{"inputs": "\\ud800"}', "protocol_violation", "not valid JSON"),
        ('{"temperature": NaN}', "protocol_violation", "not valid JSON"),
        ("[" * 100_000, "protocol_violation", "not valid JSON"),
        ("[]", "protocol_violation", "must be a JSON object"),
        ("null", "protocol_violation", "must be a JSON object"),
        ("{}", "protocol_violation", "type: "),
        ('{"type": 7}', "protocol_violation", "type: "),
        ('{"type": ["generate"]}', "protocol_violation", "type: "),
        (json.dumps({"type": "x" * 10_000}), "protocol_violation", "type: "),
        (json.dumps(OPEN), "protocol_violation", "already has"),
        (json.dumps({**SINGLE, "inputs": "x" * 2_000_000}), "message_too_large", "1048576 bytes"),
        (json.dumps({**SINGLE, "inputs": "猫" * 400_000}, ensure_ascii=False), "message_too_large", "bytes"),
        (json.dumps({"type": "generate"}), "invalid_parameter", "max_new_tokens: "),
        (json.dumps({**SINGLE, "max_new_tokens": 0}), "invalid_parameter", "max_new_tokens: "),
        (json.dumps({**SINGLE, "inputs": 5}), "invalid_parameter", "inputs: "),
        (json.dumps({**SINGLE, "model": "org/private"}), "invalid_parameter", "model: "),
        (json.dumps({**SINGLE, "model": "no/such"}), "unknown_model", "no/such"),
        (json.dumps({**SINGLE, "stop_sequence": ""}), "invalid_parameter", "stop_sequence: "),
        (json.dumps({**SINGLE, "stop_sequence": 5}), "invalid_parameter", "stop_sequence: "),
        (json.dumps({**SINGLE, "stop_sequence": "x" * 300}), "invalid_parameter", "stop_sequence: "),
        (
            json.dumps({**STREAMING, "extra_stop_sequences": ""}),
            "invalid_parameter",
            "extra_stop_sequences: ",
        ),
        (
            json.dumps({**STREAMING, "extra_stop_sequences": [""]}),
            "invalid_parameter",
            "extra_stop_sequences: ",
        ),
        (
            json.dumps({**STREAMING, "extra_stop_sequences": [1]}),
            "invalid_parameter",
            "extra_stop_sequences: ",
        ),
        (
            json.dumps({**STREAMING, "extra_stop_sequences": [str(number) for number in range(16)]}),
            "invalid_parameter",
            "extra_stop_sequences: ",
        ),
    ],
)
def test_a_bad_frame_gets_an_error_that_names_the_reason(frame: str, code: str, part: str) -> None:
    error = error_of(opened().receive_text(frame))
    assert error.code == code
    assert part in error.message
    assert len(error.message) < 300


def test_generate_comes_after_open() -> None:
    error = error_of(connection().receive_text(json.dumps(SINGLE)))
    assert error.message == "open_inference_session must come before generate"


@pytest.mark.parametrize("max_length", [None, 0, -1, "x", 1.5, True])
def test_a_session_needs_a_length(max_length: Any) -> None:
    error = error_of(connection().receive_text(json.dumps({**OPEN, "max_length": max_length})))
    assert error.code == "invalid_parameter"
    assert error.message.startswith("max_length: ")


def test_binary_frames_are_refused() -> None:
    assert error_of(connection().receive_bytes()).code == "protocol_violation"


def interleavings(client: list[str], chunks: int) -> Iterator[list[bool]]:
    """Every order in which ``len(client)`` frames and ``chunks`` engine events may come; True = a frame."""
    length = len(client) + chunks
    for places in itertools.combinations(range(length), len(client)):
        yield [position in places for position in range(length)]


def test_replies_are_the_same_wherever_the_frames_come_between_the_engines_events() -> None:
    client = [json.dumps(message) for message in (OPEN, STREAMING, SINGLE, {"type": "dance"})]
    expected = [
        {"ok": True},
        {"ok": True, "outputs": " a", "stop": False, "token_count": 1},
        {"ok": True, "outputs": "###", "stop": True, "token_count": 1},
        {"ok": True, "outputs": " b", "stop": True, "token_count": 3},
    ]
    for order in interleavings(client, 4):
        protocol = connection()
        engine = EngineOnPaper(protocol)
        waiting = iter(client)
        for is_frame in order:
            if is_frame:
                engine.perform(protocol.receive_text(next(waiting)))
            else:
                engine.step()
        while engine.step():
            pass
        assert frames(engine.sent) == expected
        assert engine.failed is not None
        assert engine.failed.code == "protocol_violation"


class EngineOnPaper:
    """Performs actions with prepared results, one event per step."""

    def __init__(self, protocol: SessionV2) -> None:
        self._protocol = protocol
        self._running: Action | None = None
        self._stream = iter([Chunk(" a", 1), Chunk("###", 1, FinishReason.STOP_SEQUENCE)])
        self.sent: list[Action] = []
        self.failed: PetalsChatError | None = None

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            assert self.failed is None
            match action:
                case SendFrame():
                    self.sent.append(action)
                case Fail(error):
                    self.failed = error
                case _:
                    assert self._running is None
                    self._running = action

    def step(self) -> bool:
        """Let the engine bring about its next event, if it has anything to do."""
        match self._running:
            case OpenSession():
                self._running = None
                self.perform(self._protocol.session_opened())
            case StartGeneration(request):
                chunk = next(self._stream) if request.stop_sequences else Chunk(" b", 3, FinishReason.LENGTH)
                if chunk.finish_reason is not None:
                    self._running = None
                self.perform(self._protocol.chunk_generated(chunk))
            case _:
                return False
        return True


ANSWER: dict[str, Any] = {"type": "answer", "messages": [{"role": "user", "content": "Hello"}]}
IDS = [f"00000000-0000-4000-8000-00000000000{number}" for number in range(3)]
RECORD = dict(zip(("chat", "message", "parent"), IDS, strict=True))


def answer_of(actions: list[Action]) -> StartAnswer:
    (start,) = actions
    assert isinstance(start, StartAnswer)
    return start


def test_an_answer_needs_no_session_and_is_worded_as_a_chat() -> None:
    frame = json.dumps({**ANSWER, "model": "old/name", "do_sample": 1, "seed": 7, "max_new_tokens": 5})
    start = answer_of(connection().receive_text(frame))
    assert start.model.key == "org/model"
    assert start.record is None
    assert start.request == GenerationRequest(
        ChatPrompt((ChatMessage("user", "Hello"),)),
        SamplingParameters(do_sample=True, seed=7),
        max_new_tokens=5,
        chunk_tokens=1,
        stop_sequences=("###", "</s>"),
        hide_end_of_sequence=True,
    )


def test_an_answer_after_the_assistants_message_continues_it() -> None:
    messages = [*ANSWER["messages"], {"role": "assistant", "content": "Hi th"}]
    start = answer_of(connection().receive_text(json.dumps({**ANSWER, "messages": messages})))
    assert isinstance(start.request.inputs, ChatPrompt)
    assert start.request.inputs.continue_final_message


def test_an_answer_may_be_recorded() -> None:
    start = answer_of(connection().receive_text(json.dumps({**ANSWER, "record": RECORD})))
    assert start.record == Record(*IDS)


def test_an_answer_is_told_piece_by_piece_with_positions() -> None:
    protocol = connection()
    protocol.receive_text(json.dumps(ANSWER))
    actions = [
        *protocol.answer_started("abc"),
        *protocol.followed(QueuePlace(2)),
        *protocol.followed(Piece("Hi", 2, 2)),
        *protocol.followed(End(Piece(" you", 1, 3), "stop", 7, 5)),
    ]
    assert frames(actions) == [
        {"ok": True, "generation": "abc"},
        {"ok": True, "queue_place": 2},
        {"ok": True, "outputs": "Hi", "token_count": 2, "stop": False, "position": 2},
        {
            "ok": True,
            "outputs": " you",
            "token_count": 1,
            "stop": True,
            "position": 3,
            "finish_reason": "stop",
            "prompt_tokens": 7,
            "cached_tokens": 5,
        },
    ]


def test_an_answer_that_breaks_off_ends_the_connection() -> None:
    protocol = connection()
    protocol.receive_text(json.dumps(ANSWER))
    protocol.answer_started("abc")
    assert error_of(protocol.followed(Failed(AttentionCacheFullError()))).code == "attention_cache_full"
    assert protocol.receive_text(json.dumps(ANSWER)) == []


def test_attaching_names_the_answer_and_what_was_seen_of_it() -> None:
    attach = {"type": "attach", "generation": "abc"}
    assert connection().receive_text(json.dumps(attach)) == [FollowAnswer("abc", 0)]
    assert connection().receive_text(json.dumps({**attach, "position": 7.0})) == [FollowAnswer("abc", 7)]


def test_a_connection_follows_one_answer_at_a_time() -> None:
    protocol = connection()
    protocol.receive_text(json.dumps({"type": "attach", "generation": "abc"}))
    assert protocol.receive_text(json.dumps({"type": "attach", "generation": "def"})) == []
    assert protocol.receive_text(json.dumps(OPEN)) == []
    (_, following) = protocol.followed(End(Piece("", 0, 3), "length", 0, 0))
    assert following == FollowAnswer("def", 0)
    (_, following) = protocol.followed(End(Piece("", 0, 3), "length", 0, 0))
    assert following == OpenSession("org/model", 64)


def test_stopping_waits_for_nothing() -> None:
    protocol = connection()
    protocol.receive_text(json.dumps(ANSWER))
    protocol.answer_started("abc")
    stop = json.dumps({"type": "stop", "generation": "abc"})
    assert protocol.receive_text(stop) == [StopAnswer("abc")]
    assert protocol.receive_text(stop) == [StopAnswer("abc")]


def test_what_cannot_be_stopped_is_an_error_in_its_turn() -> None:
    protocol = connection()
    protocol.receive_text(json.dumps(ANSWER))
    protocol.answer_started("abc")
    assert protocol.refused(UnknownGenerationError()) == []
    assert protocol.refused(UnknownGenerationError()) == []
    (_, fail) = protocol.followed(End(Piece("", 0, 3), "length", 0, 0))
    assert error_of([fail]).code == "unknown_generation"


@pytest.mark.parametrize(
    ("frame", "code", "part"),
    [
        ({"type": "answer"}, "invalid_parameter", "messages: it is missing"),
        ({**ANSWER, "messages": []}, "invalid_parameter", "messages: "),
        ({**ANSWER, "messages": [{}] * 5000}, "invalid_parameter", "messages: "),
        ({**ANSWER, "messages": [{"role": "cat", "content": "Miau"}]}, "invalid_parameter", "messages: "),
        ({**ANSWER, "messages": [{"role": "user", "content": None}]}, "invalid_parameter", "messages: "),
        ({**ANSWER, "model": "org/private"}, "model_not_public", "org/private"),
        ({**ANSWER, "model": "no/such"}, "unknown_model", "no/such"),
        ({**ANSWER, "temperature": -1}, "invalid_parameter", "temperature: "),
        ({**ANSWER, "max_new_tokens": 0}, "invalid_parameter", "max_new_tokens: "),
        ({**ANSWER, "record": "x"}, "invalid_parameter", "record: "),
        ({**ANSWER, "record": {**RECORD, "chat": "x"}}, "invalid_parameter", "record: "),
        ({**ANSWER, "record": {"chat": IDS[0]}}, "invalid_parameter", "record: "),
        ({"type": "attach"}, "invalid_parameter", "generation: it is missing"),
        ({"type": "attach", "generation": "abc", "position": -1}, "invalid_parameter", "position: "),
        ({"type": "attach", "generation": 5}, "invalid_parameter", "generation: "),
        ({"type": "stop"}, "invalid_parameter", "generation: it is missing"),
    ],
)
def test_a_bad_frame_about_an_answer_gets_an_error_that_names_the_reason(
    frame: dict[str, Any], code: str, part: str
) -> None:
    error = error_of(connection().receive_text(json.dumps(frame)))
    assert error.code == code
    assert part in error.message
    assert len(error.message) < 300
