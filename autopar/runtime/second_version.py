"""A second version of parameters and of their optimizer's state, which is stepped while the first
one stays as it is; and whether what the step has read is unchanged.

Private to torch here: `_storage_Use_Count` as CUDA graph trees use it;
tested with 2.11 and 2.13.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autopar.errors import EngineError
from autopar.runtime.chunks import is_away, local_of
from autopar.runtime.sharded_values import ShardedGradient, ShardedParameter
from autopar.runtime.watched_shard import WatchedShard, unwatch, watch

# Of a storage that one tensor uses: it, and the object that is asked.
_HOLDERS = 2

# The key of a gradient among spares; the parameter's is empty.
_GRADIENT = ".grad"

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Part:
    """A parameter, what its step reads, and what the step makes.

    Args:
        parameter: a DTensor.
        shard: its memory on this rank.
        group: number of its parameter group.
        held: its state; None if it has none yet.
        entries: the state's values on this rank.
        expects: it gets a gradient in this backward; else it is not stepped.
        spares: memory for the second version, by key of the state; "" is the parameter's.
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
    gradient: torch.Tensor | None = None
    ready: Callable[[], None] | None = None
    kept: torch.Tensor | None = None
    stepped: torch.Tensor | None = None
    state: Mapping[str, Any] | None = None
    _numbers: dict[str, Any] = field(default_factory=dict)
    _watched: list[tuple[str, Any, WatchedShard]] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)  # what was watched
    _written: set[str] = field(default_factory=set)

    def watch(self) -> None:
        """Notice writes from now on, and note numbers."""
        self._numbers = _numbers(self.entries)
        owners = {"": self.parameter, **(self.held or {})}
        for key, t in self.tensors().items():
            if not key or (t.ndim and not is_away(t)):
                self._watched.append((key, owners[key], watch(owners[key])))

    def watch_gradient(self) -> None:
        """The same of the gradient, when the parameter has it."""
        gradient = self.parameter.grad
        if isinstance(gradient, ShardedGradient) and gradient._local_tensor is self.gradient:
            self._watched.append((_GRADIENT, gradient, watch(gradient)))

    def unwatch(self) -> None:
        """All is as it was, for whatever comes next."""
        self._seen = {key for key, *_ in self._watched}
        self._written = {key for key, x, watched in self._watched if not unwatch(x, watched)}
        self._watched.clear()  # what watches uses the storage, too
        tensors = {"": self.shard, _GRADIENT: self.gradient, **self.entries}
        self._written.update(key for key in self._seen if not _is_alone(tensors[key]))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What has a second version."""
        values = {"": self.shard, **self.entries}
        return {key: t for key, t in values.items() if isinstance(t, torch.Tensor)}

    @property
    def second_bytes(self) -> int:
        """Of its second version, in memory."""
        return sum(t.nbytes for t in self.tensors().values() if not is_away(t))

    def read(self, *, keep: bool) -> None:
        """Copy what the step reads; in the thread that steps. What is on a drive is not read yet.

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

    def write(self) -> list[torch.Tensor]:
        """What a file of its second version has. The state is not kept in memory."""
        assert self.stepped is not None and self.state is not None
        if self.state.keys() != self.entries.keys():
            raise EngineError(f"the step makes other state than before: {sorted(self.state)}")
        state = {k: t for k, t in self.state.items() if isinstance(t, torch.Tensor) and t.ndim}
        self.state = {k: x for k, x in self.state.items() if k not in state}
        for key in state:
            del self.spares[key]
        return [self.stepped, *state.values()]

    def _copy(self, key: str, t: torch.Tensor) -> torch.Tensor:
        spare = self.spares.get(key)
        if spare is None or not (spare.shape == t.shape and spare.dtype == t.dtype):
            spare = torch.empty_strided(
                t.size(), t.stride(), dtype=t.dtype, pin_memory=t.is_pinned()
            )
        self.spares[key] = spare
        return spare if is_away(t) else spare.copy_(t)

    def difference(self, held: Mapping[str, Any] | None) -> str:
        """What differs from what the step has read; empty if nothing does. After `unwatch`.

        Args:
            held: the parameter's state now.
        """
        if "" in self._written:
            return "parameters were written to"
        if (held or None) is not (self.held or None) or set(held or ()) != set(self.entries):
            return "the optimizer's state was replaced"
        values = {key: local_of(value) for key, value in (held or {}).items()}
        for key, t in self.tensors().items():
            if key and values[key] is not t:
                return "the optimizer's state was replaced"
        if self._written - {_GRADIENT} or _numbers(values) != self._numbers:
            return "the optimizer's state was written to"
        gradient = self.parameter.grad
        if (gradient is None) == self.expects:
            return "gradients were removed or added"
        if gradient is None:
            return ""
        if self.gradient is None or local_of(gradient) is not self.gradient:
            return "gradients were replaced or added to"
        if _GRADIENT in self._seen - self._written:
            return ""
        same = self.kept is not None and _same_bits(self.gradient, self.kept)
        return "" if same else "gradients were written to"

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
        inspect.unwrap(type(optimizer).step)(optimizer)
    finally:
        for p in own:
            assert p.stepped is not None
            p.stepped.grad, p.state = None, optimizer.state.get(p.stepped, {})


def twin_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same kind that may get other groups and another state."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer))
    return twin


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state is no tensor, or has no dims."""
    return {
        key: x.item() if isinstance(x, torch.Tensor) else x
        for key, x in state.items()
        if not isinstance(x, torch.Tensor) or not x.ndim
    }


def _is_alone(t: torch.Tensor | None) -> bool:
    """Whether a tensor that was watched has a storage to itself: writes through others would not
    have been noticed."""
    assert t is not None
    storage = t.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata)
    return users <= _HOLDERS and storage.nbytes() == t.nbytes


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = _BITS[a.itemsize]
    return torch.equal(a.view(bits), b.view(bits))


@torch.no_grad()
def _exchange(a: torch.Tensor, b: torch.Tensor) -> None:
    """Exchange the memory of two tensors of one layout; both stay the same objects."""
    of_a, of_b = a.untyped_storage(), b.untyped_storage()
    a.set_(of_b, b.storage_offset(), b.size(), b.stride())
    b.set_(of_a, 0, a.size(), a.stride())
