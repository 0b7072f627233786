"""Python functions as single nodes of the graph, with their own derivative or their own draws.

The backward of a custom `autograd.Function` may differ from the derivative of its forward (a
clipped gradient, a straight-through estimator). Inlining the forward would lose it silently. So
each call becomes a call of a new operator while a model is captured. The operator is opaque in the
`ModelGraph`, and runs `Function.apply` when it is profiled or lowered.

The operators are in the namespace `autopar_functions`, one per function and constant arguments.
A result requires grad while a model is captured as it does in eager PyTorch, because models ask.
Functions without a derivative (on the host) stay single nodes in the lowered program, too.

Reentrant checkpointing is a custom function whose backward runs its region again. Its region is
captured as if it were not there: the schedule decides what is recomputed.

`torch.autograd.function._SingleLevelFunction`, the base that `Function.apply` goes through, is
private (tested with torch 2.13).
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from autopar.errors import CaptureError
from autopar.ir.guards import on_own_thread
from autopar.ir.precision import enabled_autocasts, under_autocasts
from autopar.tracer.numbers import settled
from autopar.tracer.source import current_line

NAMESPACE = "autopar_functions"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_OPERATORS: dict[str, Any] = {}
_COUNTER = itertools.count()
_STATE = threading.local()

_Results = tuple[torch.Tensor, ...]


@contextmanager
def opaque_functions() -> Iterator[None]:
    """While on (for this thread), custom autograd functions are captured as single nodes."""
    before = getattr(_STATE, "capturing", False)
    _STATE.capturing = True
    patched = "apply" not in vars(_SingleLevelFunction)
    if patched:
        setattr(_SingleLevelFunction, "apply", classmethod(_apply))  # noqa: B010
    try:
        yield
    finally:
        _STATE.capturing = before
        if patched:
            delattr(_SingleLevelFunction, "apply")


def capturing() -> bool:
    """Whether this thread is capturing a model."""
    return getattr(_STATE, "capturing", False)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    inner = super(_SingleLevelFunction, cls).apply
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    # torch's own (derivatives of registered operators) are inlined correctly
    own = cls.__module__.startswith("torch.") or cls is _AsEager
    if capturing() and cls is CheckpointFunction:
        region, _preserve_generators, *operands = args
        graded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        with torch.set_grad_enabled(graded):
            return region(*operands)
    if own or not capturing() or not tensors or kwargs:
        return inner(*args, **kwargs)
    args = settled(args)  # a derivative of its own may need the number
    if any(isinstance(x, torch.nn.Module) for x in pytree.tree_leaves([args, kwargs])):
        raise CaptureError(
            f"{current_line()}: {cls.__name__} takes modules (reversible layers, checkpointing of "
            "its own); its backward reaches parameters that the graph cannot see. Call the modules "
            "outside of the function"
        )
    context = _Context([isinstance(a, torch.Tensor) and a.requires_grad for a in args])
    example = on_own_thread(lambda: _forward(cls, context, args))
    if context.dirty:
        raise CaptureError(
            f"{current_line()}: {cls.__name__}.forward changes its input in place (mark_dirty); "
            "let it return a new tensor"
        )

    autocasts = enabled_autocasts()  # the graph runs without, and torch cannot see inside

    def run(*tensors: torch.Tensor) -> _Results:
        with under_autocasts(autocasts):
            return _tensors(cls.apply(*_fill(args, tensors)))

    def fake(*tensors: torch.Tensor) -> _Results:
        with under_autocasts(autocasts):
            return _tensors(_forward(cls, _Context([False] * len(args)), _fill(args, tensors)))

    outputs = _as_tuple(example)
    constants = [a for a in args if not isinstance(a, torch.Tensor)]
    constants += [f"{kind} {dtype}" for kind, dtype in autocasts]
    results = _tensors(outputs)
    without = [i for i, t in enumerate(results) if any(t is c for c in context.constant)]
    op = operator_for(
        cls, constants, len(tensors), len(results), run, fake, without_gradient=without
    )
    filled = _fill(outputs, op(*tensors))
    return tuple(filled) if isinstance(example, tuple | list) else filled[0]


def operator_for(
    function: Any,
    constants: Sequence[Any],
    inputs: int,
    outputs: int,
    run: Callable[..., _Results],
    fake: Callable[..., _Results],
    *,
    random: bool = False,
    opaque: bool = False,
    without_gradient: Sequence[int] = (),
) -> Any:
    """The operator for a function with some constant arguments.

    Args:
        run: tensors in, tensors out; autograd goes through it.
        fake: the same for fake tensors.
        random: it draws random numbers.
        opaque: `run` has no derivative and takes real values; it is called at each step.
        without_gradient: results that never require grad.
    """
    name = re.sub(r"\W", "_", getattr(function, "__qualname__", "function"))
    plain = all(isinstance(c, bool | int | float | str | tuple | None) for c in constants)
    identity = (
        function.__module__,
        name,
        repr(list(constants)) if plain else next(_COUNTER),
        inputs,
        tuple(without_gradient),
    )
    key = f"{name}_{hashlib.sha256(repr(identity).encode()).hexdigest()[:8]}"
    if key in _OPERATORS:
        return _OPERATORS[key]
    parameters = ", ".join(f"Tensor a{i}" for i in range(inputs))
    results = ", ".join(["Tensor"] * outputs)
    tags = (torch.Tag.nondeterministic_seeded,) if random else ()
    _LIBRARY.define(f"{key}({parameters}) -> ({results})", tags=tags)
    op = getattr(getattr(torch.ops, NAMESPACE), key).default

    def unpacked(results: _Results) -> Any:
        return results[0] if outputs == 1 else results

    def with_autograd(*tensors: torch.Tensor) -> Any:
        if opaque:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*tensors)
        if capturing():
            return _AsEager.apply(op, frozenset(without_gradient), *tensors)
        return unpacked(run(*tensors))

    _LIBRARY.impl(key, lambda *tensors: unpacked(run(*tensors)), "CompositeExplicitAutograd")
    _LIBRARY.impl(key, with_autograd, "Autograd")
    torch.library.register_fake(
        f"{NAMESPACE}::{key}", lambda *tensors: unpacked(fake(*tensors)), lib=_LIBRARY
    )
    _OPERATORS[key] = (lambda *tensors: (op(*tensors),)) if outputs == 1 else op
    return _OPERATORS[key]


class _AsEager(torch.autograd.Function):
    """Calls an operator on fake tensors; the results require grad if an operand does."""

    @staticmethod
    def forward(ctx: Any, op: Any, without_gradient: Set[int], *tensors: torch.Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = op(*tensors)
        ctx.mark_non_differentiable(
            *(t for i, t in enumerate(_as_tuple(results)) if i in without_gradient)
        )
        return results


class _Context(SimpleNamespace):
    """The `ctx` of a forward that runs without autograd."""

    def __init__(self, needs_input_grad: list[bool]) -> None:
        super().__init__()
        self.needs_input_grad = tuple(needs_input_grad)
        self.saved_tensors: tuple[Any, ...] = ()
        self.dirty: tuple[Any, ...] = ()
        self.constant: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    save_for_forward = save_for_backward

    def mark_dirty(self, *tensors: Any) -> None:
        self.dirty = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _forward(cls: Any, context: _Context, args: Sequence[Any]) -> Any:
    with torch.no_grad():
        if cls.setup_context is not torch.autograd.Function.setup_context:
            outputs = cls.forward(*args)
            cls.setup_context(context, args, outputs)
            return outputs
        return cls.forward(context, *args)


def _fill(template: Sequence[Any], tensors: Sequence[torch.Tensor]) -> list[Any]:
    queue = iter(tensors)
    return [next(queue) if isinstance(a, torch.Tensor) else a for a in template]


def _tensors(value: Any) -> _Results:
    return tuple(t for t in _as_tuple(value) if isinstance(t, torch.Tensor))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
