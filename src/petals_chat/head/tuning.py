"""What is measured when a worker starts: how to compute the LM head fastest on this machine."""

from __future__ import annotations

import dataclasses
import time

import torch

from petals_chat.head.batcher import INLINE_SECONDS
from petals_chat.head.modules import ClientModules
from petals_chat.settings import HeadWeights

_TRIALS = 5
_WORTH_A_COPY = 0.8
"""A float32 copy of a head takes twice its memory, and shares none: it has to be faster than this share."""
_WORTH_THREADS = 0.8
"""More threads keep others from computing: they have to be faster than this share."""


def with_fastest_head(modules: ClientModules, weights: HeadWeights) -> ClientModules:
    """The modules, with a float32 copy of a 16-bit head where this computes in float32 and the copy pays.

    Converting block by block costs nothing for a large head, whose weights have to come from memory anyway; a small
    one stays in the CPU's caches, and is slowed down by it.
    """
    if modules.head.dtype is modules.dtype or weights is HeadWeights.MAPPED:
        return modules
    copied = dataclasses.replace(modules, head=modules.head.to(modules.dtype))
    if weights is HeadWeights.COPIED:
        return copied
    return copied if row_seconds(copied) < _WORTH_A_COPY * row_seconds(modules) else modules


def use_threads_that_pay(modules: ClientModules) -> None:
    """Leave torch one thread for a head so small that more threads cost more than they save."""
    threads = torch.get_num_threads()
    if threads == 1:
        return
    with_all = row_seconds(modules)
    torch.set_num_threads(1)
    with_one = row_seconds(modules)
    if with_one > INLINE_SECONDS and with_all < _WORTH_THREADS * with_one:
        torch.set_num_threads(threads)


def row_seconds(modules: ClientModules) -> float:
    """How long the head takes for one row: the shortest of some trials.

    On a CPU it is the calling thread's own time that counts: when a worker starts, other processes start beside it,
    and what they take would make several threads seem slower than one.
    """
    clock = time.thread_time if modules.head.device.type == "cpu" else time.perf_counter
    row = torch.zeros(1, modules.head.shape[1], dtype=modules.dtype, device=modules.head.device)
    seconds = []
    for _ in range(_TRIALS):
        began = clock()
        with torch.inference_mode():
            modules.logits(row).argmax().item()
        seconds.append(clock() - began)
    return min(seconds)
