"""Python's and NumPy's random numbers in a forward: lifted into the graph, or refused.

If they were drawn during the capture, they would be constants of every later step. Instead:

* A single uniform draw becomes a draw of the captured program (`torch.rand`), so a branch on it is
  known to be random.
* A module-level function that draws, takes numbers and tensors and returns an array becomes one
  operator, which calls the function on each step (Hugging Face's SpecAugment masks). The capture
  starts over with the function wrapped (`Restart`).
* Any other draw is an error with its source line.

Functions of other libraries that models call on arrays (the table `_HOST`) become operators too.
Draws after the model's own call of `seed()` are not random and stay as they are.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.ir.guards import on_own_thread
from autopar.tracer.branches import BranchResolver
from autopar.tracer.functions import operator_for
from autopar.tracer.numbers import settled
from autopar.tracer.source import current_line, user_frame

_NUMPY = (
    "rand", "randn", "random", "random_sample", "uniform", "normal", "standard_normal", "randint",
    "choice", "permutation", "shuffle", "beta", "binomial", "exponential", "gamma", "geometric",
    "laplace", "lognormal", "multinomial", "poisson",
)  # fmt: skip
_PYTHON = (
    "random", "uniform", "randint", "randrange", "choice", "choices", "sample", "shuffle", "gauss",
    "normalvariate", "getrandbits", "betavariate", "expovariate", "triangular",
)  # fmt: skip


@dataclass(frozen=True)
class HostFunction:
    """A module-level function that draws host random numbers."""

    namespace: dict[str, Any]
    name: str

    def __hash__(self) -> int:
        return hash((id(self.namespace), self.name))

    def __eq__(self, other: object) -> bool:
        return hash(self) == hash(other)


class Restart(Exception):
    """The capture has to start over with this function as an operator."""

    def __init__(self, function: HostFunction) -> None:
        super().__init__(function.name)
        self.function = function


@contextmanager
def host_randomness(resolver: BranchResolver, lifted: set[HostFunction]) -> Iterator[None]:
    """While on, host randomness is lifted or refused; host generators keep their state."""
    seeded = {"numpy": False, "python": False}
    active = [True]

    def watch(library: str, module: Any, name: str) -> Callable[..., Any]:
        draw = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not active[0] or not resolver.active or seeded[library]:
                return draw(*args, **kwargs)
            frame = user_frame()
            if frame is None:
                return draw(*args, **kwargs)
            if name in ("random", "uniform", "rand") and len(args) in (0, 2) and not kwargs:
                low, high = (float(a) for a in args or (0.0, 1.0))
                if library == "python" or name != "rand" or not args:
                    return torch.rand((), dtype=torch.float64) * (high - low) + low
            raise _lift(frame, f"{library}'s {name}", lifted)

        return watched

    def seed(library: str, module: Any) -> Callable[..., Any]:
        plant = module.seed

        def watched(*args: Any, **kwargs: Any) -> Any:
            seeded[library] = resolver.active and bool(args or kwargs)
            return plant(*args, **kwargs)

        return watched

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        libraries = ("numpy", np.random, _NUMPY), ("python", random, _PYTHON)
        for library, module, names in libraries:
            stack.enter_context(mock.patch.object(module, "seed", seed(library, module)))
            for name in names:
                stack.enter_context(mock.patch.object(module, name, watch(library, module, name)))
        for function in lifted:
            original = function.namespace[function.name]
            wrapped = _operator(original, resolver, active)
            stack.enter_context(mock.patch.dict(function.namespace, {function.name: wrapped}))
        for module in [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]:
            for name, fake in _HOST.items():
                if callable(original := vars(module).get(name)):
                    wrapped = _host_operator(original, fake, resolver)
                    stack.enter_context(mock.patch.dict(vars(module), {name: wrapped}))
        try:
            yield
            changed = random.getstate() != python_state and not seeded["python"]
            same = map(np.array_equal, np.random.get_state(), numpy_state)
            changed |= not all(same) and not seeded["numpy"]
            if changed:
                raise CaptureError(
                    "the model draws from Python's or NumPy's generator through a function that "
                    "it imported before the capture (from random import random, say); the "
                    "numbers would be the same at every step. Call it as an attribute of its "
                    "module (random.random()), or draw with torch."
                )
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _assignment(cost: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    """Row and column indices of `scipy.optimize.linear_sum_assignment`."""
    size = min(cost.shape)
    return tuple(torch.empty(size, dtype=torch.int64) for _ in range(2))


# Functions of other libraries that models call on arrays, by name, with the results' shapes.
_HOST = {"linear_sum_assignment": _assignment}


def _host_operator(
    original: Callable[..., Any], fake: Callable[..., Any], resolver: BranchResolver
) -> Callable[..., Any]:
    """A function on arrays as an operator of the graph, where it is called on a captured tensor."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not resolver.active or not args or not isinstance(args[0], FakeTensor):
            return original(*args, **kwargs)
        args, kwargs = settled((args, kwargs))

        def run(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if isinstance(value, FakeTensor):
                return tuple(fake(value))
            arrays = original(value.detach().cpu().numpy(), *args[1:], **kwargs)
            return tuple(torch.as_tensor(np.asarray(x)) for x in arrays)

        count = len(fake(args[0]))
        constants = (*args[1:], *kwargs.items())
        return operator_for(original, constants, 1, count, run, fake, opaque=True)(args[0])

    return call


def _lift(frame: FrameType, source: str, lifted: set[HostFunction]) -> Exception:
    """Start over with the outermost module-level function around a draw, or refuse the draw."""
    outermost: HostFunction | None = None
    current: FrameType | None = frame
    while current is not None:
        name = current.f_code.co_name
        function = current.f_globals.get(name)
        if getattr(function, "__code__", None) is not current.f_code:
            break
        outermost = HostFunction(current.f_globals, name)
        current = current.f_back
    if outermost is not None and outermost not in lifted:
        return Restart(outermost)
    line = current_line()
    return CaptureError(
        f"{line}: `{line.text}` draws from {source}; captured, the numbers would be the same at "
        "every step. Draw them with torch (torch.rand, torch.randint), pass them as an input, or "
        "draw them in a function of the module level that returns an array: it is called anew at "
        "each step."
    )


def _operator(
    original: Callable[..., Any], resolver: BranchResolver, active: list[bool]
) -> Callable[..., Any]:
    """`original`, as an operator of the graph while a model is captured."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not resolver.active:
            return original(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(settled((args, kwargs)))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        constants = [x for x in leaves if not isinstance(x, torch.Tensor)]

        def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            queue = iter(values)
            filled = [next(queue) if isinstance(x, torch.Tensor) else x for x in leaves]
            a, k = pytree.tree_unflatten(filled, spec)
            return (_drawn(original, a, k),)

        values = [resolver.value(t) for t in tensors]

        def example() -> torch.Tensor:
            active[0] = False
            try:
                with torch.random.fork_rng(devices=[]):
                    return run(*(torch.as_tensor(v) for v in values))[0]
            finally:
                active[0] = True

        result = on_own_thread(example)

        def fake(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (torch.empty(result.shape, dtype=result.dtype),)

        op = operator_for(original, constants, len(tensors), 1, run, fake, random=True, opaque=True)
        return op(*tensors)[0]

    return call


def _drawn(function: Callable[..., Any], args: Any, kwargs: Any) -> torch.Tensor:
    """Call with host generators seeded from torch's, so that ranks agree and a replay repeats
    it."""
    seed = int(torch.randint(2**31, ()))
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        return torch.as_tensor(np.asarray(function(*args, **kwargs)))
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
