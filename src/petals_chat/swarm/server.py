"""Petals' server, set up the way a host wants it.

Knows which options of Petals fit a private swarm, the public one, a CPU and a GPU; `petals_chat.swarm.host`
knows when to start and stop it. Importing this module takes seconds: it imports Petals.
"""

from __future__ import annotations

import functools
import gc
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import petals.server.server as petals_server
import torch
from google.protobuf.message import DecodeError
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from petals.constants import PUBLIC_INITIAL_PEERS
from petals.data_structures import RemoteModuleInfo, ServerState
from petals.utils.convert_block import QuantType
from petals.utils.dht import get_remote_module_infos

from petals_chat.errors import ConfigurationError, SwarmUnreachableError
from petals_chat.head.cpus import usable_threads
from petals_chat.head.precision import resolve_dtype
from petals_chat.models.checkpoint import Checkpoint
from petals_chat.swarm.activity import Activity
from petals_chat.swarm.backend import install_backend
from petals_chat.swarm.families import Family, register
from petals_chat.swarm.host_options import HostLoad, HostOptions, HostReady, Quantization, Relay
from petals_chat.swarm.living import living_servers
from petals_chat.swarm.naming import default_dht_prefix
from petals_chat.swarm.record import SwarmRecord, publish_record
from petals_chat.swarm.tied import TiedDHT, TiedHandler

logger = logging.getLogger(__name__)

THROUGHPUT_UNMEASURED = 1.0
"""Tokens per second that a host of a private swarm announces; where it differs, block choice differs."""
UPDATE_PERIOD_SECONDS = 30.0
"""Between two announcements; they are valid twice as long."""
SMALL_HIDDEN_SIZE = 512
"""Blocks of such models are computed by one thread, unless the options say otherwise."""
SESSION_TIMEOUT_SECONDS = 24 * 3600.0
"""Of a whole session. One that is not used ends after Petals' ``step_timeout``, 5 minutes."""
HEALTH_CHECK_SECONDS = 5.0
BALANCE_CHECK_SECONDS = 60.0
"""Mean time between two looks whether the swarm needs other blocks more than those that are served."""
CHOICE_DELAY_SECONDS = 1.0
"""Mean delay before blocks are chosen, so that hosts which start together see each other's choice."""
LARGEST_STEP_TOKENS = 8192
LONGEST_WAIT_FOR_ROOM_SECONDS = 1.0
P2PD_START_TIMEOUT_SECONDS = 60.0
RUNTIME_STOP_TIMEOUT_SECONDS = 0.5
"""Petals' runtime waits for ever for a step that a handler has announced but did not live to hand over."""


class Stopped(Exception):
    """The server was asked to stop while it was starting."""


class BlockServer:
    """Serves the blocks of one checkpoint to a swarm.

    Forks processes: one for the DHT in the constructor, those for connections when it runs.

    Args:
        options: with the model, the size of the caches, and either the blocks or their number.

    Raises:
        ConfigurationError: the blocks do not fit, or cannot be listened for.
        SwarmUnreachableError: none of the initial peers answers.
    """

    def __init__(
        self, options: HostOptions, checkpoint: Checkpoint, family: Family, device: torch.device
    ) -> None:
        assert options.model is not None
        assert options.cache_tokens is not None
        self._stop = threading.Event()
        self._activity = Activity()
        self._blocks_begun = 0
        self._options, self._checkpoint = options, checkpoint
        dtype = block_dtype(options, checkpoint, device)
        torch.set_num_threads(options.threads or (1 if _is_small(checkpoint) else usable_threads()))
        if options.identity:
            prepare_identity(options.identity)
        register(family)
        # int8 looks for outliers among all tokens that it gets at once: a session's would change another's.
        shares_turns = options.quantization is not Quantization.INT8
        install_backend(checkpoint, self._before_block, shares_turns=shares_turns)
        public = options.initial_peers == "public"
        petals_server.DHT = functools.partial(TiedDHT, own_group=not options.exit_with_stdin)
        petals_server.TransformerConnectionHandler = functools.partial(TiedHandler, activity=self._activity)
        if not public:
            petals_server.ReachabilityProtocol = _NoReachabilityProtocol
            petals_server.get_remote_module_infos = self._living_servers  # by which it chooses blocks
        # What is loaded by now is never collected: forked processes go on sharing its memory.
        gc.collect()
        gc.freeze()
        try:
            self._server = _Server(
                converted_model_name_or_path=options.model,
                revision=options.revision,
                dht_prefix=options.dht_prefix or default_dht_prefix(checkpoint.model_type, options.model),
                public_name=options.name,
                identity_path=str(options.identity) if options.identity else None,
                host_maddrs=[options.listen_address],
                device=device,
                torch_dtype=str(dtype).removeprefix("torch."),
                quant_type=QuantType[options.quantization.name],
                adapters=options.adapters,
                attn_cache_tokens=options.cache_tokens,
                inference_max_length=min(options.max_session_length, options.cache_tokens),
                # Who waits for room makes the host full for all others.
                max_alloc_timeout=LONGEST_WAIT_FOR_ROOM_SECONDS,
                max_batch_size=max(options.max_session_length, LARGEST_STEP_TOKENS),
                session_timeout=SESSION_TIMEOUT_SECONDS,
                startup_timeout=P2PD_START_TIMEOUT_SECONDS,
                # One process serialises for a CPU without being the narrow place.
                num_handlers=4 if device.type == "cuda" else 1,
                # A turn is chosen when the one before is done, not while it is computed.
                prefetch_batches=0,
                **_block_options(options, checkpoint.num_blocks),
                **(_public_swarm_options() if public else _private_swarm_options(options))
                | _address_options(options),
            )
        except P2PDaemonError as error:
            raise _unreachable_or_not_listening(error, options) from error
        except AssertionError as error:  # Petals reports a GPU that is too small this way
            raise ConfigurationError(f"the blocks cannot be served: {error}") from error

    @property
    def description(self) -> str:
        """What is loaded, for people."""
        blocks = self._server.strict_block_indices
        what = f"blocks {blocks.start}:{blocks.stop}" if blocks else f"{self._server.num_blocks} blocks"
        server_info = self._server.server_info
        quantized = "" if server_info.quant_type == "none" else f", quantised to {server_info.quant_type}"
        where = self._server.device.type.upper()
        return f"{what} of {self._options.model} ({server_info.torch_dtype} on {where}{quantized})"

    @property
    def ready(self) -> HostReady:
        """Where and what this host serves, once it does."""
        server_info = self._server.server_info
        return HostReady(
            peers=tuple(str(address) for address in self._server.dht.get_visible_maddrs(latest=True)),
            dht_prefix=self._server.dht_prefix,
            start=server_info.start_block,
            end=server_info.end_block,
            num_blocks=self._checkpoint.num_blocks,
            dtype=server_info.torch_dtype,
            device=self._server.device.type,
        )

    @property
    def loading(self) -> tuple[int, int] | None:
        """The number of the block that is being loaded, counted from 1, and how many there will be; None = all are."""
        container = self._server.module_container
        if container is not None and container.ready.is_set():
            return None
        return max(1, self._blocks_begun), self._server.num_blocks

    @property
    def load(self) -> HostLoad | None:
        """What the host is doing; None while it loads blocks."""
        container = self._server.module_container
        if container is None or not container.ready.is_set():
            return None
        cache = next(iter(container.module_backends.values())).memory_cache
        return HostLoad(
            start=self._server.server_info.start_block,
            end=self._server.server_info.end_block,
            num_blocks=self._checkpoint.num_blocks,
            sessions=self._activity.sessions,
            tokens=self._activity.tokens,
            cache_used=cache.current_size_bytes / max(1, cache.max_size_bytes),
        )

    def publish(self, record: SwarmRecord, valid_seconds: float) -> None:
        """Tell machines that join what the swarm serves. Waits for the swarm."""
        publish_record(self._server.dht, self._server.dht_prefix, record, valid_seconds)

    def missing_blocks(self) -> list[int]:
        """Numbers of the blocks that no host of the swarm serves. Waits for the swarm."""
        server = self._server
        ask = get_remote_module_infos if self._options.initial_peers == "public" else self._living_servers
        records = ask(server.dht, server.module_uids, latest=True)
        return [
            block
            for block, record in enumerate(records)
            if not any(info.state is ServerState.ONLINE for info in record.servers.values())
        ]

    @property
    def is_connected(self) -> bool:
        """Whether the process that talks to the swarm lives, unless it has been told to end."""
        return self._stop.is_set() or bool(self._server.dht.is_alive())

    def run(self) -> None:
        """Load the blocks and serve them until `stop`.

        Raises:
            Stopped: `stop` was called while blocks were loaded.
            ConfigurationError: the checkpoint does not hold them, or the GPU has no room for them.
        """
        try:
            self._server.run()
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                "the GPU has no room for these blocks. Serve fewer, with --num-blocks or --blocks, or "
                "smaller ones, with --quantization; or give the attention caches less room, with --cache-tokens"
            ) from error

    def stop(self) -> None:
        """Make `run` end. Called from another thread."""
        self._stop.set()
        self._server.stop.set()

    def close(self) -> None:
        """Leave the swarm, after `run` ended."""
        self._stop.set()
        self._server.shutdown(timeout=RUNTIME_STOP_TIMEOUT_SECONDS)

    def wait_until_online(self, poll_seconds: float = 0.05) -> bool:
        """Wait until clients find all blocks and get answers; False if that did not come before `stop`."""
        while not self._stop.wait(poll_seconds):
            container = self._server.module_container
            if container is not None and container.ready.is_set() and self._is_announced():
                return True
        return False

    def _is_announced(self) -> bool:
        server_info, dht = self._server.server_info, self._server.dht
        blocks = range(server_info.start_block, server_info.end_block)
        uids = [f"{self._server.dht_prefix}.{block}" for block in blocks]
        own = (record.servers.get(dht.peer_id) for record in get_remote_module_infos(dht, uids, latest=True))
        return all(info is not None and info.state is ServerState.ONLINE for info in own)

    def _living_servers(self, dht: Any, uids: Sequence[str], **options: Any) -> list[RemoteModuleInfo]:
        # Before this host serves, what is announced in its name is of its last life.
        return living_servers(dht, uids, without_self=self._server.module_container is None, **options)

    def _before_block(self) -> None:
        if self._stop.is_set():
            raise Stopped
        if self._blocks_begun == self._server.num_blocks:  # other blocks than before, or new handlers
            self._blocks_begun = 0
            self._activity.forget_sessions()
        self._blocks_begun += 1


def block_dtype(options: HostOptions, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The precision in which blocks are served; those that are quantised compute in it."""
    stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return resolve_dtype(options.dtype, device, getattr(torch, str(stored), None))


class _Server(petals_server.Server):  # type: ignore[misc]
    """Petals' own, which keeps its blocks when it cannot tell whether others are needed more."""

    def _should_choose_other_blocks(self) -> bool:
        # It fails where the host's own record is missing: after a minute without network, for example.
        try:
            return bool(super()._should_choose_other_blocks())
        except Exception as error:
            logger.warning("whether other blocks are needed more is not known: %r", error)
            return False


class _NoReachabilityProtocol:
    """In place of the service that tells others whether they can be reached, which has a second p2pd."""

    @staticmethod
    def attach_to_dht(dht: Any) -> None:
        """Attach nothing."""


def _is_small(checkpoint: Checkpoint) -> bool:
    """Whether a step is over before other threads have begun to help; and while the machine is busy with something
    else, waiting for them takes many times as long as the step."""
    hidden_size = checkpoint.config.get("hidden_size")
    return isinstance(hidden_size, int) and hidden_size <= SMALL_HIDDEN_SIZE


def _block_options(options: HostOptions, num_blocks: int) -> dict[str, Any]:
    if options.blocks is None and options.num_blocks is not None and options.num_blocks < num_blocks:
        # Petals chooses those that the swarm has least of, and others later when it has less of these.
        chosen = {"num_blocks": options.num_blocks, "mean_balance_check_period": BALANCE_CHECK_SECONDS}
        if options.initial_peers != "public":
            chosen["mean_block_selection_delay"] = CHOICE_DELAY_SECONDS if options.initial_peers else 0.0
        return chosen
    start, end = options.blocks or (0, num_blocks)
    # With fixed blocks this check only sees whether the handlers live.
    return {"block_indices": f"{start}:{end}", "mean_balance_check_period": HEALTH_CHECK_SECONDS}


def _public_swarm_options() -> dict[str, Any]:
    return {"initial_peers": PUBLIC_INITIAL_PEERS, "throughput": "auto"}


def _private_swarm_options(options: HostOptions) -> dict[str, Any]:
    return {
        "initial_peers": list(options.initial_peers),
        "throughput": THROUGHPUT_UNMEASURED,
        "update_period": UPDATE_PERIOD_SECONDS,
        # Neither relays nor the router's port mapping nor a probe of reachability: hosts reach each other.
        "reachable_via_relay": False,
        "use_relay": False,
        "use_auto_relay": False,
        "nat_port_map": False,
        "auto_nat": False,
    }


def _address_options(options: HostOptions) -> dict[str, Any]:
    """How others reach this host, where that was chosen."""
    chosen: dict[str, Any] = {}
    if options.announced_address:
        chosen["announce_maddrs"] = [options.announced_address]
    if options.relay is not Relay.AUTO:
        is_relayed = options.relay is Relay.ALWAYS
        chosen |= dict.fromkeys(("reachable_via_relay", "use_relay", "use_auto_relay"), is_relayed)
    return chosen


def prepare_identity(path: Path) -> None:
    """Make the key in ``path`` if it is missing. Raises `ConfigurationError` if it cannot be used."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            P2P.generate_identity(str(path))
        PeerID.from_identity(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"--identity {path}: {error.strerror}") from None
    except (DecodeError, ValueError):
        raise ConfigurationError(
            f"--identity {path}: this is no key. Without the file, the host makes a new one"
        ) from None


def _unreachable_or_not_listening(
    error: P2PDaemonError, options: HostOptions
) -> ConfigurationError | SwarmUnreachableError:
    if "already taken" in str(error):
        return ConfigurationError(
            f"--identity {options.identity}: another host of the swarm has the same key. Give each its own"
        )
    reason = re.sub(r"^Daemon failed to start: (\S+/\S+ \S+:\S+ )?", "", str(error))
    if options.initial_peers:
        peers = "the public swarm" if options.initial_peers == "public" else ", ".join(options.initial_peers)
        return SwarmUnreachableError(f"none of the initial peers can be reached: {peers} ({reason})")
    return ConfigurationError(f"cannot listen at {options.listen_address}: {reason}")
