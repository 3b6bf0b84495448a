"""The processes that hivemind and Petals fork, tied to the process that forked them.

hivemind's DHT process starts p2pd, the libp2p daemon; Petals starts connection handlers. As they come, they
outlive a parent that is killed, and keep its port.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, AsyncIterator, NoReturn  # noqa: UP035 - hivemind knows typing's only

import psutil
from hivemind.dht import DHT
from hivemind.p2p import P2PContext
from hivemind.proto import runtime_pb2
from petals.server.handler import TransformerConnectionHandler

from petals_chat.swarm.activity import Activity
from petals_chat.swarm.processes import descendants, kill

WATCH_PERIOD_SECONDS = 1.0
HANDLER_STOP_TIMEOUT_SECONDS = 1.0
"""How long a connection handler may take to end its sessions in order."""


class TiedDHT(DHT):  # type: ignore[misc]
    """hivemind's DHT process. It ends with its parent, and when its p2pd has ended.

    Args:
        own_group: put it and p2pd into a process group of their own, so that a terminal's Ctrl-C, which goes
            to all of the foreground group, leaves it to the parent to end them in order.
    """

    def __init__(self, *args: Any, own_group: bool, **kwargs: Any) -> None:
        self._own_group = own_group
        self._p2pd: list[psutil.Process] = []
        super().__init__(*args, **kwargs)

    def run(self) -> None:
        """The process's main function."""
        if self._own_group:
            os.setpgrp()
        _tie_to_parent(is_broken=self._has_lost_p2pd)
        super().run()

    def _has_lost_p2pd(self) -> bool:
        if not hasattr(self, "_node"):
            return False
        if not self._p2pd:  # looking at all processes of the machine costs milliseconds
            self._p2pd = descendants()
        return not any(process.is_running() for process in self._p2pd)


class TiedHandler(TransformerConnectionHandler):  # type: ignore[misc]
    """Petals' process for requests of clients. It ends with its parent, which reads in ``activity`` what it does."""

    def __init__(self, *args: Any, activity: Activity, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shutdown_timeout = HANDLER_STOP_TIMEOUT_SECONDS
        self._activity = activity

    def run(self) -> None:
        """The process's main function."""
        _tie_to_parent(is_broken=lambda: False)
        super().run()

    def terminate(self) -> None:
        """End it the hard way; it ignores the signal that would be sent otherwise."""
        self.kill()

    # hivemind reads from the annotations what it sends and receives.
    async def rpc_inference(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """One inference session: Petals' own, counted."""
        async for response in self._activity.count(super().rpc_inference(requests, context)):
            yield response


# hivemind names remote calls after the class; clients call those of Petals.
TiedHandler.__name__ = TransformerConnectionHandler.__name__


def _tie_to_parent(is_broken: Callable[[], bool]) -> None:
    # The parent alone decides when its processes end; signals to the whole group are meant for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(os.getppid(), is_broken), daemon=True).start()


def _watch(parent: int, is_broken: Callable[[], bool]) -> NoReturn:
    while os.getppid() == parent and not is_broken():
        time.sleep(WATCH_PERIOD_SECONDS)
    kill(descendants())
    os._exit(1)
