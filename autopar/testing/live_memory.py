"""Measures the live bytes of a real step, to compare with predictions."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.comm import host_copies, offloaded_parameters  # noqa: F401  (define the operators)

_RESIZE = {torch.ops.autopar.evict.default, torch.ops.autopar.prefetch.default}
_WAIT = torch.ops._c10d_functional.wait_tensor.default


class LiveMemory(TorchDispatchMode):
    """Records every storage made while it is active until it is freed; a parameter counts
    negatively while it is offloaded.

    It keeps nothing alive, and sees what kernels return, not their scratch space. A collective runs
    to its end at once, on copies: a backend's threads hold its tensors a moment longer than the
    program does, and how long depends on how busy the machine is.

    Attributes:
        changes: number of a storage and its bytes, negative when it is freed, in order.
        numbers: of live storages, by address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[int, int]] = []
        self.numbers: dict[int, int] = {}
        self._count = 0

    @property
    def peak(self) -> int:
        """The most bytes that were alive at a time."""
        return max(itertools.accumulate((n for _, n in self.changes), initial=0))

    def record(self, nbytes: int, shape: tuple[int, ...] = ()) -> int:
        """Record a storage that was made for a tensor of that shape; returns its number."""
        self._count += 1
        self.changes.append((self._count, nbytes))
        return self._count

    def _freed(self, address: int, number: int, nbytes: int) -> None:
        self.numbers.pop(address, None)
        self.changes.append((number, -nbytes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(isinstance(t, DTensor) for t in tensors):
            return NotImplemented  # its operations on local shards are dispatched here as well
        before = {t.untyped_storage()._cdata for t in tensors}
        shard = args[0].untyped_storage() if func in _RESIZE else None
        held = 0 if shard is None else shard.nbytes()
        collective = func.namespace == "_c10d_functional" and func is not _WAIT
        if collective and not any(isinstance(t, FakeTensor) for t in tensors):
            out = _finish_on_copies(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if shard is not None:  # negative where it is evicted
            self.record(shard.nbytes() - held)
        for t in pytree.tree_leaves(out) if func not in host_copies.ON_HOST else ():
            if not isinstance(t, torch.Tensor) or isinstance(t, DTensor):
                continue
            storage = t.untyped_storage()
            address, nbytes = storage._cdata, storage.nbytes()
            if t.device.type == "meta" or address in self.numbers or address in before:
                continue
            number = self.numbers[address] = self.record(nbytes, tuple(t.shape))
            weakref.finalize(storage, self._freed, address, number, nbytes)
        return out


def _finish_on_copies(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a functional collective on copies of its tensors and wait for it."""
    copied_args, copied_kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    out = func(*copied_args, **copied_kwargs)
    out = pytree.tree_map_only(torch.Tensor, lambda t: _WAIT(t).clone(), out)
    if not func._schema.is_mutable:
        return out
    written = kwargs.get("out", args[0])
    for target, result in zip(pytree.tree_leaves(written), pytree.tree_leaves(out), strict=True):
        target.copy_(result)
    return written


def training_state_bytes(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, int]:
    """Bytes that this rank holds between steps: parameters, optimizer state, buffers."""
    entries = optimizer.state.values() if optimizer is not None else ()
    state = (v for e in entries for v in e.values() if isinstance(v, torch.Tensor) and v.ndim)
    return {
        "parameters": _storage_bytes(model.parameters()),
        "optimizer": _storage_bytes(state),
        "buffers": _storage_bytes(model.buffers()),
    }


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors (of DTensors, the local shards')."""
    storages = {}
    for t in tensors:
        local = t.detach()
        storage = (local.to_local() if isinstance(local, DTensor) else local).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
