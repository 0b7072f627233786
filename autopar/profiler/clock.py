"""How long calls take on a device.

Every time is the best of several, since what else the machine does only ever adds to it.
"""

from __future__ import annotations

import functools
import math
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
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _keep_busy(device: torch.device, seconds: float) -> None:
    x, took = _product(device)
    for _ in range(1 + math.ceil(seconds / took)):
        torch.mm(x, x, out=x)


@functools.cache
def _product(device: torch.device) -> tuple[torch.Tensor, float]:
    """A matrix, and the seconds that its square takes."""
    x = torch.zeros(_BUSY_SIDE, _BUSY_SIDE, device=device)
    return x, _batch_seconds(lambda: torch.mm(x, x), device, 10)
