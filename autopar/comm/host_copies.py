"""Copies between a device's memory and the host's, beside compute.

On a GPU they run on a stream of their own, to and from pinned memory; compute waits for them where
a graph says so. A CPU's memory is the host's: there, copies stand for the host's, so that all but
the streams is the same.
"""

from __future__ import annotations

import functools

import torch

# of the copies under way, by the address of their target: what compute is to wait for
_UNDER_WAY: dict[int, torch.cuda.Event] = {}


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def _copy(target: torch.Tensor, source: torch.Tensor, index: int) -> None:
    """Start a copy behind what the device computes now."""
    side = _stream(index)
    side.wait_stream(torch.cuda.current_stream(index))
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
        _UNDER_WAY[target.data_ptr()] = side.record_event()


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Start a copy between the device and the host; `wait` for it before the target is read, and
    before the source goes."""
    on_device = target if target.is_cuda else source
    if on_device.is_cuda:
        _copy(target, source, on_device.device.index)
    else:
        target.copy_(source)


def wait(target: torch.Tensor) -> None:
    """What the device computes from here on comes after a copy."""
    event = _UNDER_WAY.pop(target.data_ptr(), None)
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def _empty(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)


@torch.library.custom_op("autopar::to_host", mutates_args=())
def to_host(x: torch.Tensor) -> torch.Tensor:
    """Start to copy a tensor to the host; the result is not to be read, but by `to_device`."""
    flat = torch.empty(x.numel(), dtype=x.dtype, pin_memory=x.is_cuda)
    host = flat.as_strided(x.size(), x.stride())
    copy(host, x)
    return host


@to_host.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return _empty(x, "cpu")


@torch.library.custom_op("autopar::left", mutates_args=("x",))
def left(x: torch.Tensor, host: torch.Tensor) -> None:
    """What was copied to the host may go. It changes nothing; saying so keeps it in its place."""
    wait(host)


@left.register_fake
def _(x: torch.Tensor, host: torch.Tensor) -> None:
    return None


@torch.library.custom_op("autopar::to_device", mutates_args=())
def to_device(host: torch.Tensor, device: str) -> torch.Tensor:
    """Start to copy back; the result is not to be read before `arrived`."""
    x = _empty(host, device)
    copy(x, host)
    return x


@to_device.register_fake
def _(host: torch.Tensor, device: str) -> torch.Tensor:
    return _empty(host, device)


@torch.library.custom_op("autopar::arrived", mutates_args=("x",))
def arrived(x: torch.Tensor) -> None:
    """What was copied to the device may be read. As `left`, it changes nothing."""
    wait(x)


@arrived.register_fake
def _(x: torch.Tensor) -> None:
    return None


# What this makes is on the host, also where that is a CPU's own memory.
HOST = torch.ops.autopar.to_host.default
