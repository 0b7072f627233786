"""Counts dispatched operators: FLOPs, bytes, kernels, and storages as they are made and freed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from autopar.ir.aliasing import overwritable_arguments, tensors_of
from autopar.profiler.tape import GRADIENT, OWN, Count, Event, Storage


@dataclass(frozen=True)
class Work:
    """The work of kernels, at global shapes: numbers, or expressions in the symbols of a dynamic
    graph.

    Args:
        flops: multiply and add count as two.
        read_bytes, written_bytes: operands and results of the kernels. Elements that a broadcast
            repeats count once; views cost nothing.
        kernels: number of operators launched.
    """

    flops: Count = 0
    read_bytes: Count = 0
    written_bytes: Count = 0
    kernels: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
            self.kernels + other.kernels,
        )


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """As torch counts it. Torch 2.11 refuses heads that share keys."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The scores again, and the gradients of scores and operands."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _grouped_product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """The groups share the rows of one operand, or the summed dim of both."""
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]


_ATTENTION = [
    f"aten::_scaled_dot_product_{kind}_attention{device}"
    for kind, device in (("flash", "_for_cpu"), ("flash", ""), ("efficient", ""), ("cudnn", ""))
]

# Formulas that torch's table lacks: attention on the CPU and with shared keys, by the convention of
# its other attention kernels (the causal half is not discounted), and the grouped products of
# mixtures of experts. Other operators can register one with
# `torch.utils.flop_counter.register_flop_formula`.
MISSING_FLOPS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(_ATTENTION, _attention),
    **{f"{kernel}_backward": _attention_backward for kernel in _ATTENTION},
    "aten::_grouped_mm": _grouped_product,
    "transformers::grouped_mm_fallback": _grouped_product,
    "transformers::grouped_mm_fallback_backward": lambda *args, **_: 2 * _grouped_product(*args),
}


def count(value: Any) -> Count:
    """A number as an int, a symbolic size as a sympy expression."""
    return value.node.expr if isinstance(value, torch.SymInt) else int(value)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    formula = MISSING_FLOPS.get(func._schema.name)
    if formula is not None:
        return formula(*pytree.tree_map_only(torch.Tensor, lambda t: t.shape, args))
    if func.overloadpacket in flop_registry:
        return flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
    return 0


def _elements_bytes(values: Iterable[torch.Tensor]) -> Any:
    """Bytes of distinct elements. A dim of stride 0 repeats the same elements."""
    total: Any = 0
    for t in values:
        n: Any = t.element_size()
        for size, stride in zip(t.shape, t.stride(), strict=True):
            if not (isinstance(stride, int) and stride == 0):
                n = n * size
        total = total + n
    return total


class Recorder(TorchDispatchMode):
    """Adds up the work of all operators inside, and records storages as they are made and freed.

    Storages that were named before (operands, incoming gradients) keep their names. All others get
    numbers. The recorder keeps nothing alive.

    Attributes:
        sizes: bytes of the numbered storages.
        events: events since the last `take`.
        overwrites: numbers of storages of results, and of operands in whose place they fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[Count] = []
        self.events: list[Event] = []
        self.overwrites: list[tuple[int, int]] = []
        self.open = True
        self._names: dict[int, Storage] = {}
        self._watched: dict[Any, int] = {}
        self._flops: Any = 0
        self._read: Any = 0
        self._written: Any = 0
        self._kernels = 0

    def take(self) -> tuple[Work, tuple[Event, ...]]:
        """Work and events since the last call."""
        work = Work(count(self._flops), count(self._read), count(self._written), self._kernels)
        events = tuple(self.events)
        self._flops = self._read = self._written = self._kernels = 0
        self.events = []
        return work, events

    def name(self, t: torch.Tensor, name: Storage) -> None:
        """Name the tensor's storage, and record its end."""
        storage = t.untyped_storage()
        self._names[storage._cdata] = name
        self._watched[weakref.ref(storage, self._freed)] = storage._cdata

    def storage(self, t: torch.Tensor) -> Storage:
        """The storage's name; a new number if it has none (no operator made it)."""
        storage = t.untyped_storage()
        if storage._cdata not in self._names:
            self.name(t, Storage(OWN, len(self.sizes)))
            self.events.append(Event("make", len(self.sizes)))
            self.sizes.append(count(storage.nbytes()))
        return self._names[storage._cdata]

    def _freed(self, reference: Any) -> None:
        name = self._names.pop(self._watched.pop(reference))
        if self.open and name.owner == OWN:
            self.events.append(Event("free", name.number))
        elif self.open and name.owner == GRADIENT:
            self.events.append(Event("spend", name.number))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # fake tensors call it often
            return out
        before = {t.untyped_storage()._cdata for t in tensors_of((args, kwargs))}
        results = tensors_of(out)
        self._flops = self._flops + _flops(func, args, kwargs, out)
        for t in results:
            self.storage(t)
        self._note_overwrites(func, args, out)
        if func._schema.is_mutable:
            self._move(*_traffic_of_mutation(func, args, kwargs))
        elif any(t.untyped_storage()._cdata not in before for t in results):
            self._move(tensors_of((args, kwargs)), results)
        return out

    def _note_overwrites(self, func: Any, args: Any, out: Any) -> None:
        """Note which of the call's own storages its result would fit over; of symbolic sizes none,
        since a comparison would make them numbers."""
        sizes = (n for t in tensors_of((args, out)) for n in (*t.shape, *t.stride()))
        if any(isinstance(n, torch.SymInt) for n in sizes):
            return
        for k in overwritable_arguments(func, args, out):
            old, new = self._names.get(args[k].untyped_storage()._cdata), self.storage(out)
            if old is not None and old.owner == new.owner == OWN and old != new:
                self.overwrites.append((new.number, old.number))

    def _move(self, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        self._read = self._read + _elements_bytes(read)
        self._written = self._written + _elements_bytes(written)
        self._kernels += 1


def _traffic_of_mutation(
    func: Any, args: Any, kwargs: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """An in-place operator reads and writes its target; an operator with `out=` only writes it."""
    read: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    names = [a.name for a in func._schema.arguments]
    values = dict(zip(names, args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        tensors = tensors_of(values.get(argument.name))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written += tensors
        if not (writes and argument.kwarg_only):
            read += tensors
    return read, written
