"""Records what an optimizer's step does to sharded tensors, and runs it on shards when it must.

While a `Recorder` is on, an operator that takes a DTensor or a `LazyTensor` is noted and gives
`LazyTensor`s, which have a global shape and no elements. The optimizer's own Python code runs at
each step, so whatever it branches on, counts or schedules is as on a single device. The recording
runs when the step ends or Python asks for a number.

Memory is as the optimizer sees it: operators in place write the shards. An operator on plain
tensors runs at once, unless it reads what is still to be written, or writes what is still to be
read: then it is recorded too. Before one on the local tensor of a DTensor, the recording runs.

Private to torch here: the stack of dispatch modes; tested with 2.13.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from autopar.errors import EngineError
from autopar.optim.inference import Inference
from autopar.optim.inputs import Inputs, is_dtensor, is_recorded, memory_of, storage_of
from autopar.optim.layout import Layout
from autopar.optim.lazy_numbers import LazyNumber, number_of_value
from autopar.optim.lazy_tensor import CannotPlan, LazyTensor, NotRecorded
from autopar.optim.one_by_one import run_on_dtensors
from autopar.optim.recording import (
    Call,
    Formula,
    Recording,
    Ref,
    Traits,
    number_of,
    ref,
    slot,
    traits,
)

# Runs a recording: shards of the inputs to those of the values that are still wanted.
Run = Callable[
    [Recording, Sequence[Any], Sequence[int], frozenset[int]], Sequence[tuple[Any, Layout]]
]

_DETACH = torch.ops.aten.detach.default
_CLONE = torch.ops.aten.clone.default
_COPY = torch.ops.aten.copy_.default
_ITEM = torch.ops.aten._local_scalar_dense.default


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
        self.lazy_numbers = True  # whether numbers that Python asks for may come later
        self._segment = 0
        self._inputs = Inputs(mesh)
        self.given: list[weakref.ref[Any]] = []  # values and numbers that outlived their recording
        self._inference = Inference()
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
        if not any(map(is_recorded, types)):
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
        metas = self._inference.results(recording, op, template, named)
        if metas is None:  # of an operator in place, too: shards may fit where the whole does not
            del recording.numbers[before:]
            raise NotRecorded
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
        if scalar and (isinstance(a, float) or kind is int):  # NumPy's are floats of their own
            kind = int if kind is int else float
            self._recording.numbers.append(kind(a))
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
        if known is not None and known[1] == memory_of(x):
            return ref(known[0])
        return ref(self._input(x))

    def _input(self, x: torch.Tensor) -> int:
        """Note a tensor that was there before; two handles of the same memory are one value."""
        described = self._inputs.described(x)
        number = self._by_memory.get(described.memory)
        if number is None:
            recording, number = self._recording, len(self._recording.values)
            recording.add(described.value)
            storage, root = described.storage, number
            if storage is not None:
                root = self._root_of_storage.setdefault(storage, number)
                if is_dtensor(type(x)):
                    self._sharded.add(root)
            recording.roots.append(root)
            recording.inputs.append(number)
            recording.layouts.append(described.layout)
            recording.homes.append(None)
            self._tensors.append(x)
            self._by_memory[described.memory] = number
            if type(x) is not LazyTensor:
                self._by_id[id(x)] = number, memory_of(x)
            home = None if self._home_of is None else self._home_of(x)
            at = len(recording.homes) - 1
            if home is not None and home is not x:
                recording.homes[at] = self._ref(home).number
            elif is_dtensor(type(x)):
                recording.homes[at] = number
        else:
            self._handles.append(x)
            if type(x) is not LazyTensor:
                self._by_id[id(x)] = number, memory_of(x)
        if type(x) is LazyTensor:
            x._segment, x._number = self._segment, number
        return number

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
                    root = self._root_of_storage.get(storage_of(x))
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
        return op(*pytree.tree_map_only(LazyTensor, LazyTensor.value, args),
                  **pytree.tree_map_only(LazyTensor, LazyTensor.value, kwargs))  # fmt: skip

    # -- numbers ----------------------------------------------------------------------------------

    def _item(self, x: torch.Tensor) -> Any:
        """A number that Python asks for: later if it is a real one, else now."""
        if not self.lazy_numbers or not x.dtype.is_floating_point or x.ndim:
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
        return local is not None and self._root_of_storage.get(storage_of(local)) in self._written

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
            inputs = [self._inputs.shard(x)[0] for x in tensors]
            try:
                results = self._run(recording, inputs, wanted, frozenset(whole))
            except CannotPlan as error:
                results = run_on_dtensors(self.mesh, recording, tensors, wanted, whole, error)
        del handles
        for (_, x), shard in zip(alive, results, strict=False):
            x.shard = shard
        self.given.extend(weakref.ref(x) for _, x in alive)
        for number in read:  # before anything writes the value
            number.guard_float()
        self.given.extend(map(weakref.ref, read))
        return [local for local, _ in results[len(alive) :]]
