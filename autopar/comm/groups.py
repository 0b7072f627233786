"""Communicators: one `Group` per mesh axis and rank, found by name from inside graphs.

A graph names the group of each collective as a string, so that the same program runs on a process
group (`ProcessGroup`), on threads that stand in for ranks (`thread_groups`), or only in shapes
(a bare `Group`, for planning without any communication).
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from autopar.errors import EngineError

_REGISTRY: dict[str, Group] = {}
# Of the groups of all axes of a mesh, that of all its ranks.
_JOINED: dict[frozenset[str], str] = {}

_Sums = TypeVar("_Sums", bound=Callable[..., torch.Tensor])
Wait = Callable[[], None]  # until a collective that was started is done

# torch 2.13 renames both and warns of the old names, which 2.11 has alone.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group:
    """Ranks along one mesh axis. The base class knows shapes only and cannot communicate.

    Args:
        name: key in the registry, used in graphs.
        size: number of ranks.
        index: this rank's position.
    """

    def __init__(self, name: str, size: int, index: int) -> None:
        self.name, self.size, self.index = name, size, index
        _REGISTRY[name] = self

    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        """Elementwise `op` ("sum" or "max") over the group; a new tensor."""
        raise NotImplementedError(f"group {self.name} was made for planning and cannot communicate")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[...] on each rank to [size, ...] on all."""
        raise NotImplementedError(f"group {self.name} was made for planning and cannot communicate")

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """[size, ...] on each rank to the sum of the slices [index], [...]."""
        raise NotImplementedError(f"group {self.name} was made for planning and cannot communicate")

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """[size, ...]: slice i goes to rank i; slice j of the result came from rank j."""
        raise NotImplementedError(f"group {self.name} was made for planning and cannot communicate")

    def reduce_row(self, xs: Sequence[torch.Tensor], op: str) -> torch.Tensor:
        """`all_reduce` of several of one dtype, one behind the other in a row, [all elements]."""
        row = torch.cat([x.reshape(-1) for x in xs])
        if row.dtype is torch.bool:
            return self.all_reduce(row, op)
        if row.numel():
            self.start_all_reduce(row, op)()
        return row

    def close(self) -> None:
        """Let go of connections; nothing is communicated any more."""

    # Collectives in place that others run beside, until the call of what they return. Here, those
    # that are done at once, of copies, as other threads may still read what was sent.

    def start_all_reduce(self, x: torch.Tensor, op: str) -> Wait:
        """`all_reduce` of x, contiguous, into x."""
        x.copy_(self.all_reduce(x.clone(), op))
        return _done

    def start_all_gather(self, x: torch.Tensor) -> Wait:
        """Slice [index] of x, contiguous, [size, ...], to all ranks, which have it there."""
        x.copy_(self.all_gather(x[self.index].clone()))
        return _done

    def start_reduce_scatter(self, x: torch.Tensor) -> Wait:
        """The sum of the slices [index] of x, contiguous, [size, ...], into that slice; what is in
        the others is lost."""
        x[self.index].copy_(self.reduce_scatter(x.clone()))
        return _done


def _done() -> None:
    """Of what is done at once."""


def forget_groups() -> None:
    """Let go of all communicators."""
    for group in _REGISTRY.values():
        group.close()
    _REGISTRY.clear()
    _JOINED.clear()


def registered(name: str) -> Group | None:
    """The group of that name, if there is one."""
    return _REGISTRY.get(name)


def find_group(name: str) -> Group:
    """The registered group of that name."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise KeyError(f"no communicator named {name!r}; registered: {sorted(_REGISTRY)}") from None


def truth_as_bytes(collective: _Sums) -> _Sums:
    """A collective that adds, of truth values too, which backends do not add: they go as bytes."""

    @functools.wraps(collective)
    def of_any(self: Group, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if x.dtype is torch.bool:
            return collective(self, x.to(torch.uint8), *rest).to(torch.bool)
        return collective(self, x, *rest)

    return cast(_Sums, of_any)


class ProcessGroup(Group):
    """A `torch.distributed` process group (NCCL, Gloo)."""

    def __init__(self, name: str, group: dist.ProcessGroup) -> None:
        super().__init__(name, group.size(), group.rank())
        self.group = group

    @contextmanager
    def _reporting(self, what: str, x: torch.Tensor) -> Iterator[None]:
        """A failed collective nearly always means that another rank is gone: say so."""
        try:
            yield
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self.group)
            raise EngineError(
                f"rank {dist.get_rank()}: {what} of shape {tuple(x.shape)} with ranks {ranks} "
                f"failed: {str(error).splitlines()[0]}\n  Another rank has died, or runs a "
                "different program; look for the first error among the other ranks' output."
            ) from error

    @truth_as_bytes
    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        with self._reporting("all-reduce", x):
            dist.all_reduce(out, kind, group=self.group)
        return out

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((self.size, *x.shape))
        with self._reporting("all-gather", x):
            _ALL_GATHER(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out

    @truth_as_bytes
    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[1:])
        with self._reporting("reduce-scatter", x):
            _REDUCE_SCATTER(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        with self._reporting("all-to-all", x):
            dist.all_to_all_single(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out

    def _started(self, what: str, x: torch.Tensor, start: Callable[[], Any]) -> Wait:
        """Start a collective of torch's with `async_op`."""
        with self._reporting(what, x):
            work = start()

        def wait() -> None:
            with self._reporting(what, x):
                work.wait()

        return wait

    def start_all_reduce(self, x: torch.Tensor, op: str) -> Wait:
        kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        return self._started(
            "all-reduce", x, lambda: dist.all_reduce(x, kind, group=self.group, async_op=True)
        )

    def start_all_gather(self, x: torch.Tensor) -> Wait:
        own = x[self.index].view(-1)
        return self._started(
            "all-gather", x, lambda: _ALL_GATHER(x.view(-1), own, self.group, async_op=True)
        )

    def start_reduce_scatter(self, x: torch.Tensor) -> Wait:
        own = x[self.index].view(-1)
        return self._started(
            "reduce-scatter", x,
            lambda: _REDUCE_SCATTER(own, x.view(-1), group=self.group, async_op=True),
        )  # fmt: skip


class _Exchange:
    """Rendezvous of the threads of one group: every call deposits a tensor and takes all."""

    def __init__(self, size: int, timeout: float) -> None:
        self.slots: list[torch.Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)

    def __call__(self, index: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.slots[index] = x
        self.barrier.wait()
        taken = [t for t in self.slots if t is not None]
        self.barrier.wait()
        return taken


class ThreadGroup(Group):
    """Ranks as threads of one process, for simulating a mesh without processes."""

    def __init__(self, name: str, index: int, exchange: _Exchange) -> None:
        super().__init__(name, len(exchange.slots), index)
        self._exchange = exchange

    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        stacked = torch.stack(self._exchange(self.index, x.detach()))
        return stacked.sum(0).to(x.dtype) if op == "sum" else stacked.amax(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(self.index, x.detach()))

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        parts = [t[self.index] for t in self._exchange(self.index, x.detach())]
        return torch.stack(parts).sum(0).to(x.dtype)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([t[self.index] for t in self._exchange(self.index, x.detach())])


def axis_groups(
    prefix: str,
    mesh: Sequence[int],
    make: Callable[[str, int], Group],
    make_joined: Callable[[str], Group],
) -> tuple[str, ...]:
    """Register one group per mesh axis for a rank, and where these are several, one of all ranks.

    Args:
        make: the group of this name, along this axis.
        make_joined: the group of this name of all ranks.

    Returns:
        the names of those along axes.
    """
    names = tuple(make(f"{prefix}/axis{axis}", axis).name for axis in range(len(mesh)))
    split = frozenset(name for name, size in zip(names, mesh, strict=True) if size > 1)
    if len(split) > 1:
        _JOINED[split] = make_joined(f"{prefix}/all").name
    return names


def joined(names: Collection[str]) -> str | None:
    """The group of all ranks, where these are those along all axes of more than one rank."""
    return _JOINED.get(frozenset(names))


def _flat(mesh: Sequence[int], coords: Sequence[int]) -> tuple[int, int]:
    """Number of ranks, and the place among them."""
    return math.prod(mesh), int(np.ravel_multi_index(tuple(coords), tuple(mesh)))


def axis_of(name: str) -> int:
    """The mesh axis of a group that `axis_groups` named."""
    return int(name.rpartition("/axis")[2])


def planning_groups(
    mesh: Sequence[int], coords: Sequence[int], prefix: str = "plan"
) -> tuple[str, ...]:
    """Groups that know only sizes and positions."""
    where = ",".join(map(str, coords))
    return axis_groups(
        f"{prefix}/{where}", mesh,
        lambda name, a: Group(name, mesh[a], coords[a]),
        lambda name: Group(name, *_flat(mesh, coords)),
    )  # fmt: skip


def thread_groups(
    mesh: Sequence[int], prefix: str = "threads", timeout: float = 120.0
) -> dict[tuple[int, ...], tuple[str, ...]]:
    """Groups for all ranks of a mesh simulated by threads: coordinates to names per axis."""
    exchanges: dict[tuple[int, tuple[int, ...]], _Exchange] = {}
    world = _Exchange(math.prod(mesh), timeout)
    found = {}
    for coords in product(*(range(size) for size in mesh)):

        def make(name: str, axis: int, coords: tuple[int, ...] = coords) -> Group:
            key = (axis, coords[:axis] + coords[axis + 1 :])
            if key not in exchanges:
                exchanges[key] = _Exchange(mesh[axis], timeout)
            return ThreadGroup(name, coords[axis], exchanges[key])

        def make_joined(name: str, coords: tuple[int, ...] = coords) -> Group:
            return ThreadGroup(name, _flat(mesh, coords)[1], world)

        where = ",".join(map(str, coords))
        found[coords] = axis_groups(f"{prefix}/{where}", mesh, make, make_joined)
    return found


DEFAULT_TIMEOUT = timedelta(minutes=5)
