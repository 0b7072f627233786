"""A second version of parameters and of their optimizer's state, which is stepped while the first one
stays as it is; and whether what the step has read is unchanged.

Private to torch here: `DTensor._local_tensor`, and `_storage_Use_Count` as CUDA graph trees use it;
tested with 2.11 and 2.13.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar.runtime.sharded_values import ShardedGradient, ShardedParameter, ShardedState

# Of a storage that one tensor uses, with the object that is asked.
_HOLDERS = 2

# The key of a gradient among spares; the parameter's is empty.
_GRADIENT = ".grad"

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Part:
    """A parameter, what its step reads, and what the step makes.

    Args:
        shard: the parameter's memory on this rank.
        group: number of its parameter group.
        held: its state; None if it has none yet.
        entries: the state's values on this rank.
        expects: it gets a gradient in this backward; else it is not stepped.
        spares: memory for the second version, by key of the state.
        gradient: on this rank, once it is stored.
        ready: waits until the gradient is written.
        kept: the gradient as it was read.
        stepped: the parameter after the step.
        state: its state after the step.
    """

    parameter: ShardedParameter
    shard: torch.Tensor
    group: int
    held: Mapping[str, Any] | None
    entries: Mapping[str, Any]
    expects: bool
    spares: dict[str, torch.Tensor]
    versions: Mapping[str, int] = field(init=False)
    gradient: torch.Tensor | None = None
    ready: Callable[[], None] | None = None
    gradient_version: int = 0
    kept: torch.Tensor | None = None
    stepped: torch.Tensor | None = None
    state: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.versions = {key: t._version for key, t in self.tensors().items()}
        for owner in (self.parameter, *(self.held or {}).values()):
            if isinstance(owner, ShardedParameter | ShardedState):
                owner._lent = False

    def tensors(self) -> dict[str, torch.Tensor]:
        """What has a second version."""
        values = {"": self.shard, **self.entries}
        return {key: t for key, t in values.items() if isinstance(t, torch.Tensor)}

    @property
    def second_bytes(self) -> int:
        """Of its second version."""
        return sum(t.nbytes for t in self.tensors().values())

    def store(self, gradient: torch.Tensor, ready: Callable[[], None] | None) -> None:
        """Its gradient is on the host, or will be."""
        self.gradient, self.ready = gradient, ready
        self.gradient_version = gradient._version

    def read(self, *, keep: bool) -> None:
        """Copy what the step reads; in the thread that steps.

        Args:
            keep: the gradient too, so that it can be compared after somebody has written to it.
        """
        if self.ready is not None:
            self.ready()
        second = {key: self._copy(key, t) for key, t in self.tensors().items()}
        self.stepped = second.pop("")
        self.state = {**self.entries, **second}
        gradient = self.gradient
        if keep and gradient is not None:
            self.kept = gradient = self._copy(_GRADIENT, gradient)
        self.stepped.grad = gradient

    def _copy(self, key: str, t: torch.Tensor) -> torch.Tensor:
        spare = self.spares.get(key)
        if spare is None or not (spare.shape == t.shape and spare.dtype == t.dtype):
            spare = torch.empty_strided(
                t.size(), t.stride(), dtype=t.dtype, pin_memory=t.is_pinned()
            )
        self.spares[key] = spare
        return spare.copy_(t)

    def difference(self, held: Mapping[str, Any] | None) -> str:
        """What differs from what the step has read; empty if nothing does.

        Args:
            held: the parameter's state now.
        """
        p = self.parameter
        if p._local_tensor is not self.shard or not self._same("", p):
            return "parameters were written to"
        if (held or None) is not (self.held or None) or set(held or ()) != set(self.entries):
            return "the optimizer's state was replaced"
        for key, value in (held or {}).items():
            entry = self.entries[key]
            is_tensor = isinstance(entry, torch.Tensor)
            if _local(value) is not entry and (is_tensor or value != entry):
                return "the optimizer's state was replaced"
            if is_tensor and not self._same(key, value):
                return "the optimizer's state was written to"
        gradient = p.grad
        if (gradient is None) == self.expects:
            return "gradients were removed or added"
        if gradient is None:
            return ""
        if not isinstance(gradient, ShardedGradient) or _local(gradient) is not self.gradient:
            return "gradients were replaced or added to"
        return "" if self._same_gradient(gradient) else "gradients were written to"

    def _same(self, key: str, owner: Any) -> bool:
        """Whether nobody has written to a tensor, or may have without leaving a trace.

        Args:
            owner: of this rank's part.
        """
        local = _local(owner)
        if local._version != self.versions[key]:
            return False
        return not isinstance(owner, DTensor) or _is_traced(owner)

    def _same_gradient(self, gradient: ShardedGradient) -> bool:
        local = gradient._local_tensor
        if local._version == self.gradient_version and _is_traced(gradient):
            return True
        if self.kept is None:
            return False
        bits = _BITS[local.itemsize]
        return torch.equal(local.view(bits), self.kept.view(bits))

    def accept(self, state: dict[str, Any]) -> None:
        """Take the second version over; the memory of the first one becomes spare.

        Args:
            state: of the shard, is changed.
        """
        assert self.stepped is not None and self.state is not None
        _exchange(self.shard, self.stepped)
        for key, value in self.state.items():
            old = state.get(key)
            if isinstance(old, torch.Tensor) and isinstance(value, torch.Tensor) and old.ndim:
                _exchange(old, value)
                self.spares[key] = value
            elif isinstance(old, torch.Tensor) and isinstance(value, torch.Tensor):
                old.copy_(value)
            else:
                state[key] = value
                self.spares.pop(key, None)


def step_parts(
    optimizer: torch.optim.Optimizer, options: Sequence[Mapping[str, Any]], parts: Sequence[Part]
) -> None:
    """Step the second versions of parts, as an optimizer with these options does.

    Args:
        optimizer: a copy, whose groups and state are replaced.
        options: of the parameter groups.
    """
    optimizer.param_groups = [
        {**group, "params": [p.stepped for p in parts if p.group == k and p.expects]}
        for k, group in enumerate(options)
    ]
    own = [p for p in parts if p.expects]
    optimizer.state = defaultdict(dict, {p.stepped: p.state for p in own if p.held})  # type: ignore[misc]
    try:
        inspect.unwrap(type(optimizer).step)(optimizer)  # type: ignore[arg-type]
    finally:
        for p in own:
            assert p.stepped is not None
            p.stepped.grad, p.state = None, optimizer.state.get(p.stepped, {})


def twin_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same kind that may get other groups and another state."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer))
    return twin


def _is_traced(x: Any) -> bool:
    """Whether the counter of writes to this rank's part of a DTensor tells all of them: nobody has
    had it as a plain tensor, and no other tensor shares its storage."""
    return not x._lent and is_alone(x._local_tensor)


def is_alone(t: torch.Tensor) -> bool:
    """Whether a tensor has a storage to itself."""
    storage = t.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata)
    return users <= _HOLDERS and storage.nbytes() == t.nbytes


@torch.no_grad()
def _exchange(a: torch.Tensor, b: torch.Tensor) -> None:
    """Exchange the memory of two tensors of one layout; both stay the same objects."""
    of_a, of_b = a.untyped_storage(), b.untyped_storage()
    a.set_(of_b, b.storage_offset(), b.size(), b.stride())  # type: ignore[call-overload]
    b.set_(of_a, 0, a.size(), a.stride())  # type: ignore[call-overload]


def _local(x: Any) -> Any:
    return x._local_tensor if isinstance(x, DTensor) else x
