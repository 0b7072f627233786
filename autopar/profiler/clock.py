"""Times of calls on a device.

Every time is the best of several, because other work on the machine only ever adds to it. If the
ranks of a host have more threads than it has cores, the best wall-clock time would be that of a
rank with a core for itself, and in a step they take turns. So there it is processor time, times the
threads per core.
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

# side of the matrix products that keep a GPU busy while calls are queued
_BUSY_SIDE = 2048


def seconds_of(
    call: Call, device: torch.device, budget: float = 0.1, *, queued: bool = False
) -> float:
    """Seconds of one call: the best of at least three batches of calls.

    Args:
        budget: seconds to spend, after one call to warm up.
        queued: on a GPU, time kernels that wait in a queue behind other work, which hides their
            launches. Otherwise a call takes at least its launch.
    """
    once = _batch_seconds(call, device, 1)
    once = min(once, _batch_seconds(call, device, 1))
    # long compared with the clock's resolution
    count = max(1, min(100, int(2e-4 / max(once, 1e-7))))
    ahead = 0.0
    if queued and device.type == "cuda":
        begin = time.perf_counter()
        call()
        ahead = 2 * count * (time.perf_counter() - begin)
    batches = max(3, min(30, int(budget / max(count * once + ahead, 1e-6))))
    return min(_batch_seconds(call, device, count, ahead) for _ in range(batches))


def _batch_seconds(call: Call, device: torch.device, count: int, ahead: float = 0.0) -> float:
    """Seconds per call. The device is busy for `ahead` seconds before the first call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        if ahead:
            x, product_seconds = _product(device)
            for _ in range(1 + math.ceil(ahead / product_seconds)):
                torch.mm(x, x, out=x)
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
    elapsed = (clock() - begin) / count
    return elapsed * crowd / torch.get_num_threads() if crowd > 1 else elapsed


def _threads_per_core() -> float:
    """Threads of all ranks on this host, as the launcher says, per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ranks * torch.get_num_threads() / (cores or 1)


@functools.cache
def _product(device: torch.device) -> tuple[torch.Tensor, float]:
    """A matrix, and the seconds of a product with itself."""
    x = torch.zeros(_BUSY_SIDE, _BUSY_SIDE, device=device)
    return x, _batch_seconds(lambda: torch.mm(x, x), device, 10)
