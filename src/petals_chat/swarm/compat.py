"""Makes Petals 2.2.0.post1 import and run on hivemind 1.1.12 and transformers 5, which it does not know.

`install` must be called before anything of ``petals`` or ``hivemind`` is imported. Every override says what
it replaces, why, and for which versions. What a host changes in Petals' server is in
`petals_chat.swarm.backend`.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import traceback
import warnings
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor as reduce_shared_tensor

from petals_chat.errors import ConfigurationError

PETALS_VERSION = "2.2.0.post1"

BARE_PACKAGES = (
    "hivemind",
    "hivemind.moe",
    "hivemind.moe.client",
    "hivemind.moe.server",
    "petals",
    "petals.client",
    "petals.utils",
    "tensor_parallel",
)
"""Packages of which only submodules are used. Their ``__init__.py`` is not run."""

PACKAGE_NAMES = {
    "hivemind.compression": (
        "deserialize_tensor_stream",
        "deserialize_torch_tensor",
        "serialize_torch_tensor",
    ),
    "hivemind.dht": ("DHT",),
    "hivemind.p2p": ("P2P", "P2PContext", "PeerID"),
    "hivemind.utils": (
        "MAX_DHT_TIME_DISCREPANCY_SECONDS",
        "MSGPackSerializer",
        "TensorDescriptor",
        "TimedStorage",
        "get_dht_time",
        "get_logger",
        "nested_flatten",
        "nested_pack",
    ),
    "hivemind.utils.asyncio": ("anext",),
    "hivemind.utils.nested": ("nested_compare",),
    "hivemind.utils.tensor_descr": ("BatchTensorDescriptor",),
    "tensor_parallel.tensor_parallel": ("TensorParallel",),
}
"""What Petals expects on the bare packages themselves, by the module that has it."""

LIBRARIES = ("hivemind", "petals", "tensor_parallel")

MAX_LINE_CHARS = 500
SLOWEST_RPS = 1e-9

_installed = False


def install() -> None:
    """Prepare this process for ``import petals``; a second call does nothing.

    Raises:
        ConfigurationError: Petals is not installed, or in a version that was not tested.
    """
    global _installed
    if _installed:
        return
    _require_petals()
    # hivemind's default, "file_system", runs torch_shm_manager, a process of 80 MB.
    os.environ["HIVEMIND_MEMORY_SHARING_STRATEGY"] = "file_descriptor"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the libraries, at import
        _make_bare_packages()
        _restore_get_file_from_repo()
        _replace_cancel_task_if_running()
        _pickle_tensors_by_value()
        _refuse_records_that_stop_readers()
        importlib.import_module("petals.server.handler")  # common to clients and servers
    _route_logs()
    _installed = True


def log_to_stderr(*, debug: bool) -> None:
    """Print what the swarm's libraries log: warnings, each on a line, or everything.

    Without it, `install` leaves their warnings to the root logger as it is.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT) if debug else CalmFormatter())
    if not debug:
        handler.addFilter(_is_news)
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.WARNING)


def _is_news(record: logging.LogRecord) -> bool:
    """All but sessions that find no room, or want too much: that is ordinary, and clients are told."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__name__ != "AllocationFailed" and "Cannot allocate KV cache" not in str(error)


class CalmFormatter(logging.Formatter):
    """One line for each record, with the name and the sentence of an exception, but no traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = f"{record.levelname.lower()}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1]:
            line += " " + traceback.format_exception_only(record.exc_info[1])[-1]
        # There may be words of strangers in it.
        line = "".join(character if character.isprintable() else " " for character in line.strip())
        return line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 1] + "…"


def _require_petals() -> None:
    advice = f"Install it with: pip install --no-deps petals=={PETALS_VERSION}"
    try:
        version = importlib.metadata.version("petals")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigurationError(f"petals: the package is not installed. {advice}") from None
    if version != PETALS_VERSION:
        raise ConfigurationError(
            f"petals: version {version} is installed, which Petals Chat does not know. {advice}"
        )


def _make_bare_packages() -> None:
    """Import packages without their ``__init__.py``, and put on them the names that Petals takes from them.

    petals 2.2.0 asserts 4.32 <= transformers < 4.35 there and imports its models for it; hivemind 1.1.12 no
    longer has the names (its pull request 663 dropped star imports), but imports its training code and scipy;
    tensor_parallel 1.0.23 imports all of transformers' model code. This costs a second and 110 MB.
    """
    for name in BARE_PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is not installed"
        package = importlib.util.module_from_spec(spec)
        sys.modules[name] = package
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, package)
    for module, names in PACKAGE_NAMES.items():
        package = sys.modules[module.split(".")[0]]
        for name in names:
            setattr(package, name, getattr(importlib.import_module(module), name))
    sys.modules["petals"].__version__ = PETALS_VERSION  # type: ignore[attr-defined]
    # As petals/__init__.py does: swarms send bfloat16 as bfloat16, not as float32.
    importlib.import_module("hivemind.compression.base").USE_LEGACY_BFLOAT16 = False  # type: ignore[attr-defined]


def _restore_get_file_from_repo() -> None:
    """transformers 4.57 removed it; petals.server.from_pretrained imports it, for a loader nobody uses."""
    utils = importlib.import_module("transformers.utils")
    utils.get_file_from_repo = utils.cached_file  # type: ignore[attr-defined]


def _replace_cancel_task_if_running() -> None:
    """hivemind 1.1.12 asks for the current thread's event loop, although the task may belong to another one.

    A P2P object that is garbage-collected outside its loop then raises in its destructor and leaves its
    daemon and its sockets behind.
    """

    def cancel_task_if_running(task: asyncio.Task[Any] | None) -> None:
        if task is not None and not task.done() and task.get_loop().is_running():
            task.get_loop().call_soon_threadsafe(task.cancel)

    for name in (
        "hivemind.utils.asyncio",
        "hivemind.p2p.p2p_daemon",
        "hivemind.p2p.p2p_daemon_bindings.control",
    ):
        module = importlib.import_module(name)
        module.cancel_task_if_running = cancel_task_if_running  # type: ignore[attr-defined]


def _pickle_tensors_by_value() -> None:
    """torch sends a tensor to another process as a name of shared memory, which costs more than its content.

    Petals and hivemind send hidden states of one or a few tokens, and state bytes of futures that they never
    share: each is written once and read once.
    """

    def reduce_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
        if tensor.device.type != "cpu":
            return reduce_shared_tensor(tensor)  # type: ignore[no-any-return, no-untyped-call]
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return _rebuild_tensor, (content, tensor.dtype, tensor.shape, tensor.requires_grad)

    ForkingPickler.register(torch.Tensor, reduce_tensor)


def _refuse_records_that_stop_readers() -> None:
    """Anybody can write into the DHT. Petals 2.2.0 skips what raises ValueError, and stops at other errors."""
    peer_id = importlib.import_module("hivemind.p2p").PeerID
    server_info = importlib.import_module("petals.data_structures").ServerInfo
    from_base58, from_tuple = peer_id.from_base58, server_info.from_tuple

    def from_base58_text(text: Any) -> Any:
        if not isinstance(text, str):
            raise ValueError("a peer id is a text")
        return from_base58(text)

    def from_sane_tuple(source: Any) -> Any:
        info = from_tuple(source)
        if info.inference_rps is not None and info.inference_rps < SLOWEST_RPS:
            raise ValueError("inference_rps, by which clients divide, is zero or next to it")
        return info

    peer_id.from_base58, server_info.from_tuple = from_base58_text, from_sane_tuple


def _rebuild_tensor(
    content: bytes, dtype: torch.dtype, shape: torch.Size, requires_grad: bool
) -> torch.Tensor:
    values = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return values.view(shape).requires_grad_(requires_grad)


def _route_logs() -> None:
    """Take hivemind's handler off the root logger, where Petals puts it, and let only warnings through."""
    importlib.import_module("hivemind.utils.logging").use_hivemind_log_handler("nowhere")
    logging.getLogger().setLevel(logging.WARNING)  # which hivemind has reset
    logging.addLevelName(logging.WARNING, "WARNING")  # hivemind renames it for the whole process
    # transformers 5 has advice for the authors of released models' config.json, Phi-3's for example.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # hivemind cancels tasks that nobody awaits; asyncio reports each when it is collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
