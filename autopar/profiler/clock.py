"""How long calls take on a device.

Every time is the best of several, since what else the machine does only ever adds to it. Where the
ranks of a host have more threads than it has cores, the best would be one that had a core for
itself, which a step has in turns: there, what counts is processor time, times the threads per core.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]

# matrix products of this side keep a GPU busy while calls are queued behind them
_BUSY_SIDE = 2048


def seconds_of(
    call: Call, device: torch.device, budget: float = 0.1, *, queued: bool = False
) -> float:
    """Seconds of one call: the best of at least three batches of calls.

    Args:
        budget: seconds to spend, after one call to warm up.
        queued: on a GPU, what its kernels take when they are launched ahead; otherwise a call does
            not take less than launching it.
    """
    once = _batch_seconds(call, device, 1)
    once = min(once, _batch_seconds(call, device, 1))
    # a batch is long against the clock's resolution
    count = max(1, min(100, int(2e-4 / max(once, 1e-7))))
    ahead = 0.0
    if queued and device.type == "cuda":
        begin = time.perf_counter()
        call()
        ahead = 2 * count * (time.perf_counter() - begin)
    batches = max(3, min(30, int(budget / max(count * once + ahead, 1e-6))))
    return min(_batch_seconds(call, device, count, ahead) for _ in range(batches))


def _batch_seconds(call: Call, device: torch.device, count: int, ahead: float = 0.0) -> float:
    """Seconds per call; the device is busy for `ahead` seconds before it gets to the first."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        if ahead:
            _keep_busy(device, ahead)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count
    crowd = _threads_per_core()
    clock = time.process_time if crowd > 1 else time.perf_counter
    begin = clock()
    for _ in range(count):
        call()
    taken = (clock() - begin) / count
    return taken * crowd / torch.get_num_threads() if crowd > 1 else taken


def _threads_per_core() -> float:
    """Of all ranks on this host, as the launcher says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ranks * torch.get_num_threads() / (cores or 1)


def _keep_busy(device: torch.device, seconds: float) -> None:
    x, took = _product(device)
    for _ in range(1 + math.ceil(seconds / took)):
        torch.mm(x, x, out=x)


@functools.cache
def _product(device: torch.device) -> tuple[torch.Tensor, float]:
    """A matrix, and the seconds that its square takes."""
    x = torch.zeros(_BUSY_SIDE, _BUSY_SIDE, device=device)
    return x, _batch_seconds(lambda: torch.mm(x, x), device, 10)
