"""An optimizer whose step is recorded and runs on this rank's shards as one program.

For optimizers that do more than treat each element by itself: LAMB, LARS, Adafactor, Muon, a
user's own. `autopar/optim/recorder.py` says how; here an optimizer's `step` is put under it.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from autopar.optim.elementwise import ELEMENTWISE
from autopar.optim.lazy_numbers import lazy_max_and_min
from autopar.optim.lazy_tensor import LazyTensor
from autopar.optim.local_program import LocalProgram
from autopar.optim.programs import Programs
from autopar.optim.recorder import Recorder
from autopar.runtime.sharded_values import ShardedGradient, ShardedParameter, ShardedState

# Whose steps run the model, or take gradients that are no dense tensors.
_ON_DTENSORS = (torch.optim.LBFGS, torch.optim.SparseAdam)

# Modules whose optimizers take a `torch.SymFloat` for a number. Others might format it, or ask for
# its type.
LAZY_NUMBERS_IN = ["torch.optim.", "timm.optim.", "transformers."]

_RECORDED: weakref.WeakKeyDictionary[torch.optim.Optimizer, RecordedStep] = (
    weakref.WeakKeyDictionary()
)

# The recorder that is on.
_ON: list[Recorder] = []


def programs_of(optimizer: torch.optim.Optimizer) -> list[LocalProgram]:
    """The programs that the steps of an optimizer have become so far."""
    return _RECORDED[optimizer].programs.all if optimizer in _RECORDED else []


def record_steps(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer's steps be recorded, if it does more than treat each element by itself."""
    if type(optimizer) in ELEMENTWISE or isinstance(optimizer, _ON_DTENSORS):
        return
    if optimizer not in _RECORDED:
        _RECORDED[optimizer] = RecordedStep(optimizer)


@functools.cache
def record_later_optimizers() -> None:
    """Let the steps of optimizers that are made later, of an engine's parameters, be recorded."""
    before = torch.optim.Optimizer.__init__

    @functools.wraps(before)
    def init(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        if any(isinstance(p, ShardedParameter) for p in _parameters(self)):
            record_steps(self)

    torch.optim.Optimizer.__init__ = init  # type: ignore[method-assign]


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


class RecordedStep:
    """Puts a recorder around the steps of an optimizer.

    Steps of plain parameters and differentiable steps stay as they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.programs = Programs()
        self._recorder: Recorder | None = None
        self._homes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        before = optimizer.step
        mine = weakref.ref(self)

        # a bound method, since schedulers ask for its function
        @functools.wraps(getattr(before, "__func__", before))
        def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            recorded = mine()
            if recorded is None:
                return before(*args, **kwargs)
            return recorded._step(self, before, args, kwargs)

        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]

    def _step(
        self, optimizer: torch.optim.Optimizer, before: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        recorder = self._recorder_for(optimizer)
        if recorder is None or _ON:
            return before(*args, **kwargs)
        if args and callable(args[0]):
            args = (_outside(recorder, args[0]), *args[1:])
        elif callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": _outside(recorder, kwargs["closure"])}
        self._homes = _homes(optimizer)
        _ON.append(recorder)
        try:
            with ExitStack() as stack:
                module = _module_of(optimizer)
                recorder.lazy_numbers = module.startswith(tuple(LAZY_NUMBERS_IN))
                if recorder.lazy_numbers:
                    stack.enter_context(lazy_max_and_min(module))
                stack.enter_context(_lists_by_default(optimizer))
                stack.enter_context(recorder)
                result = before(*args, **kwargs)
        finally:  # what came before an error is done, as on a single device
            _ON.pop()
            recorder.flush()
            if any(ref() is not None for ref in recorder.given):
                _settle(optimizer)
            recorder.given.clear()
            self._homes.clear()
        return _settled(result)

    def _home_of(self, x: torch.Tensor) -> torch.Tensor | None:
        found = self._homes.get(id(x))
        return None if found is None else found[1]

    def _recorder_for(self, optimizer: torch.optim.Optimizer) -> Recorder | None:
        if any(group.get("differentiable") for group in optimizer.param_groups):
            return None
        meshes = (p.device_mesh for p in _parameters(optimizer) if isinstance(p, ShardedParameter))
        mesh = next(meshes, None)
        if mesh is None or mesh.get_coordinate() is None:
            return None
        if self._recorder is None or self._recorder.mesh != mesh:
            self.programs = Programs()
            run = functools.partial(self.programs.run, mesh)
            self._recorder = Recorder(mesh, run, self._home_of)
        return self._recorder


def _module_of(optimizer: torch.optim.Optimizer) -> str:
    """Where an optimizer's step is written; `__module__` of torch's optimizers is another one."""
    return str(inspect.unwrap(type(optimizer).step).__module__)


def _homes(
    optimizer: torch.optim.Optimizer,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Gradients and entries of state by identity, each with its parameter. They are kept, so that
    no other tensor gets their identity: ranks would plan by different homes."""
    homes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for p in _parameters(optimizer):
        if p.grad is not None:
            homes[id(p.grad)] = p.grad, p
        for x in optimizer.state.get(p, {}).values():
            if isinstance(x, torch.Tensor) and x.ndim:
                homes[id(x)] = x, p
    return homes


def _outside(recorder: Recorder, closure: Callable[..., Any]) -> Callable[..., Any]:
    """A closure that runs the model as ever, after all that came before."""

    @functools.wraps(closure)
    def run(*args: Any, **kwargs: Any) -> Any:
        recorder.flush()
        with _disable_current_modes():
            return closure(*args, **kwargs)

    return run


@contextmanager
def _lists_by_default(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While on, groups that leave `foreach` open take whole lists of tensors: recorded once.

    torch and timm choose so by the types of parameters, which they do not know here.
    """
    known = _module_of(optimizer).startswith(("torch.optim.", "timm.optim."))
    groups = [
        g for g in optimizer.param_groups if known and g.get("foreach", ...) is None
        and not isinstance(g.get("lr"), torch.Tensor)
    ]  # fmt: skip
    for group in groups:
        group["foreach"] = True
    try:
        yield
    finally:
        for group in groups:
            group["foreach"] = None


@torch.no_grad()
def _settle(optimizer: torch.optim.Optimizer) -> None:
    """Put DTensors and numbers in the place of what a step left in the optimizer."""
    entries: list[Any] = [*optimizer.state.values(), *optimizer.param_groups, vars(optimizer)]
    for entry in entries:
        for key, value in entry.items():
            if key not in ("params", "param_groups", "state") and _has_lazy(value):
                entry[key] = pytree.tree_map(_settled, value)
    for p in _parameters(optimizer):
        if isinstance(p.grad, LazyTensor):
            p.grad = ShardedGradient.of_dtensor(p.grad.as_dtensor())


def _has_lazy(value: Any) -> bool:
    return any(isinstance(x, LazyTensor | torch.SymFloat) for x in pytree.tree_leaves(value))


def _settled(x: Any) -> Any:
    """A number as Python's, and a tensor as a DTensor or, of no dims, as a plain tensor."""
    if isinstance(x, torch.SymFloat):
        return float(x)
    if not isinstance(x, LazyTensor):
        return x
    local = None if x.shard is None else x.shard[0]
    if local is not None and not x.ndim:
        return local
    made = x.as_dtensor()
    return ShardedState.of_dtensor(made) if type(made) is DTensor else made
