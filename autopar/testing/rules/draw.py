"""Random choices for samplers, and the table of samplers.

A sampler is a short function from a `Draw` to the arguments of one call. Its choices come from a
`random.Random`, which the command line seeds and hypothesis replaces.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Shape = Sequence[int]

LARGEST = 9


@dataclass(frozen=True)
class Sample:
    """One operator call on real tensors.

    Args:
        op: the operator.
        args, kwargs: as it is called; floats are float64 unless the call is about dtypes.
        fixed: names of float arguments that take no gradient (running statistics).
    """

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    def __str__(self) -> str:
        parts = [_shown(a) for a in self.args]
        parts += [f"{k}={_shown(v)}" for k, v in self.kwargs.items()]
        return f"{self.op}({', '.join(parts)})"


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value)


class Draw:
    """Random choices of a sampler.

    Args:
        source: of the choices.
        largest: upper bound of `size()`; failures are searched again with smaller bounds.
    """

    def __init__(self, source: random.Random, largest: int = LARGEST) -> None:
        self.source = source
        self.largest = largest
        self._generator: torch.Generator | None = None

    # -- numbers --------------------------------------------------------------------------------

    def integer(self, low: int, high: int) -> int:
        """Of low, ..., high."""
        return self.source.randint(low, high)

    def choice(self, options: Sequence[T]) -> T:
        return options[self.source.randint(0, len(options) - 1)]

    def chance(self, percent: int = 50) -> bool:
        return self.source.randint(0, 99) < percent

    def size(self, low: int = 1) -> int:
        """A dim's size: seldom 1, which no axis can split."""
        high = max(self.largest, low)
        if low == 1 and not self.chance(10):
            low = min(2, high)
        return self.source.randint(low, high)

    def shape(self, low: int, high: int) -> list[int]:
        """A shape of low, ..., high dims."""
        return [self.size() for _ in range(self.integer(low, high))]

    def dim(self, ndim: int) -> int:
        """A dim of a tensor, counted from either end."""
        return self.integer(-ndim, ndim - 1)

    def along(self, low: int, high: int) -> tuple[list[int], int]:
        """A shape of low, ..., high dims, and one of its dims."""
        shape = self.shape(low, high)
        return shape, self.dim(len(shape))

    def dims(self, ndim: int, low: int = 1) -> list[int]:
        """Distinct dims, counted from either end."""
        dims = sorted(self.source.sample(range(ndim), self.integer(low, ndim)))
        return [d - ndim if self.chance(30) else d for d in dims]

    # -- tensors --------------------------------------------------------------------------------

    @property
    def generator(self) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator()
            self._generator.manual_seed(self.source.randint(0, 2**31))
        return self._generator

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, shape: Shape, low: float = 0.1, high: float = 0.9) -> torch.Tensor:
        unit = torch.rand(list(shape), generator=self.generator, dtype=torch.float64)
        return low + (high - low) * unit

    def integers(self, shape: Shape, low: int, high: int) -> torch.Tensor:
        """int64 of low, ..., high - 1."""
        return torch.randint(low, max(high, low + 1), list(shape), generator=self.generator)

    def booleans(self, shape: Shape, share: float = 0.5) -> torch.Tensor:
        return torch.rand(list(shape), generator=self.generator) < share

    def permutation(self, shape: Shape) -> torch.Tensor:
        """Distinct floats: no ties for sorts and maxima."""
        count = math.prod(shape)
        order = torch.randperm(count, generator=self.generator).double()
        return ((order + 1) / max(count, 1) - 0.5).reshape(list(shape))

    def any_kind(self, shape: Shape) -> torch.Tensor:
        """Mostly floats; ints and booleans for ops that only move data."""
        kind = self.integer(0, 9)
        if kind == 0:
            return self.integers(shape, -5, 6)
        if kind == 1:
            return self.booleans(shape)
        return self.normal(*shape)

    def broadcast(self, shape: Shape) -> list[int]:
        """A shape that broadcasts to `shape`."""
        dims = [1 if self.chance(20) else n for n in shape]
        return dims[self.integer(0, len(dims)) :] if self.chance(20) else dims


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Sampler = Callable[[Draw], Arguments]

SAMPLES: dict[str, Sampler] = {}
FIXED: dict[str, frozenset[str]] = {}


def sampler(*names: str, fixed: Sequence[str] = ()) -> Callable[[Sampler], Sampler]:
    """Registers a function that draws the arguments of the named ops."""

    def register(function: Sampler) -> Sampler:
        for name in names:
            assert name not in SAMPLES, f"{name} has two samplers"
            SAMPLES[name] = function
            if fixed:
                FIXED[name] = frozenset(fixed)
        return function

    return register
