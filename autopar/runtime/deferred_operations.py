"""Operators that were recorded instead of run, and how values are computed from them.

An operator names the memories it reads, each with the operator that wrote it last before. So the
history of a value is a graph, and what no tensor needs any more is freed with it.

`_disable_current_modes` is private to torch; tested with 2.13.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from autopar.errors import EngineError

# A real tensor among the arguments is copied up to this size; a larger one must stay as it is.
_COPIED_BYTES = 2**20

_index = itertools.count()


@dataclass(eq=False, repr=False)
class Memory:
    """What tensors that are views of each other share.

    Attributes:
        created: the operator whose result the memory is.
        last: the operator that wrote it last.
    """

    created: Operation
    last: Operation


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in its memory: sizes, strides and offset in elements of the dtype."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(x: torch.Tensor) -> Geometry:
        return Geometry(x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset()))

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor in a storage."""
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True, eq=False)
class Read:
    """A deferred tensor as an argument: a memory with the values that `after` left in it."""

    memory: Memory
    after: Operation
    geometry: Geometry


@dataclass(frozen=True, eq=False)
class Constant:
    """A real tensor as an argument."""

    value: torch.Tensor
    version: int

    @staticmethod
    def of(x: torch.Tensor) -> Constant:
        if x.is_inference() or x.nbytes <= _COPIED_BYTES:
            with torch.inference_mode(False):
                x = x.detach().clone()
        return Constant(x, x._version)

    def unchanged(self) -> torch.Tensor:
        if self.value._version != self.version:
            raise EngineError(
                f"a tensor of shape {list(self.value.shape)} that deferred_init reads later was "
                "changed in place after the operator that read it; give that operator a copy "
                "(x.clone())"
            )
        return self.value


@dataclass(eq=False, repr=False)
class Operation:
    """An operator that was recorded.

    Attributes:
        index: its place in the order of all operators.
        args, kwargs: with `Read` and `Constant` in the place of tensors.
        default_dtype: that was in force.
        state: of the generator before the operator, for random ones.
        results: per new tensor among the results its memory and geometry; None for others.
    """

    func: Any
    args: Any
    kwargs: Any
    default_dtype: torch.dtype
    state: torch.Tensor | None
    index: int = field(default_factory=lambda: next(_index))
    results: list[tuple[Memory, Geometry] | None] = field(default_factory=list)

    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def reads(self) -> Iterator[Read]:
        return (x for x in self.leaves() if isinstance(x, Read))

    def memories(self) -> set[Memory]:
        """All that it reads, writes or creates."""
        return {r.memory for r in self.reads()} | {r[0] for r in self.results if r is not None}

    def run(self, storages: dict[Memory, torch.UntypedStorage]) -> None:
        """Run it on real memory."""

        def real(x: Any) -> Any:
            if isinstance(x, Read):
                return x.geometry.over(storages[x.memory])
            return x.unchanged() if isinstance(x, Constant) else x

        args, kwargs = pytree.tree_map(real, (self.args, self.kwargs))
        with _as_recorded(self):
            out = pytree.tree_leaves(self.func(*args, **kwargs))
        for value, result in zip(out, self.results, strict=False):
            if result is not None:
                memory, geometry = result
                storages.setdefault(memory, _laid_out(value, geometry).untyped_storage())

    def digest(self, known: dict[Operation, str]) -> str:
        """A hash of what it computes, the same on all ranks that recorded the same. Those of the
        operators before it must be `known`."""
        numbers: dict[Memory, int] = {}

        def text(x: Any) -> Any:
            if isinstance(x, Read):
                number = numbers.setdefault(x.memory, len(numbers))
                return (number, known[x.after], str(x.geometry))
            if isinstance(x, Constant):
                flat = x.unchanged().contiguous().view(-1).view(torch.uint8)
                return hashlib.sha256(flat.numpy().tobytes()).hexdigest(), tuple(x.value.shape)
            return repr(x)

        state = "" if self.state is None else self.state.numpy().tobytes()
        content = pytree.tree_map(text, (self.args, self.kwargs))
        return hashlib.sha256(
            repr((str(self.func), content, str(self.default_dtype), state)).encode()
        ).hexdigest()


def _laid_out(value: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """A result with the strides that were recorded for it: kernels of a few operators choose others
    than their meta functions say."""
    if Geometry.of(value) == geometry:
        return value
    return torch.empty_strided(geometry.size, geometry.stride, dtype=geometry.dtype).copy_(value)


@contextmanager
def _as_recorded(op: Operation) -> Iterator[None]:
    """The state of torch that an operator was recorded under.

    Raises:
        EngineError: an operator draws random numbers, and torch does not mark it as random.
    """
    generator, dtype = torch.default_generator, torch.get_default_dtype()
    before = generator.get_state()
    if op.state is not None:
        generator.set_state(op.state)
    torch.set_default_dtype(op.default_dtype)
    try:
        with torch.amp.autocast("cpu", enabled=False):
            yield
        if op.state is None and not torch.equal(generator.get_state(), before):
            raise EngineError(
                f"{op.func} draws random numbers, but torch does not mark it as an operator that "
                "does, so it cannot be deferred; build this part of the model outside of "
                "deferred_init"
            )
    finally:
        torch.set_default_dtype(dtype)
        generator.set_state(before)


def history(last: Operation) -> list[Operation]:
    """The operators that the values left by an operator depend on, it included, in order."""
    needed: set[Operation] = set()
    stack = [last]
    while stack:
        op = stack.pop()
        if op not in needed:
            needed.add(op)
            stack += [read.after for read in op.reads()]
    return sorted(needed, key=lambda op: op.index)


def compute(memory: Memory, geometry: Geometry) -> torch.Tensor:
    """The values of a deferred tensor, in new memory. What is not needed any more is freed."""
    operations = history(memory.last)
    last_use = {m: op.index for op in operations for m in op.memories()}
    storages: dict[Memory, torch.UntypedStorage] = {}
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        for op in operations:
            op.run(storages)
            for m in op.memories():
                if last_use[m] <= op.index and m is not memory:
                    storages.pop(m, None)
        return geometry.over(storages[memory])
