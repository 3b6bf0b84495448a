"""The memory of a host's attention caches.

Petals' handlers, which are processes of their own, say through a pipe what they allocate and free, and Petals reads it
with the next step of any session. Where many sessions end and no step follows, the pipe fills; then the handlers wait
for ever, and so does everybody who wants a step. Here a thread reads it at once.

Source, Petals 2.2.0: ``petals/server/memory_cache.py``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from petals.server.memory_cache import MemoryCache

logger = logging.getLogger(__name__)

END_CHECK_SECONDS = 1.0


class AttentionCaches(MemoryCache):  # type: ignore[misc]
    """Petals' own, which can be read by a thread besides the one that computes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reading = threading.Lock()
        self._is_closed = threading.Event()

    def start_reading(self) -> None:
        """Begin to take in what handlers allocate and free, in the process that computes, until `stop_reading`."""
        threading.Thread(target=self._read, name="attention caches", daemon=True).start()

    def stop_reading(self) -> None:
        """Let the thread end, within a second or so."""
        self._is_closed.set()

    @contextlib.contextmanager
    def use_cache(self, *handles: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """The tensors of ``handles``. Raises `KeyError` if one of them is not, or no longer, allocated."""
        with self._reading, torch.inference_mode(), super().use_cache(*handles) as tensors:
            pass
        yield tensors

    def _read(self) -> None:
        while not self._is_closed.is_set():
            if self._pipe_recv.poll(END_CHECK_SECONDS):
                try:
                    with self.use_cache():
                        pass
                except Exception:  # no memory; the session's first step will say that its caches are missing
                    logger.warning("caches for a session could not be allocated", exc_info=True)
