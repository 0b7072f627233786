"""Tensors without memory that know how their values are computed.

A `DeferredTensor` has a shape, a dtype and strides. Every operator on it is recorded instead of
run, and `compute()` runs what the values depend on, and nothing else. Views share a `Memory`, as
views of real tensors share a storage, so a view needs no operator: its geometry over the memory
says it all.

Random operators advance their generator at once, on memory that is freed again, and remember its
state. So any tensor can be drawn on its own, in any order, with the numbers of an undeferred run.

Private to torch here: `Tensor._make_wrapper_subclass`, `Tensor._is_param` and
`UntypedStorage._cdata`; tested with 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autopar.errors import EngineError
from autopar.runtime.deferred_operations import (
    Constant,
    Geometry,
    Memory,
    Operation,
    Read,
    compute,
    history,
)
from autopar.runtime.freed_memory import return_freed_memory

aten = torch.ops.aten

# In-place operators that write all of their first argument and read none of it.
_OVERWRITES = frozenset(
    "normal_ uniform_ random_ exponential_ geometric_ cauchy_ log_normal_ fill_ zero_ copy_".split()
)


@dataclass(frozen=True, eq=False)
class Deferred:
    """The record behind a tensor: its geometry, as a tensor on the meta device, and its memory."""

    meta: torch.Tensor
    memory: Memory

    def compute(self) -> torch.Tensor:
        """The values, as a new plain tensor on the CPU."""
        return compute(self.memory, Geometry.of(self.meta))

    @property
    def is_written(self) -> bool:
        """Whether anything but allocating it was recorded."""
        last = self.memory.last
        return last is not self.memory.created or not last.func.__name__.startswith("empty")


def digests(records: Sequence[Deferred]) -> list[str]:
    """A hash per record of how its values come about; equal hashes, equal values."""
    known: dict[Operation, str] = {}
    out = []
    for record in records:
        for op in history(record.memory.last):
            if op not in known:
                known[op] = op.digest(known)
        out.append(known[record.memory.last] + str(Geometry.of(record.meta)))
    return out


class DeferredTensor(torch.Tensor):
    """A tensor without memory. It counts as one on the CPU."""

    _deferred: Deferred
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, record: Deferred) -> DeferredTensor:
        meta = record.meta
        x: DeferredTensor = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(),
            dtype=meta.dtype, device=torch.device("cpu"),
        )  # fmt: skip
        x._deferred = record
        return x

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return record(func, args, kwargs or {})

    def compute(self) -> torch.Tensor:
        """The values, as a new plain tensor or parameter on the CPU."""
        x = self._deferred.compute()
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(x, self.requires_grad)
        return x.requires_grad_(self.requires_grad)

    @property
    def data(self) -> Any:
        with torch.no_grad():
            return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, DeferredTensor):
            value = record(aten.clone.default, (value.detach(),), {})
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._deferred = value._deferred  # type: ignore[attr-defined]

    def tolist(self) -> Any:
        return self._deferred.compute().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return self._deferred.compute().numpy()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._deferred.compute().__array__(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "Parameter" if isinstance(self, torch.nn.Parameter) else "tensor"
        return f"deferred {kind} of shape {list(self.shape)} and {self.dtype}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            twin: Any = self.clone()
        if isinstance(self, torch.nn.Parameter):
            twin._is_param = True
        held = {k: v for k, v in self.__dict__.items() if k not in ("_deferred", "_is_param")}
        twin.__dict__.update({k: memo.get(id(v), v) for k, v in held.items()})
        memo[id(self)] = twin.requires_grad_(self.requires_grad)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.compute().__reduce_ex__(protocol)


def is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _depends_on_values(func: Any) -> bool:
    """Whether a shape or a Python number depends on values."""
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags)


def record(func: Any, args: Any, kwargs: Any) -> Any:
    """Record an operator, and give what it returns as deferred tensors; where Python asks for
    values, or a plain tensor is written, run it now on values.

    Raises:
        EngineError: a device that is not the CPU, or a change that cannot be recorded.
    """
    kwargs = _on_cpu(func, kwargs)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    written = _written(func, args, kwargs)
    strange = [type(x) for x in tensors if type(x) not in _KNOWN and not _is_parameter(x)]
    if strange:
        raise EngineError(
            f"{func} mixes a deferred tensor with a {strange[0].__name__}; give deferred tensors "
            "to auto_engine within the model, or take their values with compute()"
        )
    if func._schema.name == "aten::set_":
        return _share_memory(func, *args)
    if any(not isinstance(x, DeferredTensor) for x in written) or _depends_on_values(func):
        return _now(func, args, kwargs)
    try:
        out = _on_meta(func, args, kwargs)
    except NotImplementedError:  # no meta function
        if not written:
            return _now(func, args, kwargs)
        out = written[0]._deferred.meta if len(written) == 1 else None
    if written:
        _check_shapes(func, written)
    elif (views := _as_views(tensors, out)) is not None:
        return views
    return _remember(func, args, kwargs, written, out)


def _share_memory(func: Any, x: Any, source: Any = None, *_: Any) -> Any:
    """`x.set_(source)`: a tensor lies in the memory of another one of its geometry."""
    deferred = isinstance(x, DeferredTensor) and isinstance(source, DeferredTensor)
    if not deferred or Geometry.of(x) != Geometry.of(source):
        raise EngineError(
            f"{func} gives a deferred tensor other memory or another shape, which cannot be "
            "recorded; make a new tensor instead"
        )
    x._deferred = source._deferred
    return x


_KNOWN = (torch.Tensor, torch.nn.Parameter, DeferredTensor)


def _is_parameter(x: torch.Tensor) -> bool:
    return isinstance(x, DeferredTensor | torch.nn.Parameter)


def _on_cpu(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the device, if there is one, the CPU."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type not in ("cpu", "meta"):
        raise EngineError(
            f"{func} puts a tensor of deferred_init on {device}, but deferred tensors have the "
            "values of the CPU; leave the device out, auto_engine moves the shards to their devices"
        )
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    return kwargs if device is None else kwargs | {"device": torch.device("cpu")}


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The tensors that an operator writes."""
    out: list[Any] = []
    for i, schema in enumerate(func._schema.arguments):
        if schema.alias_info is not None and schema.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(schema.name)
            out += [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
    return out


def _now(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on values."""
    if any(isinstance(x, DeferredTensor) for x in _written(func, args, kwargs)):
        raise EngineError(
            f"{func} writes a deferred tensor in a way that cannot be recorded; compute it in a "
            "new tensor, or build this part of the model outside of deferred_init"
        )
    args, kwargs = pytree.tree_map_only(
        DeferredTensor, lambda x: x._deferred.compute(), (args, kwargs)
    )
    return func(*args, **kwargs)


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator returns, on the meta device."""

    def meta(x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, DeferredTensor):
            return x._deferred.meta
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    args, kwargs = pytree.tree_map_only(torch.Tensor, meta, (args, kwargs))
    if "device" in kwargs or any(a.name == "device" for a in func._schema.arguments):
        creates = kwargs.get("device") is not None or not any(
            isinstance(x, torch.Tensor) for x in pytree.tree_leaves((args, kwargs))
        )
        kwargs = kwargs | {"device": torch.device("meta")} if creates else kwargs
    generators = [k for k, v in kwargs.items() if isinstance(v, torch.Generator)]
    with torch.no_grad():
        return func(*args, **kwargs | dict.fromkeys(generators))


def _check_shapes(func: Any, written: Sequence[DeferredTensor]) -> None:
    for x in written:
        meta = x._deferred.meta
        if meta.shape != x.shape or meta.stride() != x.stride():
            raise EngineError(
                f"{func} changes a deferred tensor of shape {list(x.shape)} in place to "
                f"{list(meta.shape)}, which cannot be recorded; make a new tensor instead"
            )


def _as_views(tensors: Sequence[torch.Tensor], out: Any) -> Any:
    """Results that are views of arguments, which need no record; None if any is not."""
    deferred = [x._deferred for x in tensors if isinstance(x, DeferredTensor)]
    memories = {d.meta.untyped_storage()._cdata: d.memory for d in deferred}
    leaves = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
    if not leaves or any(x.untyped_storage()._cdata not in memories for x in leaves):
        return None
    if any(x.is_conj() or x.is_neg() for x in leaves):
        raise EngineError(
            "deferred_init does not record lazy conjugates; use torch.conj_physical, or build this "
            "part of the model outside of it"
        )

    def view(x: torch.Tensor) -> DeferredTensor:
        return DeferredTensor.of(Deferred(x, memories[x.untyped_storage()._cdata]))

    return pytree.tree_map_only(torch.Tensor, view, out)


def _remember(func: Any, args: Any, kwargs: Any, written: Sequence[Any], out: Any) -> Any:
    """Record an operator that writes its arguments or returns new tensors."""
    name = func._schema.name.partition("::")[2]
    whole = name in _OVERWRITES and _covers_memory(written[0]._deferred)

    def stored(x: torch.Tensor) -> Read | Constant:
        if not isinstance(x, DeferredTensor):
            return Constant.of(x)
        memory = x._deferred.memory
        after = memory.created if whole and x is written[0] else memory.last
        return Read(memory, after, Geometry.of(x._deferred.meta))

    state = _advance(func, name, args, kwargs, written) if is_random(func) else None
    args, kwargs = pytree.tree_map_only(torch.Tensor, stored, (args, kwargs))
    args, kwargs = pytree.tree_map_only(torch.Generator, lambda _: None, (args, kwargs))
    op = Operation(func, args, kwargs, torch.get_default_dtype(), state)
    if written:
        for x in written:
            x._deferred.memory.last = op
        return _returned(func, written)
    memories: dict[int, Memory] = {}

    def new(x: torch.Tensor) -> DeferredTensor:
        memory = memories.setdefault(x.untyped_storage()._cdata, Memory(op, op))
        return DeferredTensor.of(Deferred(x, memory))

    deferred = pytree.tree_map_only(torch.Tensor, new, out)
    op.results = [
        (x._deferred.memory, Geometry.of(x._deferred.meta))
        if isinstance(x, DeferredTensor)
        else None
        for x in pytree.tree_leaves(deferred)
    ]
    return deferred


def _returned(func: Any, written: Sequence[Any]) -> Any:
    """What an operator returns that returns nothing, or what it writes."""
    returns = func._schema.returns
    if not returns:
        return None  # of `_foreach` operators
    if len(returns) == 1:
        return written[0] if len(written) == 1 else list(written)
    return tuple(written)


def _covers_memory(record: Deferred) -> bool:
    """Whether a tensor is all of its memory, without gaps."""
    meta = record.meta
    dense = sorted(zip(meta.stride(), meta.shape, strict=True))
    expected = 1
    for stride, size in dense:
        if size != 1 and stride != expected:
            return False
        expected *= size
    return meta.nbytes == meta.untyped_storage().nbytes()


def _advance(func: Any, name: str, args: Any, kwargs: Any, written: Sequence[Any]) -> torch.Tensor:
    """Draw the numbers of a random operator and forget them; the generator's state before it."""
    shape_only = name.endswith("_like") or name in _OVERWRITES
    generators = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Generator)]
    generator = generators[0] if generators else torch.default_generator
    state = generator.get_state()

    def scratch(x: DeferredTensor) -> torch.Tensor:
        if shape_only:
            meta = x._deferred.meta
            return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
        return x._deferred.compute()

    args, kwargs = pytree.tree_map_only(DeferredTensor, scratch, (args, kwargs))
    with torch.no_grad():
        out = func(*args, **kwargs)
    nbytes = sum(x.nbytes for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
    del args, kwargs, out
    return_freed_memory(nbytes)
    return state
