"""Copies between a device's memory and the host's, overlapped with compute.

On a GPU they run on a stream of their own, to and from pinned memory; compute waits for them where
a graph says so. A CPU's memory is the host's: there, a copy stands for the host's, so that all but
the streams is the same.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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
    host = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, pin_memory=x.is_cuda)
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


# Values whose place between steps is the host: a fetch is `reload` and its finish, a store is
# `offload` and its finish, which a schedule may put in their place.


@operator(_empty)
def fetch(host: torch.Tensor, device: str) -> torch.Tensor:
    """Copy a tensor of the host to the device."""
    x = reload(host, device)
    wait(x)
    return x


@operator(lambda x: _empty(x, "cpu"))
def store(x: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the host, for the caller to read there."""
    host = offload(x)
    if x.is_cuda:  # the caller reads on the host, in no stream
        _RUNNING.pop(host.untyped_storage()).synchronize()
    else:
        wait(host)
    return host


def settle(values: Iterable[object]) -> None:
    """Wait on the host for what a device has stored there, and what computes waits for already."""
    if torch.cuda.is_initialized():
        stored = (isinstance(x, torch.Tensor) and not x.is_cuda for x in values)
        if any(stored):
            torch.cuda.current_stream().synchronize()


# Who wants to know which gradients are on the host, amid a backward. It takes the position of the
# argument that a gradient is of, the gradient, and what waits until it is written; None if it is.
Listener = Callable[[int, torch.Tensor, Callable[[], None] | None], None]
_LISTENING = threading.local()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of the gradients that this thread's programs store."""
    before = getattr(_LISTENING, "listener", None)
    _LISTENING.listener = listener
    try:
        yield
    finally:
        _LISTENING.listener = before


def _announce(host: torch.Tensor, argument: int) -> None:
    """A gradient is stored, as soon as the device is here."""
    listener: Listener | None = getattr(_LISTENING, "listener", None)
    if listener is not None:
        on_gpu = torch.cuda.is_initialized()
        event = torch.cuda.current_stream().record_event() if on_gpu else None
        listener(argument, host, None if event is None else event.synchronize)


# Declared as a mutation, so that it stays in its place. Not by `custom_op`, which would make a new
# version of the gradient.
_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
_LIBRARY.define("announce(Tensor(a!) host, int argument) -> ()")
_LIBRARY.impl("announce", _announce, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::announce", lambda *_: None, lib=_LIBRARY)


class _Fetched(torch.autograd.Function):
    """A parameter on the device; its gradient is stored on the host."""

    @staticmethod
    def forward(ctx: Any, host: torch.Tensor, device: str) -> torch.Tensor:
        return torch.ops.autopar.fetch(host, device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return torch.ops.autopar.store(grad), None


def fetched(host: torch.Tensor, device: str) -> torch.Tensor:
    """A parameter of the host on the device, differentiable."""
    return _Fetched.apply(host, device)


# Operators whose results are on the host, also where that is a CPU's own memory.
ON_HOST = frozenset((torch.ops.autopar.offload.default, torch.ops.autopar.store.default))

# Operators that copy over the link to the host, in one piece.
FETCH, STORE = torch.ops.autopar.fetch.default, torch.ops.autopar.store.default

ANNOUNCE = torch.ops.autopar.announce.default
