"""Live bytes of a real step, to compare with what is predicted."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.comm import host_copies
from autopar.comm.offloaded_parameters import counted_resizes
from autopar.ir.aliasing import tensors_of
from autopar.profiler.counting import Recorder


class LiveTrace(TorchDispatchMode):
    """Every storage made and freed while it is active, and parameters emptied and filled again. It
    keeps nothing alive itself.

    What counts is decided when the peak is asked for, since which storages are gradients of
    parameters shows at the end only.
    """

    def __init__(self) -> None:
        super().__init__()
        # (number of a storage, bytes; negative where it is freed)
        self._events: list[tuple[int, int]] = []
        self._shapes: list[tuple[int, ...]] = []
        self._numbers: dict[int, int] = {}  # by address, of those alive
        self._backward = 0

    def start_backward(self) -> None:
        """Storages made from here on may be gradients of parameters."""
        self._backward = len(self._shapes)

    def peak_bytes(self, parameters: Iterable[torch.Tensor]) -> int:
        """The most that was alive at a time, without gradients of parameters: those found in
        `.grad`, and what the backward made in the shape of a parameter (parts of a gradient that
        is a sum)."""
        parameters = list(parameters)
        shapes = {tuple(p.shape) for p in parameters}
        leaves = [p for p in parameters if p.is_leaf and p.grad is not None]
        grads = {p.grad.untyped_storage()._cdata for p in leaves if p.grad is not None}
        out = {self._numbers[g] for g in grads if g in self._numbers}
        out |= {k for k in range(self._backward, len(self._shapes)) if self._shapes[k] in shapes}
        now = peak = 0
        for number, nbytes in self._events:
            if number not in out:
                now += nbytes
                peak = max(peak, now)
        return peak

    def _resized(self, nbytes: int) -> None:
        self._events.append((len(self._shapes), nbytes))
        self._shapes.append(())

    def _freed(self, key: int, number: int, nbytes: int) -> None:
        self._numbers.pop(key, None)
        self._events.append((number, -nbytes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        before = {t.untyped_storage()._cdata for t in leaves if isinstance(t, torch.Tensor)}
        with counted_resizes(func, args, self._resized):
            out = func(*args, **kwargs)
        if func is host_copies.HOST:
            return out
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key, nbytes = storage._cdata, storage.nbytes()
                if key in self._numbers or key in before:
                    continue
                number = self._numbers[key] = len(self._shapes)
                self._shapes.append(tuple(t.shape))
                self._events.append((number, nbytes))
                weakref.finalize(storage, self._freed, key, number, nbytes)
        return out


class StepFlops(Recorder):
    """FLOPs of what is dispatched, by the convention of `Op.flops`.

    Attributes:
        total: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        work, _ = self.take()
        if work.kernels:
            elements = max((t.numel() for t in tensors_of((args, kwargs, out))), default=0)
            self.total += float(work.flops or elements)
        return out
