"""Steps of many sessions, computed together.

Most of a step's time goes into reading the weights, which serve many tokens as well as one. Petals 2.2 computes one
session's step after the other. Here a *turn* takes the steps of one token that wait through all blocks side by side,
and with them a piece of a prompt, so that a long prompt holds nobody up.

`install_batching` puts a pool of tasks in the place of the one from which Petals' runtime takes inference steps. What
clients send and get stays the same.

Sources, Petals 2.2.0 and hivemind 1.1.12: ``petals/server/task_pool.py``, ``petals/server/block_functions.py``,
``petals/server/backend.py`` (``merge_inference_pools_inplace``), ``hivemind/moe/server/runtime.py``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import petals.server.block_functions as petals_block_functions
import petals.server.server as petals_server
import torch
from petals.server.backend import _MergedInferenceStep
from petals.server.task_pool import PrioritizedTaskPool
from petals.utils.misc import is_dummy

from petals_chat.swarm import adapters
from petals_chat.swarm.blocks import Batch, KeysValues, Piece
from petals_chat.swarm.exchange import Exchange, Outcome, Task, TaskId

if TYPE_CHECKING:
    from petals_chat.swarm.backend import SwarmBackend

logger = logging.getLogger(__name__)

MAX_SESSIONS = 64
"""In one turn; the others are in the next."""
WAIT_SHARE = 0.25
"""How long a turn may wait for sessions that are about to come, as a share of the time that the last turn took."""
LATE = 2.0
"""A session that has been away this many times as long as the last time is not waited for."""


class Limits(NamedTuple):
    """How steps of more than one token are cut. The other two are multiples of the first."""

    piece: int
    """How many tokens attention computes at once, counted from the beginning of a step."""
    beside_others: int
    """Of longer steps in one turn where sessions wait for their next token, which should not come much later."""
    alone: int


# What attention gives for a token depends, in its last bits, on which tokens are computed with it: so pieces always
# have the same ends, in however many turns they are computed.
CPU_LIMITS = Limits(piece=32, beside_others=32, alone=128)
# A GPU computes hundreds of tokens in the time that it takes to read the weights.
GPU_LIMITS = Limits(piece=256, beside_others=256, alone=1024)


def install_batching(*, shares_turns: bool = True) -> None:
    """Make Petals' server compute steps of many sessions together.

    Args:
        shares_turns: False = sessions still take turns, with pieces of their prompts.
    """
    petals_server.merge_inference_pools_inplace = functools.partial(
        use_batching_pool, shares_turns=shares_turns
    )
    # Steps of more tokens would come block by block, and each block would compute them all at once.
    petals_block_functions.MAX_SHORT_INFERENCE_TOKENS = float("inf")
    petals_block_functions.MAX_NF4_SHORT_INFERENCE_TOKENS = float("inf")


def use_batching_pool(backends: Mapping[str, SwarmBackend], *, shares_turns: bool = True) -> None:
    """Give all blocks of a server one pool for their steps; in the place of Petals' function that does."""
    pool = BatchingPool(backends, shares_turns=shares_turns)
    for backend in backends.values():
        backend.inference_pool = pool


class Step:
    """A step of one session through all blocks that it asks for; long ones are computed piece by piece."""

    def __init__(self, task: Task, *, shares_turns: bool = True) -> None:
        self.task = task
        self.hidden_states, self.hypo_ids, self.infos, *self.prompts = task.args
        self.rows, self.length, _ = self.hidden_states.shape
        self.done = 0
        """Tokens of each row that are computed."""
        self.caches: list[KeysValues] = []
        """Of each block, while a turn computes the step."""
        self.outputs: list[torch.Tensor] = []
        self.error: Exception | None = None
        self.seconds_away: float | None = None
        """Between the session's last answer and this step."""
        self.is_plain = is_dummy(self.hypo_ids) and all(prompt is None for prompt in self.prompts)
        """Neither reorders caches nor brings prompts for each block."""
        self.group: tuple[object, ...] = (self.session,)
        """Steps that are equal in it can share a turn."""
        if self.is_plain and shares_turns:
            self.group = (self.infos[0].active_adapter or "", *(info.uid for info in self.infos))

    @property
    def session(self) -> int:
        """A number that no other open session of this host has."""
        return int(self.infos[0].cache_handles[0])

    @property
    def remaining(self) -> int:
        """Tokens of each row that are still to be computed."""
        return int(self.length) - self.done

    def outcome(self) -> Outcome:
        """What it came to: hidden states [rows, length, hidden_size], or an error."""
        return self.error or [torch.cat(self.outputs, dim=1)]


class Share(NamedTuple):
    """What a turn computes of a step."""

    step: Step
    length: int
    """Tokens of each row."""

    def pieces(self, longest: int) -> Iterator[tuple[Piece, torch.Tensor]]:
        """The pieces of the share, and the hidden states [tokens of all rows, hidden_size] of each."""
        step = self.step
        past, room = step.infos[0].prefix_length, step.caches[0].keys.shape[2]
        end = step.done + self.length
        for start in range(step.done, end, longest):
            length = min(longest, end - start)
            states = step.hidden_states[:, start : start + length]
            yield Piece(past + start, length, room, step.rows), states.flatten(0, 1)


def choose_turn(steps: Sequence[Step], limits: Limits) -> list[Share]:
    """What to compute next.

    The first step, and those that can share a turn with it: all that have one token left, and as much of the longer
    ones as the limits allow.

    Args:
        steps: not empty, in the order in which they came; a step that had its share in a turn comes again.
    """
    first = steps[0]
    if not first.is_plain:
        return [Share(first, first.remaining)]
    group = [step for step in steps if step.group == first.group]
    turn = [Share(step, 1) for step in group if step.remaining == 1][:MAX_SESSIONS]
    left = limits.beside_others if turn else limits.alone
    for step in group:
        if step.remaining > 1 and left > 0:
            pieces = max(1, left // (step.rows * limits.piece))
            turn.append(Share(step, min(step.remaining, pieces * limits.piece)))
            left -= turn[-1].length * step.rows
    return turn


class _Absence(NamedTuple):
    """A session that has got its answer and has not come again."""

    since: float
    last: float | None
    """How many seconds it was away the last time."""


class BatchingPool(PrioritizedTaskPool):  # type: ignore[misc]
    """The tasks of a server's inference steps, of which the runtime gets several at once: a turn.

    Handlers put tasks into it as into Petals' own pool, and hivemind's runtime calls the overridden methods: it loads
    a turn, computes it, and sends what it gave, in this order, in one thread but for the sending.
    """

    def __init__(self, backends: Mapping[str, SwarmBackend], *, shares_turns: bool = True) -> None:
        first = next(iter(backends.values()))
        super().__init__(
            self._compute,
            max_batch_size=first.inference_pool.max_batch_size,
            device=first.inference_pool.device,
            name="inference",
        )
        self.submitted_tasks = Exchange()
        self._lock = threading.Lock()
        self._is_signalled = False
        """Whether hivemind's runtime sees that steps wait; when nobody holds the lock, it is so if they do."""
        self._backends = backends
        self._memory = first.memory_cache
        self._shares_turns = shares_turns
        self._limits = CPU_LIMITS if self.device.type == "cpu" else GPU_LIMITS
        # In bfloat16 on a CPU (oneDNN 3.12), linear layers give two tokens or more the same bits whatever is beside
        # them, but not always one alone. It costs the same to compute two.
        self._pairs_single_tokens = self.device.type == "cpu" and first.dtype is torch.bfloat16
        self._merged_step = _MergedInferenceStep(backends)
        self._steps: dict[TaskId, Step] = {}
        """Those that have come and are not answered, by uid of their task."""
        self._absences: dict[int, _Absence] = {}
        self._turn_seconds = 0.0

    def submit_task(self, *args: Any, priority: float = 0.0) -> asyncio.Future[Sequence[torch.Tensor]]:
        """Send a step to the runtime: called by Petals in the process of a handler.

        Raises:
            ValueError: it has too many tokens.
        """
        rows, length, _ = args[0].shape
        if rows * length > self.max_batch_size:
            raise ValueError(
                f"a step of {rows * length} tokens is too large, at most {self.max_batch_size} are allowed"
            )
        return self.submitted_tasks.submit(args, priority)

    def run(self) -> None:
        """The thread that takes in what handlers send."""
        self._memory.start_reading()
        try:
            while (task := self.submitted_tasks.get()) is not None:
                self.add(task)
        finally:
            self._memory.stop_reading()

    def add(self, task: Task) -> None:
        """Let a task wait for a turn."""
        with self._lock:
            self._ordered_tasks.put(task)
            self._signal()

    def _signal(self) -> None:
        """Tell the runtime whether steps wait, and how urgent the first is; the caller holds the lock."""
        with self._ordered_tasks.mutex:  # the runtime's thread may take one meanwhile
            first = self._ordered_tasks.queue[0] if self._ordered_tasks.queue else None
        if waits := first is not None:
            self.priority = (first.priority, first.time_submitted)
        if waits and not self._is_signalled:
            self.batch_sender.send(None)
        elif self._is_signalled and not waits:
            self.batch_receiver.recv()
        self._is_signalled = waits

    def load_batch_to_runtime(
        self, timeout: float | None = None, device: torch.device | None = None
    ) -> tuple[list[Share], list[list[Share]]]:
        """Wait for steps and choose the next turn: once for hivemind to know it by, and once as what to compute."""
        steps = [self._next_step(timeout)]
        self._collect(steps)
        self._await_companions(steps)
        steps.sort(key=lambda step: step.task)
        turn = choose_turn(steps, self._limits)
        chosen = {step.task.uid for step, _ in turn}
        left = [step.task for step in steps if step.task.uid not in chosen]
        with self._lock:
            for task in left:
                self._ordered_tasks.put(task)
            self._signal()
        return turn, [turn]

    def send_outputs_from_runtime(self, _: Sequence[Share], outputs: tuple[torch.Tensor, list[Step]]) -> None:
        """Answer the steps that the turn has completed; in another thread, while later turns may be computed."""
        # One token's states fit into a pipe, and go together; those of a prompt may be megabytes.
        single = [step for step in outputs[1] if step.length == 1]
        self.submitted_tasks.answer((step.task.uid, step.outcome()) for step in single)
        for step in outputs[1]:
            if step.length > 1:
                self.submitted_tasks.answer([(step.task.uid, step.outcome())])

    def send_exception_from_runtime(self, turn: Sequence[Share], exception: BaseException) -> None:
        """Answer all steps of the turn with an error."""
        for step, _ in turn:
            self._steps.pop(step.task.uid, None)
        self.submitted_tasks.answer((step.task.uid, exception) for step, _ in turn)

    def _next_step(self, timeout: float | None) -> Step:
        """The next one that comes. Raises `queue.Empty`."""
        task = self._ordered_tasks.get(timeout=timeout)
        if task.uid not in self._steps:
            step = Step(task, shares_turns=self._shares_turns)
            if absence := self._absences.pop(step.session, None):
                step.seconds_away = task.time_submitted - absence.since
            self._steps[task.uid] = step
        return self._steps[task.uid]

    def _collect(self, steps: list[Step]) -> None:
        """Add the steps that are there already."""
        while not self._ordered_tasks.empty():  # nobody else takes from it
            steps.append(self._next_step(timeout=0))

    def _await_companions(self, steps: list[Step]) -> None:
        """Wait a little for sessions that are about to come, if they were as quick the last time.

        Otherwise those that were computed together would be answered together, and the first to come again would
        begin a turn without the others.
        """
        limit = time.monotonic() + WAIT_SHARE * self._turn_seconds
        while len(steps) < MAX_SESSIONS and (seconds := self._seconds_to_wait(limit)) > 0:
            try:
                steps.append(self._next_step(seconds))
            except queue.Empty:
                return

    def _seconds_to_wait(self, limit: float) -> float:
        now, until = time.monotonic(), 0.0
        for session, (since, last) in list(self._absences.items()):
            if last is None or since + LATE * last < now:
                del self._absences[session]
            elif since + last < limit:
                until = max(until, since + LATE * last)
        return min(until, limit) - now

    @torch.inference_mode()
    def _compute(self, turn: Sequence[Share]) -> tuple[torch.Tensor, list[Step]]:
        """Compute a turn; what it gave, or why it failed, is noted in its steps.

        Returns:
            A tensor with a row for each step, for the runtime's statistics, and the steps that are complete.
        """
        began = time.monotonic()
        for step, _ in turn:
            self._prepare(step)
        self._advance([share for share in turn if share.step.error is None])
        now = time.monotonic()
        self._turn_seconds = now - began
        complete = [step for step, _ in turn if step.error is not None or step.remaining == 0]
        for step in complete:
            del self._steps[step.task.uid]
            self._absences[step.session] = _Absence(now, step.seconds_away)
        for step, _ in turn:
            if step not in complete:
                self._put_back(step, now)
        return torch.empty(len(turn)), complete

    def _prepare(self, step: Step) -> None:
        """Find the session's caches in each block, and check what the handler has not against them."""
        handles = [handle for info in step.infos for handle in info.cache_handles]
        try:
            with self._memory.use_cache(*handles) as tensors:
                step.caches = [KeysValues(*pair) for pair in zip(tensors[0::2], tensors[1::2], strict=True)]
        except KeyError:
            step.error = KeyError("the session has ended")
            return
        room = step.caches[0].keys.shape[0]
        if step.rows != room:  # so a turn has no more tokens than there is memory for in the caches
            step.error = ValueError(f"a step of {step.rows} rows, in a session with room for {room}")
        elif not is_dummy(step.hypo_ids) and not _are_rows(step.hypo_ids, room):
            # On a GPU, indices out of range would break all further computing.
            step.error = ValueError(f"hypo_ids must be {room} numbers of rows, from 0 up")

    def _advance(self, turn: Sequence[Share]) -> None:
        if not turn:
            return
        try:
            outputs = self._compute_together(turn) if turn[0].step.is_plain else self._compute_alone(*turn)
        except Exception as error:
            if len(turn) > 1:
                # One of them is at fault. Computing the others again writes the same into their caches.
                for share in turn:
                    self._advance([share])
                return
            logger.warning("a step of a session failed", exc_info=True)
            turn[0].step.error = error
        else:
            for share, output in zip(turn, outputs, strict=True):
                share.step.outputs.append(output)
                share.step.done += share.length

    def _compute_alone(self, share: Share) -> list[torch.Tensor]:
        """A step with prompts for each block, or that reorders caches, as Petals computes it."""
        arguments = share.step.task.args
        on_device = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in arguments]
        return [output.cpu() for output in self._merged_step(*on_device)]

    def _compute_together(self, turn: Sequence[Share]) -> list[torch.Tensor]:
        """Outputs of each share, [rows, length, hidden_size]."""
        cut = [(share.step, *piece) for share in turn for piece in share.pieces(self._limits.piece)]
        steps, pieces, states = ([*of_pieces] for of_pieces in zip(*cut, strict=True))
        if self._pairs_single_tokens and sum(piece.tokens for piece in pieces) == 1:
            pieces.append(Piece(start=0, length=1, room=1))
            states *= 2
        batch = Batch(pieces, self.device)
        hidden_states = torch.cat(states)[None].to(self.device)
        infos = turn[0].step.infos
        with adapters.using_adapter(infos[0].active_adapter):
            for depth, info in enumerate(infos):
                caches: list[KeysValues | None] = [step.caches[depth] for step in steps]
                caches += [None] * (len(pieces) - len(steps))
                hidden_states = self._backends[info.uid].block.step(hidden_states, batch, caches)
        hidden_states = hidden_states[0].cpu()
        outputs: dict[int, list[torch.Tensor]] = {}
        for step, (piece, where) in zip(steps, batch.slices(), strict=False):
            rows = hidden_states[where].view(piece.rows, piece.length, -1)
            outputs.setdefault(step.session, []).append(rows)
        return [torch.cat(of_step, dim=1) for of_step in outputs.values()]

    def _put_back(self, step: Step, now: float) -> None:
        """Let the rest of a step wait behind those that wait already."""
        step.task = dataclasses.replace(step.task, time_submitted=now)
        self.add(step.task)


def _are_rows(numbers: torch.Tensor, count: int) -> bool:
    """Whether they are one for each of ``count`` rows, and each is that of a row."""
    if numbers.dtype is not torch.int64 or numbers.shape != (count,):
        return False
    return count == 0 or (int(numbers.min()) >= 0 and int(numbers.max()) < count)
