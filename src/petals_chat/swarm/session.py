"""An inference session over the swarm's servers: hidden states in, hidden states out, for one context.

Petals' own client session blocks a thread for each step and copies its whole input history with each token.
This one is asyncio, on Petals' routing, wire format and rules of recovery: a chain of servers, each of which
pushes its outputs to the next; a server that fails is replaced by others, which get the inputs of the past
again. It knows nothing of tokens. Everything here runs in hivemind's event loop.

Sources: ``petals/client/inference_session.py`` and ``petals/server/handler.py`` of Petals 2.2.0.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import re
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import torch

from petals_chat.errors import (
    AttentionCacheFullError,
    MaximumLengthExceededError,
    MissingBlocksError,
    SwarmUnreachableError,
)
from petals_chat.swarm import compat, tensors
from petals_chat.wait_limit import WaitLimit

compat.install()

from hivemind.p2p import P2P, P2PHandlerError, PeerID
from hivemind.proto import runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils import MSGPackSerializer
from petals.client.routing.sequence_manager import MissingBlocksError as PetalsMissingBlocksError
from petals.data_structures import RemoteSpanInfo
from petals.server.handler import TransformerConnectionHandler
from petals.utils.misc import DUMMY, DUMMY_INT64
from petals.utils.packaging import pack_args_kwargs

logger = logging.getLogger(__name__)

_step_numbers = itertools.count()

_Refusal = AttentionCacheFullError | MaximumLengthExceededError

CLOSE_TIMEOUT_SECONDS = 2.0
MESSAGE_BYTES = 1 << 20
"""Longest message of a server, besides twice the size of the hidden states that it brings."""
WIDEST_NUMBER_BYTES = 4
REPLAY_TOKENS = 512
"""Longest piece of the past sent to a new server as one step."""


class Routing(Protocol):
    """Which servers hold which blocks; see `petals_chat.swarm.client.SwarmRouting`."""

    num_blocks: int
    max_attempts: int
    connect_timeout: float
    request_timeout: float
    p2p: P2P

    async def find_servers(self, start: int, end: int, cache_tokens: int) -> list[RemoteSpanInfo]:
        """A chain of servers for the blocks from ``start`` up to ``end``."""

    async def tensor_schema(self, span: RemoteSpanInfo) -> Any:
        """How servers want hidden states: dtype and compression; the server of ``span`` may be asked."""

    def request_metadata(self, span: RemoteSpanInfo, uids: str) -> dict[str, Any]:
        """What a server wants to know when a session begins."""

    def uids(self, span: RemoteSpanInfo) -> str:
        """The names of the blocks of ``span``."""

    def note_failure(self, span: RemoteSpanInfo) -> None:
        """Avoid this server for a while."""

    def note_full(self, span: RemoteSpanInfo) -> None:
        """Prefer other servers, if there are any with room, until the list of servers is fetched again."""

    def note_success(self, span: RemoteSpanInfo) -> None:
        """Forget its failures."""

    def retry_delay(self, attempt: int) -> float:
        """Seconds to wait after the failed attempt number ``attempt``, counted from 0."""


class Permit(Protocol):
    """What a step may have to hold, but not while it only waits; see `petals_chat.engine.contexts.Permit`."""

    @property
    def is_held(self) -> bool:
        """Whether it was taken, and not given back yet."""

    async def take(self) -> None:
        """Hold it, as soon as it can be had."""

    def give_back(self) -> None:
        """Let others have it; it may be given back already."""


class SwarmSession:
    """The attention caches of one context, spread over a chain of servers, with room for ``max_length`` tokens.

    One step at a time. After an error, and after a step that was cancelled, it can only be closed.

    Args:
        patience: seconds that servers may wait for room. Only those that wait, however short, tell a session that is
            larger than all their room from one for which there is none now; meanwhile no other session can begin there.
    """

    def __init__(self, routing: Routing, max_length: int, patience: float = 0.0) -> None:
        self._routing = routing
        self._patience = patience
        self._servers: list[_ServerSession] = []
        self.max_length = max_length
        self.position = 0
        """Tokens that the caches hold."""

    async def step(self, hidden_states: torch.Tensor, permit: Permit | None = None) -> torch.Tensor:
        """Send hidden states through all blocks, replacing servers that fail.

        Args:
            hidden_states: [1, tokens, hidden_size], following those of the steps before.
            permit: if the caller holds it, others may have it between two attempts; if not, it is taken for the time
                in which a lost server's past is repeated elsewhere.

        Returns:
            [1, tokens, hidden_size], of the same dtype and on the same device.

        Raises:
            SwarmError, AttentionCacheFullError: after the last attempt.
            MaximumLengthExceededError: servers allow no session of ``max_length`` tokens, but one of its ``limit``.
        """
        assert self.position + hidden_states.shape[1] <= self.max_length, "the owner opens a larger session"
        step_id = _new_step_id()
        outputs = hidden_states.cpu()
        index = block = 0
        while block < self._routing.num_blocks:
            outputs = await self._step_with_retries(index, block, outputs, step_id, permit)
            block = self._servers[index].span.end
            index += 1
        self.position += hidden_states.shape[1]
        return outputs.to(hidden_states.device, hidden_states.dtype)

    async def close(self) -> None:
        """Free the servers' memory for this session."""
        servers, self._servers = self._servers, []
        await asyncio.gather(*(server.close() for server in servers))

    async def _step_with_retries(
        self, index: int, block: int, inputs: torch.Tensor, step_id: str, permit: Permit | None
    ) -> torch.Tensor:
        attempt = 0
        is_lost = False
        held = permit if permit is not None and permit.is_held else None
        refusals: dict[PeerID, _Refusal] = {}
        while True:
            try:
                if is_lost or index == len(self._servers):
                    await self._replace_servers(index, block, refusals, permit)
                return await self._servers[index].step(inputs, step_id, self._servers[index + 1 :])
            except _ServerRefused as error:
                # Not a failure of the server: nobody else has to avoid it, and waiting here would not help.
                refusals[error.span.peer_id] = error.refusal
                self._routing.note_full(error.span)
            except (AttentionCacheFullError, MaximumLengthExceededError):
                raise
            except Exception as error:
                attempt += 1
                if attempt >= self._routing.max_attempts:
                    raise _translate(error) from error
                delay = self._routing.retry_delay(attempt - 1)
                logger.debug("a step failed, trying again in %g s", delay, exc_info=True)
                if held:
                    held.give_back()
                await asyncio.sleep(delay)
                if held:
                    await held.take()
            is_lost = True

    async def _replace_servers(
        self, index: int, block: int, refusals: Mapping[PeerID, _Refusal], permit: Permit | None
    ) -> None:
        """Put a new chain in the place of server ``index``, which begins with ``block``, and repeat its past there.

        Raises:
            AttentionCacheFullError, MaximumLengthExceededError: the best chain still has a server with one of the
                ``refusals``, of which this is the first.
        """
        replaced = self._servers[index : index + 1]
        end = replaced[0].span.end if replaced else self._routing.num_blocks
        for server in replaced:
            await server.close()
        spans = await self._routing.find_servers(block, end, self.max_length)
        for refusal in (refusals[span.peer_id] for span in spans if span.peer_id in refusals):
            raise refusal
        schema = await self._routing.tensor_schema(spans[0])
        servers = [
            _ServerSession(self._routing, span, schema, self.max_length, self._patience) for span in spans
        ]
        try:
            for past in _joined(replaced[0].past_inputs if replaced else []):
                outputs, step_id = past, _new_step_id()
                async with _holding(permit):
                    for number, server in enumerate(servers):
                        outputs = await server.step(outputs, step_id, servers[number + 1 :])
        except BaseException:
            for server in servers:
                await server.close()
            raise
        self._servers[index : index + 1] = servers


class _ServerSession:
    """One server's part of a session: a stream of requests and answers, opened with the first step."""

    def __init__(
        self, routing: Routing, span: RemoteSpanInfo, schema: Any, max_length: int, patience: float
    ) -> None:
        self.span = span
        self.past_inputs: list[torch.Tensor] = []
        """Inputs of all steps done, for the case that the server is lost; a list, since joining costs a copy."""
        self._routing = routing
        self._uids = routing.uids(span)
        self._session_id = str(uuid.uuid4())
        self._max_length, self._patience = max_length, patience
        self._stream: _Stream | None = None
        self._longest_answer = MESSAGE_BYTES
        """Bytes, of the one that may be on its way."""
        hidden_schema, *_ = schema
        self._dtype, self._compression = hidden_schema.dtype, hidden_schema.compression
        # Petals' servers take prompts and hypothesis ids beside hidden states; the dummies stand for none.
        self._other_tensors = [
            tensors.serialize(dummy, CompressionType.NONE) for dummy in (DUMMY, DUMMY_INT64)
        ]
        _, structure = pack_args_kwargs(torch.empty(0), DUMMY, DUMMY_INT64)
        # As a part of something larger, each tuple in it costs as much as all the rest.
        self._structure = MSGPackSerializer._encode_ext_types(structure)
        self._answer_limit = WaitLimit(routing.request_timeout)

    async def step(
        self, inputs: torch.Tensor, step_id: str, followers: Sequence[_ServerSession]
    ) -> torch.Tensor:
        """Inputs [1, tokens, hidden_size] to outputs of the same shape.

        ``followers`` that have begun get the outputs from this server directly, at the same time. A failure is
        noted, so that the next choice of servers avoids this one.
        """
        try:
            outputs = await self._step(inputs, step_id, followers)
        except Exception as error:
            if refusal := refusal_in(error, self._max_length):
                raise _ServerRefused(self.span, refusal) from error
            self._routing.note_failure(self.span)
            raise
        self._routing.note_success(self.span)
        self.past_inputs.append(inputs)
        return outputs

    async def _step(
        self, inputs: torch.Tensor, step_id: str, followers: Sequence[_ServerSession]
    ) -> torch.Tensor:
        metadata: dict[str, Any] = {
            "session_id": self._session_id,
            "step_id": step_id,
            "args_structure": self._structure,
        }
        if self._stream is None:
            metadata = {**self._routing.request_metadata(self.span, self._uids), **metadata}
            metadata["max_length"] = self._max_length
            metadata["alloc_timeout"] = self._patience
            self._stream = await self._connect()
        elif next_servers := list(itertools.takewhile(_ServerSession._has_begun, followers)):
            metadata["next_servers"] = [server._address() for server in next_servers]
        hidden = tensors.serialize(inputs.to(self._dtype), self._compression)
        with self._answer_limit:
            await self._stream.send(
                runtime_pb2.ExpertRequest(
                    uid=self._uids,
                    tensors=[hidden, *self._other_tensors],
                    metadata=MSGPackSerializer.dumps(metadata),
                )
            )
            self._longest_answer = MESSAGE_BYTES + 2 * inputs.numel() * WIDEST_NUMBER_BYTES
            response = await self._stream.receive(self._longest_answer)
        outputs = tensors.deserialize(response.tensors[0])
        if outputs.shape != inputs.shape:
            raise ValueError(f"the server answered {tuple(inputs.shape)} with {tuple(outputs.shape)}")
        if not math.isfinite(outputs.sum(dtype=torch.float32).item()):
            raise ValueError("the server answered with something that is no number")
        return outputs

    async def _connect(self) -> _Stream:
        try:
            async with asyncio.timeout(self._routing.connect_timeout):
                return await _Stream.open(self._routing.p2p, self.span.peer_id)
        except Exception as error:
            raise _ServerUnreachable(self.span) from error

    async def close(self) -> None:
        """Tell the server that the session is over, and wait until it has freed its memory."""
        self._answer_limit.close()
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await stream.send(runtime_pb2.ExpertRequest())  # Petals' sign for the end
                while True:
                    await stream.receive(self._longest_answer)
        except Exception:  # the server has closed the stream, or is not there any more
            stream.close()
        except BaseException:
            stream.close()
            raise

    def _has_begun(self) -> bool:
        return self._stream is not None

    def _address(self) -> tuple[str, str, int, int]:
        return self.span.peer_id.to_base58(), self._session_id, self.span.start, self.span.end


class _ServerUnreachable(Exception):
    """A server is announced in the swarm, but no connection to it can be made."""

    def __init__(self, span: RemoteSpanInfo) -> None:
        super().__init__(f"server {span.peer_id} cannot be reached")
        self.span = span


class _ServerRefused(Exception):
    """A server does not take this session."""

    def __init__(self, span: RemoteSpanInfo, refusal: _Refusal) -> None:
        super().__init__(f"server {span.peer_id} takes no such session")
        self.span = span
        self.refusal = refusal


class _Stream:
    """A bidirectional stream to a server's ``rpc_inference``, as hivemind frames it.

    hivemind's own iterator over responses waits for the request after the one that broke off before it reports
    a lost connection; here a lost connection ends the waiting at once.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, p2p: P2P, peer_id: PeerID) -> _Stream:
        """Connect to the server."""
        name = TransformerConnectionHandler._get_handle_name(None, "rpc_inference")
        _, reader, writer = await p2p.call_binary_stream_handler(peer_id, name)
        return cls(reader, writer)

    async def send(self, request: runtime_pb2.ExpertRequest) -> None:
        """Send one message."""
        body = request.SerializeToString()
        length = len(body).to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER)
        self._writer.write(b"".join((P2P.MESSAGE_MARKER, length, body)))
        await self._writer.drain()

    async def receive(self, max_bytes: int) -> runtime_pb2.ExpertResponse:
        """The next message.

        Raises:
            P2PHandlerError: the server reports an error instead.
            ValueError: it is longer than ``max_bytes``, or no message at all.
            asyncio.IncompleteReadError: the stream has ended.
        """
        marker = await self._reader.readexactly(1)
        length = int.from_bytes(await self._reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
        if length > max_bytes:
            raise ValueError(f"the server answers with {length} bytes, where at most {max_bytes} make sense")
        body = await self._reader.readexactly(length)
        if marker == P2P.ERROR_MARKER:
            raise P2PHandlerError(RPCError.FromString(body).message)
        if marker != P2P.MESSAGE_MARKER:
            raise ValueError("the server answers with something that is no message")
        return runtime_pb2.ExpertResponse.FromString(body)

    def close(self) -> None:
        """Close it without waiting for anything."""
        self._writer.close()


def _new_step_id() -> str:
    """What servers know a step by when it reaches them twice: from the client and from the server before."""
    return str(next(_step_numbers))


@asynccontextmanager
async def _holding(permit: Permit | None) -> AsyncIterator[None]:
    """Hold the permit, if there is one and it is not held already."""
    if permit is None or permit.is_held:
        yield
        return
    await permit.take()
    try:
        yield
    finally:
        permit.give_back()


def _joined(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The pieces [1, tokens, hidden_size] as few ones of at most `REPLAY_TOKENS` tokens."""
    return list(torch.split(torch.cat(list(pieces), dim=1), REPLAY_TOKENS, dim=1)) if pieces else []


def refusal_in(error: Exception, max_length: int) -> _Refusal | None:
    """Why a server does not take a session of ``max_length`` tokens. Errors of servers arrive as text only."""
    if not isinstance(error, P2PHandlerError):
        return None
    text = str(error)
    if too_long := re.search(r"Cannot allocate KV cache for \d+ tokens, max = (\d{1,9})\b", text):
        return _too_long(int(too_long[1]))
    if too_large := re.search(
        r"Could not allocate (\d{1,18}) bytes, max cache size = (\d{1,18}) bytes", text
    ):
        wanted, size = map(int, too_large.groups())
        if wanted > size:
            return _too_long(max_length * size // wanted)
    if any(sign in text for sign in ("AllocationFailed", "Could not allocate", "attention cache is full")):
        return AttentionCacheFullError()
    return None


def _too_long(limit: int) -> MaximumLengthExceededError:
    return MaximumLengthExceededError(
        f"the machines of the swarm allow {limit} tokens in one context. Send less text, begin a new session, or "
        "serve the model on machines with more room",
        limit=limit,
    )


def _translate(error: Exception) -> MissingBlocksError | SwarmUnreachableError:
    """Errors of Petals in terms of our own."""
    if isinstance(error, MissingBlocksError | SwarmUnreachableError):
        return error
    if isinstance(error, _ServerUnreachable):  # the others that hold its blocks were tried before it
        return MissingBlocksError(list(range(error.span.start, error.span.end)))
    if isinstance(error, PetalsMissingBlocksError):
        return MissingBlocksError(_block_numbers(str(error)))
    reason = "it did not answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    return SwarmUnreachableError(f"a server of the swarm failed: {reason}")


def _block_numbers(message: str) -> list[int]:
    """The blocks in "No servers holding blocks [1, 2] are online ..." or "... blocks 3 are online ..."."""
    listed = re.search(r"holding blocks (\[[\d, ]*\]|\d+)", message)
    return [int(number) for number in re.findall(r"\d+", listed.group(1))] if listed else []
