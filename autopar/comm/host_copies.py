"""Copies between a device's memory and the host's, overlapped with compute.

On a GPU they run on a stream of their own, to and from pinned memory; compute waits for them where
a graph says so. A CPU's memory is the host's: there, a copy stands for the host's, so that all but
the streams is the same.
"""

from __future__ import annotations

import functools

import torch
from torch.utils.weak import WeakIdKeyDictionary

from autopar.comm.operators import operator

# The copies that run, by the storage that they write to.
_RUNNING = WeakIdKeyDictionary()


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Start a copy between the device and the host, behind what the device computes now; `wait` for
    it before the target is read, and before the source is freed."""
    on_device = target if target.is_cuda else source
    if not on_device.is_cuda:
        target.copy_(source)
        return
    index = on_device.device.index
    side = _stream(index)
    side.wait_stream(torch.cuda.current_stream(index))
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
        _RUNNING[target.untyped_storage()] = side.record_event()


def wait(target: torch.Tensor) -> None:
    """What the device computes from here on comes after a copy to the target."""
    event = _RUNNING.pop(target.untyped_storage(), None)
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def _empty(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)


@operator(lambda x: _empty(x, "cpu"))
def offload(x: torch.Tensor) -> torch.Tensor:
    """Start to copy a tensor to the host; only `reload` may read the result."""
    flat = torch.empty(x.numel(), dtype=x.dtype, pin_memory=x.is_cuda)
    host = flat.as_strided(x.size(), x.stride())
    copy(host, x)
    return host


# The finishes are declared as mutations, although they change nothing, so that they stay in their
# place among the readers.


@operator(lambda x, host: None, mutates=("x",))
def finish_offload(x: torch.Tensor, host: torch.Tensor) -> None:
    """x, which was copied to the host, may be freed."""
    wait(host)


@operator(_empty)
def reload(host: torch.Tensor, device: str) -> torch.Tensor:
    """Start to copy back; nothing may read the result before `finish_reload`."""
    x = _empty(host, device)
    copy(x, host)
    return x


@operator(lambda x: None, mutates=("x",))
def finish_reload(x: torch.Tensor) -> None:
    """x, which was copied to the device, may be read."""
    wait(x)


# The result is on the host, also where that is a CPU's own memory.
HOST = torch.ops.autopar.offload.default
