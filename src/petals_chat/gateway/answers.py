"""Answers that outlive the connection that asked for them: they go on to their end, and can be followed from anywhere.

What an answer has come to is `petals_chat.gateway.answer_log`'s affair; here it is made, followed, stopped, and kept
for a while after its end. An answer is never held up by who follows it: its log is bounded by the model's context.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from petals_chat.engine.interface import Chunk, Engine, EngineSession, client_of
from petals_chat.errors import (
    EngineError,
    InternalError,
    ModelLoadingError,
    PetalsChatError,
    TooManyRequestsError,
    UnknownGenerationError,
    error_from_report,
)
from petals_chat.gateway.admission import Slots
from petals_chat.gateway.answer_log import AnswerLog, Followed, Loading
from petals_chat.gateway.deadlines import deadline
from petals_chat.history.interface import AnswerState, Message, Recording
from petals_chat.protocol.messages import ChatPrompt, GenerationRequest
from petals_chat.settings import LimitSettings, ModelSettings

logger = logging.getLogger(__name__)

LOADING_POLL_SECONDS = 0.5
"""How often an answer whose model is being loaded looks whether it is."""
MAX_KEPT = 1024
"""Answers that have ended and can still be attached to; if there are more, the oldest are forgotten."""


class Generation:
    """One answer: in the making, or made. It satisfies `petals_chat.history.interface.RunningAnswer`.

    It is kept for a while after its end, and so has nothing of the request, which may be large, but what is read then.

    Args:
        request: what `work` is given; here it only tells what the answer is like.
        visitor: who alone may follow it; None = whoever knows its id.
    """

    def __init__(
        self, model: ModelSettings, request: GenerationRequest, owner: str, visitor: str | None
    ) -> None:
        self.id = secrets.token_urlsafe(32)
        self.model = model
        self.owner = owner
        self.visitor = visitor
        self.recording: Recording | None = None
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when it is written down that it runs, or with the reason why it does not."""
        inputs = request.inputs
        self.continues = isinstance(inputs, ChatPrompt) and inputs.continue_final_message
        """It goes on from the text of its message."""
        self._log = AnswerLog(request.stop_sequences, continues=self.continues)
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._started_at = _now()
        self._first_text_at: float | None = None
        self._ended_at: float | None = None

    @property
    def model_key(self) -> str:
        """Which model writes it."""
        return self.model.key

    @property
    def text(self) -> str:
        """What there is of it."""
        return self._log.text

    @property
    def tokens(self) -> int:
        """How many tokens that is."""
        return self._log.position

    @property
    def state(self) -> AnswerState:
        """``ANSWERING`` until it changes no more."""
        return self._log.state

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, unless it broke off."""
        return self._log.finish_reason

    @property
    def error_code(self) -> str | None:
        """The error with which it broke off."""
        return self._log.error.code if self._log.error else None

    @property
    def seconds(self) -> float:
        """From its beginning until now, or its end."""
        return (self._ended_at or _now()) - self._started_at

    @property
    def first_token_seconds(self) -> float | None:
        """From its beginning until its first text."""
        return None if self._first_text_at is None else self._first_text_at - self._started_at

    async def follow(self, position: int) -> AsyncGenerator[Followed, None]:
        """What comes after ``position``: what is there already as one piece, then the rest as it is made, and its end.

        Raises:
            InvalidParameterError: no piece ended there.
        """
        log = self._log
        log.check_position(position)
        told = None
        while True:
            changed = self._changed  # before looking, so that no change is missed
            piece = log.after(position)
            if log.is_ended and (log.error is None or not piece.token_count):
                yield log.end_after(position)
                return
            if piece.token_count:
                position, told = piece.position, None
                yield piece
            elif log.waits_for is not None and log.waits_for != told:
                told = log.waits_for
                yield told
            else:
                await changed.wait()

    async def wait_until_ended(self) -> None:
        """Return when it changes no more."""
        await self._ended.wait()

    async def work(self, engine: Engine, request: GenerationRequest, timeout_seconds: float) -> None:
        """Make it; returns when it has ended, in whichever way, and the engine's session is closed."""
        self._work = asyncio.create_task(self._generate(engine, request, timeout_seconds))
        await asyncio.wait((self._work,))
        if not self._work.cancelled() and (error := self._work.exception()) is not None:
            self._fail(error)
        self._work = None  # it has its error, whose frames have the request

    def stop(self) -> None:
        """End it with what it has. It may have ended already."""
        self._end_early(self._log.stop)

    def interrupt(self) -> None:
        """End it because the server stops."""
        self._end_early(self._log.interrupt)

    def _end_early(self, end: Callable[[], None]) -> None:
        if not self._log.is_ended:
            end()
            self._note_change()
            if self._work is not None:
                self._work.cancel()

    async def _generate(self, engine: Engine, request: GenerationRequest, timeout_seconds: float) -> None:
        async with deadline(timeout_seconds):
            session = await self._open_session(engine)
            try:
                async with aclosing(session.generate(request)) as chunks:
                    async for chunk in chunks:
                        self._add(chunk)
            finally:
                await session.close()
        assert self._log.is_ended, "the engine ended a generation without a reason"

    async def _open_session(self, engine: Engine) -> EngineSession:
        """A session of the model, as soon as that is loaded."""
        while True:
            try:
                session = await engine.open_session(
                    self.model.key, _session_tokens(engine, self.model), owner=self.owner, is_stateless=True
                )
            except ModelLoadingError:
                self._log.waits_for = Loading()
                self._note_change()
                await asyncio.sleep(LOADING_POLL_SECONDS)
            else:
                self._log.waits_for = None
                return session

    def _add(self, chunk: Chunk) -> None:
        self._log.add(chunk)
        self._note_change()

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, PetalsChatError):
            logger.error("unexpected error in an answer", exc_info=error)
            error = InternalError()
        # The same error, with the text of its traceback in place of the frames, which have the request.
        self._log.fail(error_from_report(error.report()))
        self._note_change()

    def _note_change(self) -> None:
        if self._first_text_at is None and self._log.text:
            self._first_text_at = _now()
        if self._ended_at is None and self._log.is_ended:
            self._ended_at = _now()
            self._ended.set()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Answers:
    """All answers that are being made, and those that were, for as long as they can be attached to."""

    def __init__(self, engine: Engine, limits: LimitSettings) -> None:
        self._engine = engine
        self._limits = limits
        self._slots = Slots(limits.max_answers, "answers in the making")
        self._of_owner: Counter[str] = Counter()
        self._of_client: Counter[str] = Counter()
        # An address can have as many visitors as it likes, and shall not have all answers.
        self._max_of_client = max(limits.max_answers_of_client, limits.max_answers // 2)
        self._generations: dict[str, Generation] = {}
        self._kept: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def start(
        self,
        model: ModelSettings,
        request: GenerationRequest,
        *,
        owner: str,
        visitor: str | None,
        recording: Recording | None = None,
    ) -> Generation:
        """Begin an answer, which from now on needs nobody.

        Args:
            owner: whose it is, for the engine's queue and for the limit on answers of one owner.
            visitor: who alone may follow and stop it; None = whoever knows its id.
            recording: writes it down.

        Raises:
            TooManyRequestsError: too many are being made.
            PetalsChatError: it cannot be written down there.
        """
        if self._is_closed:
            raise EngineError("the server is being stopped. Try again in a moment")
        if self._of_owner[owner] >= self._limits.max_answers_of_client:
            raise TooManyRequestsError(
                f"{self._of_owner[owner]} answers to you are being written already; wait for one, or stop one"
            )
        client = client_of(owner)
        if self._of_client[client] >= self._max_of_client:
            raise TooManyRequestsError(
                f"{self._max_of_client} answers to your address are being written already; wait for one"
            )
        self._slots.take()
        self._of_owner[owner] += 1
        self._of_client[client] += 1
        generation = Generation(model, request, owner, visitor)
        generation.recording = recording
        task = asyncio.create_task(self._run(generation, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # The client may go away while it is being noted in the history that the answer runs. It runs all the same.
        await asyncio.shield(generation.begun)
        return generation

    def find(self, generation_id: str, visitor: str | None) -> Generation:
        """The answer, for this visitor.

        Raises:
            UnknownGenerationError: there is none with this id, or it is another visitor's.
        """
        generation = self._generations.get(generation_id)
        if generation is None or generation.visitor not in (None, visitor):
            raise UnknownGenerationError
        return generation

    def latest(self, message: Message) -> dict[str, Any]:
        """The fields of a kept message; while it is being written, as it is now, with the ``position`` to attach at."""
        fields = msgspec.structs.asdict(message)
        generation = self._generations.get(message.generation or "")
        if generation is None or generation.recording is None or not generation.begun.done():
            return fields
        return fields | generation.recording.values(generation) | {"position": generation.tokens}

    def stop_if_running(self, generation_id: str) -> None:
        """End the answer with this id, whosever it is, if there is one."""
        if (generation := self._generations.get(generation_id)) is not None:
            generation.stop()

    async def close(self) -> None:
        """End all answers; returns when they are written down."""
        self._is_closed = True
        for generation in self._generations.values():
            generation.interrupt()
        await asyncio.gather(*self._tasks)
        for timer in self._kept.values():
            timer.cancel()
        self._generations.clear()
        self._kept.clear()

    async def _run(self, generation: Generation, request: GenerationRequest) -> None:
        recording = generation.recording
        self._generations[generation.id] = generation
        try:
            if recording is not None:
                await recording.begin(generation)
        except Exception as error:
            del self._generations[generation.id]
            self._free(generation)
            generation.begun.set_exception(error)
            generation.begun.exception()  # nobody may be waiting for it any more
            return
        generation.begun.set_result(None)
        writing = None if recording is None else asyncio.create_task(recording.write(generation))
        if generation.state is AnswerState.ANSWERING:
            await generation.work(self._engine, request, self._limits.request_timeout_seconds)
        self._free(generation)
        self._keep(generation)
        if writing is not None:
            await writing

    def _free(self, generation: Generation) -> None:
        self._slots.free()
        for counter, whose in (
            (self._of_owner, generation.owner),
            (self._of_client, client_of(generation.owner)),
        ):
            counter[whose] -= 1
            if not counter[whose]:
                del counter[whose]

    def _keep(self, generation: Generation) -> None:
        if len(self._kept) >= MAX_KEPT:
            self._forget(next(iter(self._kept)))
        seconds = self._limits.answer_retention_seconds
        self._kept[generation.id] = asyncio.get_running_loop().call_later(
            seconds, self._forget, generation.id
        )

    def _forget(self, generation_id: str) -> None:
        self._kept.pop(generation_id).cancel()
        del self._generations[generation_id]


def _session_tokens(engine: Engine, model: ModelSettings) -> int:
    """Tokens that a session may have; while the worker is not up, the configured limit stands in."""
    worker = engine.statuses[model.key].worker
    return worker.max_session_length if worker else model.chat.max_session_length


def _now() -> float:
    return asyncio.get_running_loop().time()
