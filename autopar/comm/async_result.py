"""Results that nobody waits for before they are read: the loss, summed while the backward runs.

A program starts the sum of such a result over the ranks, in the result's own memory, and returns
(`autopar/passes/async_sums.py`). The engine hands out a `Late` tensor in its place, which has no memory,
so that nothing can read a sum that is not there. Whoever uses it waits for the sum, and finds an
ordinary tensor from then on. A backward that starts from it does not wait; after it the sum is
there.

To wait takes nothing more of other ranks: all send what others need of them when they start
(`Group.start_all_reduce` of a small tensor). So one rank may read a loss that others do not read.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autopar.comm.async_collectives import under_way
from autopar.comm.groups import Wait
from autopar.errors import EngineError

# In the order of their start, what is handed out and not there yet.
_pending: list[Late] = []
_lock = threading.RLock()  # a program's other threads may read its losses as well


class Late(torch.Tensor):
    """Stands in for a result on its way, and becomes it.

    Args:
        result: its memory is the sum's.
        complete: waits until it is there, or raises EngineError; called once.
    """

    _result: torch.Tensor
    _complete: Wait

    @staticmethod
    def __new__(cls: type[Late], result: torch.Tensor, complete: Wait) -> Late:
        late: Late = torch.Tensor._make_wrapper_subclass(
            cls, result.shape, result.stride(), dtype=result.dtype, device=result.device
        )
        late._result, late._complete = result, _once(complete)
        _pending.append(late)
        return late

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SCALES and not kwargs and _is_factor(args[1]):
            return _scaled(func, *args)
        if func not in _WITHOUT_VALUE or _has_late(args[1:]) or _has_late(kwargs.values()):
            finish_all()
        done = func(*map(_result, args), **{k: _result(v) for k, v in kwargs.items()})
        if func in _ROOTS:
            finish_all()
        return done

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What C++ does with it, in `torch.tensor(loss)`."""

        def value(late: Late) -> torch.Tensor:
            late._complete()
            return late._result.detach()

        args, kwargs = pytree.tree_map_only(Late, value, (args, kwargs or {}))
        return func(*args, **kwargs)


# Start a backward from their first argument, whose value that does not need.
_ROOTS = {torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad}
_PROPERTIES = ("device", "dtype", "shape", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn")
_WITHOUT_VALUE = _ROOTS | {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES}
# Linear, with a backward that reads the factor alone.
_SCALES = {
    torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__,
    torch.div, torch.Tensor.div, torch.Tensor.__truediv__,
}  # fmt: skip


def hand_out(result: torch.Tensor) -> torch.Tensor:
    """A result of a program that has started its sum, for the caller of the engine."""
    wait = under_way(result)
    assert wait is not None, "the sum that the program has started is not where its result is"
    if result.requires_grad:
        return Late(result, wait)
    wait()
    return result


def _once(complete: Wait) -> Wait:
    """What may be called again; what went wrong then goes wrong again. It lets go of what was
    called, which may hold the result."""
    ahead, wrong = [complete], []

    def completed() -> None:
        with _lock:
            if ahead:
                try:
                    with torch.no_grad():  # it writes the result, of which autograd is not to know
                        ahead.pop()()
                except EngineError as error:
                    wrong.append(error)
        if wrong:
            raise wrong[0]

    return completed


def finish_all() -> None:
    """Wait for all that is on its way.

    Raises:
        EngineError: another rank has died.
    """
    with _lock:
        while _pending:
            late = _pending[0]
            late._complete()
            _become(late)
            _pending.pop(0)


def _become(late: Late) -> None:
    """The result in the place of what stands for it; which goes on doing so where C++ holds one of
    them."""
    result = late._result
    with torch._C.DisableTorchFunctionSubclass(), contextlib.suppress(RuntimeError):
        torch.utils.swap_tensors(late, result)
        result.__dict__.clear()  # now that of `late`, which held this


@atexit.register
def finish_at_exit() -> None:
    """Another rank may yet read what this one has a part in; unless an error ends this one."""
    if not hasattr(sys, "last_value"):
        with contextlib.suppress(EngineError):
            finish_all()


def _has_late(values: Iterable[Any]) -> bool:
    return any(
        isinstance(v, Late) or (isinstance(v, tuple | list) and _has_late(v)) for v in values
    )


def _result(value: Any) -> Any:
    """An argument with results in the place of what stands for them."""
    if isinstance(value, Late):
        return value._result
    if isinstance(value, tuple | list) and _has_late(value):
        return [_result(v) for v in value]
    return value


def _is_factor(x: Any) -> bool:
    """What losses are scaled by: how many batches are accumulated, the scale of a `GradScaler`."""
    if isinstance(x, torch.Tensor):
        return type(x) is torch.Tensor and not x.ndim and not x.requires_grad
    return isinstance(x, int | float)


def _scaled(func: Callable[..., Any], late: Late, factor: Any) -> Late:
    """A late result times or over a factor: late as well, as its gradient needs no value."""
    before, complete = late._result.detach(), late._complete
    kept = factor.clone() if isinstance(factor, torch.Tensor) else factor
    result = func(late._result, factor)

    def completed() -> None:
        complete()
        result.data.copy_(func(before, kept))  # `data`: for autograd this is no write

    return Late(result, completed)
