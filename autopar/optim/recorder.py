"""Records what an optimizer's step does to sharded tensors, and runs it on shards when it must.

While a `Recorder` is on, an operator that takes a DTensor or a `LazyTensor` is noted and gives
`LazyTensor`s, which have a global shape and no elements. The optimizer's own Python code runs at
each step, so whatever it branches on, counts or schedules is as on a single device. The recording
runs when the step ends or Python asks for a number.

Memory is as the optimizer sees it: operators in place write the shards. An operator on plain
tensors runs at once, unless it reads what is still to be written, or writes what is still to be
read: then it is recorded too. Before one on the local tensor of a DTensor, the recording runs.

Private to torch here: `DTensor._local_tensor`, and storages' `_cdata`; tested with 2.13.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Partial
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from autopar.comm.owned_shards import Owned
from autopar.errors import EngineError
from autopar.optim.layout import Layout
from autopar.optim.lazy_numbers import LazyNumber, number_of_value
from autopar.optim.recording import (
    Call,
    Formula,
    NumberOf,
    Recording,
    Ref,
    Slot,
    Traits,
    Value,
    filled,
    number_of,
    ref,
    slot,
    traits,
    written_values,
)

# Runs a recording: shards of the inputs to those of the values that are still wanted.
Run = Callable[
    [Recording, Sequence[Any], Sequence[int], frozenset[int]], Sequence[tuple[Any, Layout]]
]

_DETACH = torch.ops.aten.detach.default
_CLONE = torch.ops.aten.clone.default
_COPY = torch.ops.aten.copy_.default
_ITEM = torch.ops.aten._local_scalar_dense.default


_PLAIN = torch.Tensor.__torch_dispatch__

# Inputs that are remembered between steps.
_MOST_KNOWN = 100_000


class _Described(NamedTuple):
    """An input.

    Args:
        memory: the same for two handles of the same elements.
        storage: None if this rank holds no part.
    """

    value: Value
    layout: Layout
    memory: Any
    storage: int | None


class NotRecorded(Exception):
    """An operator takes what a recording cannot have."""


class CannotPlan(Exception):
    """A recording cannot run on shards; its operators run on DTensors one after another."""


class LazyTensor(torch.Tensor):
    """A value of a recording: a global shape, and elements when the recording has run.

    Attributes:
        shard: this rank's part and its layout, once it is known. The part is None on ranks that
            hold none.
        view_of: of a view the operator, its arguments and which of its results this is. After a
            recording has run, a view is taken again where it is used.
    """

    is_lazy = True
    shard: tuple[torch.Tensor | None, Layout] | None
    view_of: tuple[Any, Any, Any, int] | None
    _segment: int
    _number: int
    _mesh: DeviceMesh

    @staticmethod
    def of(value: Value, mesh: DeviceMesh, segment: int, number: int) -> LazyTensor:
        x: LazyTensor = torch.Tensor._make_wrapper_subclass(
            LazyTensor, value.shape, strides=value.stride, dtype=value.dtype, device=value.device
        )
        x.shard, x.view_of, x._mesh, x._segment, x._number = None, None, mesh, segment, number
        return x

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Outside of a recording it is the DTensor that it became."""
        args, kwargs = pytree.tree_map_only(LazyTensor, LazyTensor.as_dtensor, (args, kwargs or {}))
        return op(*args, **kwargs)

    def as_dtensor(self) -> Any:
        """The same value over the same memory."""
        if self.view_of is not None:
            op, args, kwargs, index = self.view_of
            with torch.no_grad():
                made = op(*pytree.tree_map_only(LazyTensor, LazyTensor.as_dtensor, args), **kwargs)
            return made if isinstance(made, torch.Tensor) else made[index]
        assert self.shard is not None, "its recording has run"
        local, layout = self.shard
        placements: list[Any] = layout.spec.to_placements(self._mesh.ndim)
        for axis, at in layout.owner:
            placements[axis] = Owned(0, at)
        if local is None:
            local = torch.empty((0, *self.shape[1:]), dtype=self.dtype, device=self.device)
        return DTensor.from_local(
            local, self._mesh, placements, run_check=False, shape=self.shape, stride=self.stride()
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor({list(self.shape)}, {self.dtype}, shard={self.shard})"


class Recorder(TorchDispatchMode):
    """Records what runs while it is on.

    Args:
        mesh: of all DTensors.
        run: runs a recording.
        home_of: the parameter that an input belongs to, by the input's identity; for an entry of
            the optimizer's state or a gradient.
    """

    def __init__(
        self, mesh: DeviceMesh, run: Run, home_of: Callable[[torch.Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        self.mesh, self._run, self._home_of = mesh, run, home_of
        self._segment = 0
        self._known: dict[int, tuple[Any, Any, _Described]] = {}
        self.given: list[weakref.ref[Any]] = []  # values and numbers that outlived their recording
        self._metas: dict[Any, list[Value] | None] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=False)
        self._clear()

    def _clear(self) -> None:
        self._segment += 1
        self._recording = Recording()
        self._tensors: list[torch.Tensor] = []  # the inputs
        self._handles: list[torch.Tensor] = []  # others of the same memory, whose ids are known
        self._by_id: dict[int, tuple[int, int]] = {}  # numbers, with the memory
        self._by_memory: dict[Any, int] = {}
        self._root_of_storage: dict[int, int] = {}
        self._sharded: set[int] = set()  # roots that are local tensors of DTensors
        self._written: set[int] = set()  # roots that the recording writes
        self._read_off: dict[int, list[weakref.ref[LazyNumber]]] = {}  # numbers, per root
        self._views: list[weakref.ref[LazyTensor]] = []
        self._made: list[tuple[int, weakref.ref[LazyTensor]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper around each operator that nothing here needs

    @contextmanager
    def on(self) -> Iterator[None]:
        """Recording, also where it is on already: an operator is recorded once."""
        if self in _get_current_dispatch_mode_stack():
            yield
        else:
            with self:
                yield

    # -- operators --------------------------------------------------------------------------------

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(map(_is_recorded, types)):
            touched = self._touched(op, args, kwargs) if self._recording.calls else ""
            if touched == "shard":
                self.flush()
            if touched != "value":
                return op(*args, **kwargs)
        if op is _ITEM:
            return self._item(args[0])
        known = traits(op)
        try:
            if known.without_out is not None:
                made = self._record(known.without_out, traits(known.without_out), args,
                                    {k: v for k, v in kwargs.items() if k != "out"})  # fmt: skip
                return self._record(_COPY, traits(_COPY), (kwargs["out"], made), {})
            if known.by_itself:
                return self._by_itself(op, args, kwargs)
            return self._record(op, known, args, kwargs)
        except NotRecorded:
            return self._by_itself(op, args, kwargs)

    def _record(self, op: Any, known: Traits, args: Any, kwargs: Any) -> Any:
        recording, place, before = self._recording, self._place, len(self._recording.numbers)
        scalars = known.scalars
        template = tuple(place(a, i in scalars) for i, a in enumerate(args))
        named = tuple((k, place(v, k in scalars)) for k, v in kwargs.items())
        if recording is not self._recording:  # a number was asked for, so that it ran
            return self._record(op, known, args, kwargs)
        if known.writes:
            for i in known.writes:
                for place in template[i] if type(template[i]) is tuple else (template[i],):
                    root = recording.roots[place.number]
                    if root in self._read_off and self._numbers_are_known(root):
                        return self._record(op, known, args, kwargs)
                    self._written.add(root)
            recording.note(Call(op, template, named, ()))
            if known.lists or not op._schema.returns:
                return None
            if len(known.writes) == 1:
                return args[known.writes[0]]
            return tuple(args[i] for i in known.writes)
        metas = self._metas_of(op, template, named)
        if metas is None:
            del recording.numbers[before:]
            raise NotRecorded
        results, numbers = [], []
        for index, meta in enumerate(metas):
            number = recording.add(meta)
            root = recording.roots[template[0].number] if known.view else number
            x = LazyTensor.of(meta, self.mesh, self._segment, number)
            recording.roots.append(root)
            if known.view:
                x.view_of = op, args, kwargs, index
                self._views.append(weakref.ref(x))
            else:
                self._made.append((number, weakref.ref(x)))
            results.append(x)
            numbers.append(number)
        recording.note(Call(op, template, named, tuple(numbers)))
        several = len(op._schema.returns) > 1
        if not several and "List" not in str(op._schema.returns[0].type):
            return results[0]
        return tuple(results) if several else results

    def _place(self, a: Any, scalar: bool) -> Any:
        """An argument as a recording has it."""
        if isinstance(a, torch.Tensor):
            return self._ref(a.trigger_wait() if type(a) is AsyncCollectiveTensor else a)
        kind = type(a)
        if scalar and (kind is float or kind is int):
            self._recording.numbers.append(a)
            return slot(len(self._recording.numbers) - 1, kind)  # type: ignore[arg-type]
        if kind is list or kind is tuple:
            return tuple([self._place(x, scalar) for x in a])
        if isinstance(a, torch.SymFloat):
            return self._number_place(a.node) if scalar else self._place(float(a), scalar)
        return a

    def _number_place(self, x: Any) -> Any:
        """A number as a recording has it: known, read off a value, or computed."""
        if not isinstance(x, LazyNumber) or x.known is not None:
            number = x.known if isinstance(x, LazyNumber) else x
            self._recording.numbers.append(number)
            return slot(len(self._recording.numbers) - 1, type(number))  # type: ignore[arg-type]
        if x.name is None:
            return number_of(self._ref(x.operands[0]).number)
        return Formula(x.name, tuple(map(self._number_place, x.operands)))

    def _ref(self, x: torch.Tensor) -> Ref:
        if type(x) is LazyTensor:
            if x._segment == self._segment:
                return ref(x._number)
            if x.view_of is None:
                return ref(self._input(x))
            op, args, kwargs, index = x.view_of
            made = self._record(op, traits(op), args, kwargs)
            again = made if isinstance(made, LazyTensor) else made[index]
            x._segment, x._number = again._segment, again._number
            return ref(x._number)
        known = self._by_id.get(id(x))
        # `p.data = ...` may have put other memory in the place of what is known
        if known is not None and known[1] == _memory(x):
            return ref(known[0])
        return ref(self._input(x))

    def _input(self, x: torch.Tensor) -> int:
        """Note a tensor that was there before; two handles of the same memory are one value."""
        described = self._described(x)
        number = self._by_memory.get(described.memory)
        if number is None:
            recording, number = self._recording, len(self._recording.values)
            recording.add(described.value)
            storage, root = described.storage, number
            if storage is not None:
                root = self._root_of_storage.setdefault(storage, number)
                if _is_dtensor(type(x)):
                    self._sharded.add(root)
            recording.roots.append(root)
            recording.inputs.append(number)
            recording.layouts.append(described.layout)
            recording.homes.append(None)
            self._tensors.append(x)
            self._by_memory[described.memory] = number
            if type(x) is not LazyTensor:
                self._by_id[id(x)] = number, _memory(x)
            home = None if self._home_of is None else self._home_of(x)
            at = len(recording.homes) - 1
            if home is not None and home is not x:
                recording.homes[at] = self._ref(home).number
            elif _is_dtensor(type(x)):
                recording.homes[at] = number
        else:
            self._handles.append(x)
            if type(x) is not LazyTensor:
                self._by_id[id(x)] = number, _memory(x)
        if type(x) is LazyTensor:
            x._segment, x._number = self._segment, number
        return number

    def _described(self, x: torch.Tensor) -> _Described:
        """What an input is like; of DTensors, which mostly stay, remembered."""
        if not _is_dtensor(type(x)):
            return self._describe(x)
        known = self._known.get(id(x))
        dtensor: Any = x
        if known is not None and known[1] is dtensor._spec and known[0]() is dtensor._local_tensor:
            return known[2]
        described = self._describe(x)
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        self._known[id(x)] = weakref.ref(dtensor._local_tensor), dtensor._spec, described
        return described

    def _describe(self, x: torch.Tensor) -> _Described:
        if type(x).__torch_dispatch__ is not _PLAIN and not _is_recorded(type(x)):
            raise NotRecorded
        if x.layout is not torch.strided or x.is_quantized or (x.requires_grad and not x.is_leaf):
            raise NotRecorded
        local, layout = self._shard(x)
        value = Value(tuple(x.shape), tuple(x.stride()), x.dtype, x.device)
        if local is None:
            return _Described(value, layout, ("absent", id(x)), None)
        storage = _storage(local)
        memory = storage, local.storage_offset(), local.shape, local.stride(), value.shape
        return _Described(value, layout, memory, storage)

    def _shard(self, x: torch.Tensor) -> tuple[torch.Tensor | None, Layout]:
        if type(x) is LazyTensor:
            assert x.shard is not None
            return x.shard
        if _is_dtensor(type(x)):
            dtensor: Any = x
            spec = dtensor._spec
            known = all(map(_is_known, spec.placements))
            if not known or (spec.mesh is not self.mesh and spec.mesh != self.mesh):
                raise NotRecorded
            return dtensor._local_tensor, _layout_of(spec.placements, len(spec.shape))
        return x, Layout.replicated(x.ndim)

    def _metas_of(self, op: Any, template: Any, named: Any) -> list[Value] | None:
        """What an operator's results are like; None if that depends on elements."""
        kinds = self._recording.kinds

        def described(place: Any) -> Any:
            kind = type(place)
            if kind is Ref:
                return kinds[place.number]
            if kind is tuple:
                return tuple([described(x) for x in place])
            if kind is Slot:
                return place.kind
            return float if kind is NumberOf or kind is Formula else place

        key = (id(op), described(template), *[(k, described(v)) for k, v in named])
        if key not in self._metas:
            self._metas[key] = self._inferred(op, template, named)
        return self._metas[key]

    def _inferred(self, op: Any, template: Any, named: Any) -> list[Value] | None:
        values, numbers = self._recording.values, self._recording.numbers

        def fake(place: Any) -> Any:
            if type(place) is not Ref:
                return numbers[place.number] if type(place) is Slot else 1.0
            v = values[place.number]
            return torch.empty_strided(v.shape, v.stride, dtype=v.dtype, device=v.device)

        with self._fake:
            args = filled(template, fake)
            kwargs = {k: filled(v, fake) for k, v in named}
            try:
                made = op(*args, **kwargs)
            except Exception:  # it says so itself, when it runs on DTensors
                return None
        results = made if isinstance(made, list | tuple) else [made]
        if not all(isinstance(x, torch.Tensor) for x in results):
            return None
        return [Value(tuple(x.shape), tuple(x.stride()), x.dtype, x.device) for x in results]

    # -- what runs at once ------------------------------------------------------------------------

    def _touched(self, op: Any, args: Any, kwargs: Any) -> str:
        """What an operator on plain tensors has to do with the recording.

        Returns:
            "value": it reads what is still to be written, or writes what is still to be read;
            "shard": it takes the local tensor of a DTensor; "": neither.
        """
        known = traits(op)
        reads = not known.view or bool(known.writes)
        if op is _DETACH:
            return ""  # as `p.data` does, on all ranks and for no elements
        found = ""
        for i, a in enumerate((*args, *kwargs.values())):
            for x in a if isinstance(a, list | tuple) else (a,):
                if isinstance(x, torch.Tensor):
                    root = self._root_of_storage.get(_storage(x))
                    if root is None:
                        continue
                    if root in self._sharded:
                        return "shard"
                    writes = i in known.writes or i >= len(args)
                    if reads and (writes or root in self._written):
                        found = "value"
        return found

    def _by_itself(self, op: Any, args: Any, kwargs: Any) -> Any:
        """An operator that is not recorded, on DTensors, after all that came before.

        Raises:
            EngineError: it writes a view.
        """
        self.flush()
        for i, argument in enumerate(op._schema.arguments):
            x = args[i] if i < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(x, LazyTensor) and x.view_of is not None:
                raise EngineError(
                    f"this optimizer's step cannot run on shards: {op} writes a view. Compute the "
                    "whole result and write it by p.copy_(...)"
                )
        return op(*pytree.tree_map_only(LazyTensor, LazyTensor.as_dtensor, args),
                  **pytree.tree_map_only(LazyTensor, LazyTensor.as_dtensor, kwargs))  # fmt: skip

    # -- numbers ----------------------------------------------------------------------------------

    def _item(self, x: torch.Tensor) -> Any:
        """A number that Python asks for: later if it is a real one, else now."""
        if not x.dtype.is_floating_point or x.ndim:
            return self.number(x)
        if type(x) is not LazyTensor:
            x = self._record(_CLONE, traits(_CLONE), (x,), {})
        root = self._recording.roots[self._ref(x).number]
        number = number_of_value(x, self)
        self._read_off.setdefault(root, []).append(weakref.ref(number.node))
        return number

    def number(self, x: torch.Tensor) -> Any:
        """The number that a value holds, after all that came before."""
        if type(x) is LazyTensor and x.shard is not None and x.shard[1].is_replicated:
            local = x.shard[0]
            if local is not None and not self._is_written(x):
                return local.item()
        number = self._ref(x).number
        (local,) = self.flush(whole=(number,))
        return local.item()

    def _numbers_are_known(self, root: int) -> bool:
        """Read the numbers of a value that is about to be written; whether the recording ran."""
        numbers = [n for ref in self._read_off[root] if (n := ref()) is not None]
        for number in numbers:
            number.guard_float()
        return bool(numbers)

    def _is_written(self, x: LazyTensor) -> bool:
        """Whether the recording writes what a value of an earlier one shares memory with."""
        local = None if x.shard is None else x.shard[0]
        return local is not None and self._root_of_storage.get(_storage(local)) in self._written

    # -- running ----------------------------------------------------------------------------------

    def flush(self, whole: Sequence[int] = ()) -> list[torch.Tensor]:
        """Run what was recorded, all of it or none.

        Args:
            whole: numbers of values that every rank gets whole.

        Returns:
            those.
        """
        recording, tensors = self._recording, self._tensors
        if not recording.calls and not whole:
            return []
        alive = [(n, x) for n, made in self._made if (x := made()) is not None]
        wanted = [*(n for n, _ in alive), *whole]
        handles = self._handles
        read = [n for refs in self._read_off.values() for r in refs if (n := r()) is not None]
        self.given.extend(self._views)
        self._clear()
        with _disable_current_modes(), torch.no_grad():
            inputs = [self._shard(x)[0] for x in tensors]
            try:
                results = self._run(recording, inputs, wanted, frozenset(whole))
            except CannotPlan as error:
                results = self._on_dtensors(recording, tensors, wanted, whole, error)
        del handles
        for (_, x), shard in zip(alive, results, strict=False):
            x.shard = shard
        self.given.extend(weakref.ref(x) for _, x in alive)
        for number in read:  # before anything writes the value
            number.guard_float()
        self.given.extend(map(weakref.ref, read))
        return [local for local, _ in results[len(alive) :]]

    def _on_dtensors(
        self,
        recording: Recording,
        tensors: Sequence[torch.Tensor],
        wanted: Sequence[int],
        whole: Sequence[int],
        error: CannotPlan,
    ) -> list[tuple[Any, Layout]]:
        """The results of a recording's operators, by DTensors.

        Raises:
            EngineError: views of sharded tensors would lose what is written to them.
        """
        written = {recording.roots[n] for c in recording.calls for n in written_values(c)}
        views = {
            recording.roots[n] for c in recording.calls if traits(c.op).view for n in c.results
        }
        if written & views:
            raise EngineError(
                f"this optimizer's step cannot run on shards: {error}, and writes a view. Compute "
                "the whole result and write it by p.copy_(...)"
            ) from error
        values: dict[int, Any] = {}
        for number, x in zip(recording.inputs, tensors, strict=True):
            values[number] = x.as_dtensor() if isinstance(x, LazyTensor) else x

        def fill(place: Any) -> Any:
            if type(place) is Ref:
                return values[place.number]
            if type(place) is Slot:
                return recording.numbers[place.number]
            return _whole(values[place.number]).item()

        for call in recording.calls:
            made = call.op(*filled(call.args, fill), **{k: filled(v, fill) for k, v in call.kwargs})
            results = made if isinstance(made, list | tuple) else [made]
            values.update(zip(call.results, results, strict=False))
        return [self._given(values[n], n in whole) for n in wanted]

    def _given(self, x: torch.Tensor, whole: bool) -> tuple[torch.Tensor, Layout]:
        """A result's shard; whole if a rank needs that, or if layouts do not have it."""
        if isinstance(x, DTensor) and not whole and x.ndim:
            known = all(_is_known(p) and not p.is_partial() for p in x.placements)
            if known and x.device_mesh == self.mesh:
                return x._local_tensor, Layout.of_placements(x.placements, x.ndim)
        return _whole(x), Layout.replicated(x.ndim)


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _memory(x: torch.Tensor) -> int:
    """What changes when a tensor gets other memory."""
    return id(x._local_tensor) if _is_dtensor(type(x)) else x.data_ptr()  # type: ignore[attr-defined]


@cache
def _is_recorded(kind: type) -> bool:
    return issubclass(kind, LazyTensor | DTensor)


@cache
def _is_dtensor(kind: type) -> bool:
    return issubclass(kind, DTensor)


@cache
def _layout_of(placements: tuple[Any, ...], ndim: int) -> Layout:
    return Layout.of_placements(placements, ndim)


def _storage(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _is_known(placement: Any) -> bool:
    """Whether a placement is of a kind that layouts have."""
    if type(placement) is Partial:
        return bool(placement.reduce_op == "sum")
    return type(placement) in (Shard, Owned, Replicate)
