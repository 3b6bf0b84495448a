"""What Chromium's main thread did, by its trace: tasks in the thread's own CPU time, whatever else the machine does."""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from playwright.async_api import Browser, Page

CATEGORIES = ["__metadata", "toplevel", "devtools.timeline", "blink.user_timing", "v8"]
RUN_TASK = "ThreadControllerImpl::RunTask"
_MOST_PARTS = 4


@dataclass(frozen=True)
class Task:
    """A task of the main thread, from beginning to end.

    Args:
        begin: microseconds on the trace's clock.
        milliseconds: of the thread's CPU time.
        parts: milliseconds of CPU time for each thing done in it, without what was done within that.
    """

    begin: float
    milliseconds: float
    parts: Counter[str]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {time:.0f}" for name, time in self.parts.most_common(_MOST_PARTS))
        return f"{self.milliseconds:.0f} ms ({parts})"


class Trace:
    """The trace of a page that has called ``performance.mark(mark)``, by which its main thread is found.

    Attributes:
        tasks: in order.
        mark: when the mark was made, in microseconds on the trace's clock.
        navigation: when the page's navigation began; minus infinity if that was before the trace.
    """

    def __init__(self, trace: bytes, mark: str) -> None:
        events = json.loads(trace)["traceEvents"]
        marks = [event for event in events if event["name"] == mark and "blink.user_timing" in event["cat"]]
        last = marks[-1]
        page = last["args"]["data"]["navigationId"]
        self._events = [
            event for event in events if (event["pid"], event["tid"]) == (last["pid"], last["tid"])
        ]
        self.tasks = list(_tasks(self._events))
        self.mark = float(last["ts"])
        self.navigation = next(
            (
                float(event["ts"])
                for event in self._events
                if event["name"] == "navigationStart" and event["args"]["data"]["navigationId"] == page
            ),
            -math.inf,
        )

    def frames(self) -> Iterator[Task]:
        """What was done after each animation frame of the page, until the next one was drawn."""
        begins = sorted(event["ts"] for event in self._events if event["name"] == "FireAnimationFrame")
        for _, group in itertools.groupby(self.tasks, lambda task: bisect.bisect(begins, task.begin)):
            yield together(group)

    def count(self, name: str, begin: float, end: float) -> int:
        """How many events of this name began between two times."""
        return sum(event["name"] == name and begin <= event["ts"] < end for event in self._events)


@asynccontextmanager
async def traced(browser: Browser, page: Page) -> AsyncIterator[list[bytes]]:
    """Trace what is done in the block; the list has the trace after it."""
    found: list[bytes] = []
    await browser.start_tracing(page=page, categories=CATEGORIES)
    try:
        yield found
    finally:
        found.append(await browser.stop_tracing())


def together(tasks: Iterable[Task]) -> Task:
    """Several tasks as if they were one."""
    tasks = list(tasks)
    parts = sum((task.parts for task in tasks), Counter[str]())
    return Task(tasks[0].begin, sum(task.milliseconds for task in tasks), parts)


def _tasks(events: list[dict[str, Any]]) -> Iterator[Task]:
    """The outermost tasks, with the events within them."""
    whole = [event for event in events if event["ph"] == "X"]
    whole.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    ends = itertools.accumulate((event["ts"] + event.get("dur", 0) for event in whole), max)
    group: list[dict[str, Any]] = []
    last_end = -math.inf
    for event, end in zip(whole, ends, strict=True):
        if event["ts"] >= last_end and group:
            yield from _task(group)
            group = []
        group.append(event)
        last_end = end
    yield from _task(group)


def _task(group: list[dict[str, Any]]) -> Iterator[Task]:
    if not group or group[0]["name"] != RUN_TASK:
        return
    parts: Counter[str] = Counter()
    around: list[dict[str, Any]] = []
    for event in group:
        while around and around[-1]["ts"] + around[-1].get("dur", 0) <= event["ts"]:
            around.pop()
        time = event.get("tdur", 0) / 1000
        parts[event["name"]] += time
        if around and time:
            parts[around[-1]["name"]] -= time
        around.append(event)
    yield Task(group[0]["ts"], group[0].get("tdur", 0) / 1000, parts)
