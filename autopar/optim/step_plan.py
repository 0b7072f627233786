"""Chooses the layout of every value of a recording, and the conversions between layouts.

The layouts of parameters, gradients and states are given; the rest follows, operator by operator:

* An operator on each element follows its operands. One in place keeps the layout of what it writes.
* A norm or a sum over split dims is a sum of the ranks' parts (P), completed where it is read.
* Matrix products and decompositions that belong to one parameter go to one rank, its *owner*, or
  are split by the rules of `autopar/sharding`, whichever is cheaper for the step (`best_plan`).
* Any other operator takes the cheapest of the strategies that its rule allows.

All of it is the same on every rank. `local_program.py` writes what one rank does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.ir.spec import ShardingSpec
from autopar.optim.layout import Layout, conversion_cost
from autopar.optim.matrices import matrix_regions
from autopar.optim.pieces import (
    mean_of_sum,
    narrowed,
    plain_sum,
    root_of_sum,
    roots_of_sums,
    square_sum,
    square_sums,
)
from autopar.optim.recorder import CannotPlan
from autopar.optim.recording import (
    Call,
    Formula,
    NumberOf,
    Recording,
    Ref,
    Slot,
    Traits,
    Value,
    number_of,
    places,
    read_values,
    ref,
    traits,
    written_values,
)
from autopar.sharding.node_rules import is_floating
from autopar.sharding.rule import OpRule, Strategy, strategies
from autopar.sharding.rules import Call as RuleCall
from autopar.sharding.rules import bind
from autopar.sharding.rules.view import RESHAPES

_ATEN = torch.ops.aten

# Values up to this size are summed into a buffer that all ranks share, whatever their layout.
SMALL_BYTES = 1 << 15


class LocalShape(NamedTuple):
    """The place of a shape among arguments: that of a rank's part."""

    shape: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True)
class Part:
    """What ranks hold of a value, in one layout.

    Args:
        value: what it is like as a whole.
        layout: in which ranks hold it.
        root: parts of the same root may share memory.
    """

    value: Value
    layout: Layout
    root: int


@dataclass
class Step:
    """One step of a program.

    Args:
        kind: "run" an operator; or one of the conversions: "slice" without communication, "sum"
            of all ranks' parts, "exchange" of parts between ranks.
        target: the operator.
        args, kwargs: as in a `Call`, with numbers of parts.
        reads, writes, makes: numbers of parts.
        lists: each index of the lists is by itself, for ranks that hold its parts.
        level: the number of rounds of communication that come before it.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    makes: tuple[int, ...]
    lists: bool = False
    level: int = 0

    @property
    def communicates(self) -> bool:
        return self.kind in ("sum", "exchange")

    def order(self) -> tuple[int, str]:
        """Sorts steps by levels, and the messages of a level behind its other steps, by kind."""
        return self.level, self.kind if self.communicates else ""


@dataclass(frozen=True)
class StepPlan:
    """A recording with layouts.

    Args:
        parts: what is held.
        inputs: numbers of the parts that are there before.
        steps: in an order that is right; those of one kind of communication and one level may be
            one message.
        outputs: numbers of the parts that are wanted.
        cost_us: a rough prediction of its time.
    """

    parts: Sequence[Part]
    inputs: Sequence[int]
    steps: Sequence[Step]
    outputs: Sequence[int]
    cost_us: float


def best_plan(
    recording: Recording,
    wanted: Sequence[int],
    whole: frozenset[int],
    mesh: tuple[int, ...],
    cluster: ClusterInfo,
) -> StepPlan:
    """The cheaper of a plan with owners of matrices and one that splits their products.

    Args:
        wanted: numbers of the values that are needed when it has run.
        whole: those that every rank needs whole.

    Raises:
        CannotPlan: an operator writes through a view that a rank does not have.
    """
    calls = _needed(recording, wanted)
    plans = [_with_owners(recording, calls, mesh, cluster, {}, wanted, whole)]
    owners = matrix_regions(recording, calls, mesh)
    if owners:
        plans.append(_with_owners(recording, calls, mesh, cluster, owners, wanted, whole))
    return min(plans, key=lambda plan: plan.cost_us)


def _with_owners(
    recording: Recording, calls: Sequence[int], mesh: tuple[int, ...], cluster: ClusterInfo,
    owners: Mapping[int, tuple[int, ...]], wanted: Sequence[int], whole: frozenset[int],
) -> StepPlan:  # fmt: skip
    """A plan. Memory that is written through views which shards do not have is whole on each rank
    meanwhile."""
    gathered: set[int] = set()
    while True:
        planner = _Planner(recording, calls, mesh, cluster, owners, frozenset(gathered))
        try:
            return planner.plan(wanted, whole)
        except _NeedsWhole as error:
            if error.root in gathered:
                raise CannotPlan("it writes through a view of what it cannot gather") from None
            gathered.add(error.root)


class _NeedsWhole(Exception):
    """Memory of the recording is written through a view that shards do not have.

    Args:
        root: the memory.
    """

    def __init__(self, root: int) -> None:
        super().__init__(root)
        self.root = root


def _needed(recording: Recording, wanted: Sequence[int]) -> list[int]:
    """Positions of the calls that write what lives on, or make what such calls read."""
    roots = recording.roots
    live = {roots[n] for n in (*recording.inputs, *wanted)}
    kept = []
    for i in reversed(range(len(recording.calls))):
        call = recording.calls[i]
        written = written_values(call) if traits(call.op).writes else call.results
        if any(roots[n] in live for n in written):
            kept.append(i)
            live.update(roots[n] for n in read_values(call))
    return kept[::-1]


@dataclass
class _Planner:
    recording: Recording
    calls: Sequence[int]
    mesh: tuple[int, ...]
    cluster: ClusterInfo
    owners: Mapping[int, tuple[int, ...]]  # of matrices: per call the coordinates of a rank
    gathered: frozenset[int]  # roots that every rank has whole while the program runs
    parts: list[Part] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)  # per value its part
    copies: dict[int, dict[Layout, int]] = field(default_factory=dict)  # in other layouts
    homes: dict[int, tuple[tuple[int, ...], Layout]] = field(default_factory=dict)
    work_us: dict[tuple[int, ...] | None, float] = field(default_factory=dict)
    aliases: dict[int, list[int]] = field(default_factory=dict)  # values per root
    _written: set[int] = field(default_factory=set)  # roots
    # Per root the first level at which its last value can be used, and at which all users of it
    # are done.
    _made_at: dict[int, int] = field(default_factory=dict)
    _used_until: dict[int, int] = field(default_factory=dict)

    def plan(self, wanted: Sequence[int], whole: frozenset[int]) -> StepPlan:
        recording = self.recording
        for number, layout in zip(recording.inputs, recording.layouts, strict=True):
            if layout.is_partial:
                raise CannotPlan(f"an input is a sum that is due: {layout}")
            self._define(number, layout, recording.roots[number])
        inputs = [self.held[n] for n in recording.inputs]
        for number, home in zip(recording.inputs, recording.homes, strict=True):
            if home is not None:
                self.homes[number] = recording.values[home].shape, self._layout(home)
        self._written = {
            recording.roots[n] for i in self.calls for n in written_values(recording.calls[i])
        }
        for number in recording.inputs:
            self._gather(number)
        for i in self.calls:
            self._call(i, recording.calls[i])
            for number in recording.calls[i].results:
                self._gather(number)
        for number, part in zip(recording.inputs, inputs, strict=True):
            self._scatter(number, part)
        outputs = [self._output(n, n in whole) for n in wanted]
        order = sorted(self.steps, key=Step.order)
        return StepPlan(self.parts, inputs, order, outputs, self._cost_us())

    def _gather(self, value: int) -> None:
        """Hold a value whole, if its memory is to be."""
        if self.recording.roots[value] == value and value in self.gathered:
            self.held[value] = self._in(value, Layout.replicated(self._layout(value).spec.ndim))
            self.copies.pop(value)

    def _scatter(self, value: int, part: int) -> None:
        """Put what was whole back into the shard of an input."""
        held = self.held[value]
        if held == part or self.recording.roots[value] not in self.gathered:
            return
        layout = self.parts[part].layout
        source = self._new_part(self.parts[held].value, layout, self.parts[held].root)
        self._step("slice", narrowed, (held,), (source,))
        args = (ref(part), ref(source))
        self._add(Step("run", _ATEN.copy_.default, args, {}, (part, source), (part,), ()))

    # -- parts ------------------------------------------------------------------------------------

    def _new_part(self, value: Value, layout: Layout, root: int | None = None) -> int:
        number = len(self.parts)
        self.parts.append(Part(value, layout, -1 - number if root is None else root))
        return number

    def _define(self, value: int, layout: Layout, root: int | None = None) -> int:
        part = self._new_part(self.recording.values[value], layout, root)
        self.held[value] = part
        self.aliases.setdefault(self.recording.roots[value], []).append(value)
        return part

    def _layout(self, value: int) -> Layout:
        return self.parts[self.held[value]].layout

    def _in(self, value: int, layout: Layout) -> int:
        """The part that holds a value in a layout; converted, if it is in another one."""
        copies = self.copies.setdefault(value, {})
        known = [self.held[value], *copies.values()]
        for part in known:
            held = self.parts[part].layout  # ranks of the layout hold what it says
            if held.spec == layout.spec and set(held.owner) <= set(layout.owner):
                return part
        sliced = next((p for p in known if not self._communicates(p, layout)), None)
        if sliced is None:
            sliced = self._sent(value, layout)
            if self.parts[sliced].layout == layout:
                return sliced
        source = self.parts[sliced]
        copies[layout] = self._new_part(source.value, layout, source.root)
        self._step("slice", narrowed, (sliced,), (copies[layout],))
        return copies[layout]

    def _communicates(self, part: int, layout: Layout) -> bool:
        """Whether a conversion takes messages."""
        source = self.parts[part]
        return conversion_cost(source.layout, layout, source.value.shape, self.mesh)[1]

    def _sent(self, value: int, layout: Layout) -> int:
        """A part that a message makes: in the layout or, of a sum or a small value, replicated."""
        copies, part = self.copies[value], self.held[value]
        source = self.parts[part]
        size = source.value.dtype.itemsize * math.prod(source.value.shape)
        small = size <= SMALL_BYTES and is_floating(_like(source.value))
        kind = "sum" if source.layout.is_partial or small else "exchange"
        made = Layout.replicated(len(source.value.shape)) if kind == "sum" else layout
        copies[made] = self._new_part(source.value, made)
        self._step(kind, None, (part,), (copies[made],))
        return copies[made]

    def _step(self, kind: str, target: Any, reads: Sequence[int], makes: Sequence[int]) -> None:
        args = tuple(ref(p) for p in reads)
        self._add(Step(kind, target, args, {}, tuple(reads), (), tuple(makes)))

    def _level(self, reads: Sequence[int], writes: Sequence[int]) -> int:
        """The number of rounds of messages that a step waits for: it comes after what it reads was
        written, and a write after what reads what was there."""
        roots = [self.parts[part].root for part in (*reads, *writes)]
        written = [self.parts[part].root for part in writes]
        return max(
            (*(self._made_at.get(r, 0) for r in roots),
             *(self._used_until.get(r, 0) for r in written)),
            default=0,
        )  # fmt: skip

    def _add(self, step: Step) -> None:
        """Add a step, at its level."""
        step.level = self._level(step.reads, step.writes)
        done = step.level + step.communicates
        for part in step.reads:
            root = self.parts[part].root
            self._used_until[root] = max(self._used_until.get(root, 0), done)
        for part in (*step.makes, *step.writes):
            root = self.parts[part].root
            self._made_at[root] = max(self._made_at.get(root, 0), done)
        self.steps.append(step)

    def _written_layout(self, value: int) -> Layout:
        """The layout of a value that an operator writes; a sum that is due is completed first."""
        layout = self._layout(value)
        if layout.is_partial:
            self.held[value] = self._in(value, self._complete(value))
        return self._layout(value)

    def _wrote(self, value: int) -> None:
        """Forget the copies of what a value shares memory with.

        Raises:
            _NeedsWhole: some of it would not see the write.
        """
        root = self.parts[self.held[value]].root
        for other in self.aliases[self.recording.roots[value]]:
            if self.parts[self.held[other]].root != root:
                raise _NeedsWhole(self.recording.roots[value])
            self.copies.pop(other, None)

    # -- calls ------------------------------------------------------------------------------------

    def _call(self, position: int, call: Call) -> None:
        known = traits(call.op)
        operands = list(dict.fromkeys(read_values(call)))
        home = next((self.homes[n] for n in operands if n in self.homes), None)
        if home is not None:
            for n in call.results:
                self.homes.setdefault(n, home)
        if known.lists:
            self._lists(call, known)
        elif position in self.owners and not known.writes:
            self._at_owner(call, self.owners[position])
        elif known.pointwise:
            self._pointwise(call, known)
        elif known.view and self.recording.roots[call.results[0]] in self.gathered:
            self._replicated(call)
        elif call.op is _ATEN.linalg_vector_norm.default:
            self._norm(call)
        elif call.op in (_ATEN.mean.default, _ATEN.mean.dim):
            self._mean(call)
        else:
            self._by_rule(call, known)

    def _run(
        self,
        target: Any,
        call: Call,
        parts: Mapping[int, int],
        makes: Sequence[int],
        args: tuple[Any, ...] | None = None,
        writes: Sequence[int] = (),
        lists: bool = False,
    ) -> None:
        """A step with the call's arguments, its values in these parts."""

        def at(place: Any) -> Any:
            if isinstance(place, Formula):
                return Formula(place.name, at(place.operands))
            if isinstance(place, tuple) and not isinstance(place, LocalShape):
                return tuple(at(x) for x in place)
            if isinstance(place, Ref):
                return ref(parts[place.number])
            return number_of(parts[place.number]) if isinstance(place, NumberOf) else place

        named = {k: at(v) for k, v in call.kwargs}
        args = at(call.args if args is None else args)
        reads = tuple(dict.fromkeys(parts.values()))
        if not lists:
            self._add(Step("run", target, args, named, reads, tuple(writes), tuple(makes)))
            return
        # the indices that wait for as many rounds together, not all for the last one's
        results = makes or writes
        count, own = len(results), [x for x in args if isinstance(x, tuple) and x]
        own = [x for x in own if len(x) == len(results) and isinstance(x[0], Ref)]
        levels: dict[int, list[int]] = {}
        for i in range(count):
            level = self._level([x[i].number for x in own], writes[i : i + 1])
            levels.setdefault(level, []).append(i)

        def chosen(place: Any, indices: Sequence[int]) -> Any:
            return tuple(place[i] for i in indices) if is_list(place, count) else place

        for indices in levels.values():
            some = tuple(chosen(x, indices) for x in args)
            some_named = {k: chosen(v, indices) for k, v in named.items()}
            found = places((some, tuple(some_named.values())))
            used = dict.fromkeys(p.number for p in found if not isinstance(p, Slot))
            self._add(
                Step(
                    "run", target, some, some_named, tuple(used),
                    tuple(chosen(tuple(writes), indices)), tuple(chosen(tuple(makes), indices)),
                    True,
                )
            )  # fmt: skip

    def _work(self, layout: Layout, us: float) -> None:
        """Count the time of an operator: on the ranks of its owner, or on all."""
        key = None if len(layout.owner) < len(self.mesh) else tuple(at for _, at in layout.owner)
        self.work_us[key] = self.work_us.get(key, 0.0) + us

    # -- operators on each element ----------------------------------------------------------------

    def _elements(
        self, operands: Sequence[int], shape: tuple[int, ...], written: int | None
    ) -> Layout:
        """The layout in which an operator on each element runs."""
        if written is not None:
            return self._written_layout(written)
        candidates: dict[Layout, None] = {}
        for n in operands:
            layout, value = self._layout(n), self.recording.values[n]
            if layout.is_partial:
                layout = Layout.replicated(len(value.shape))
            if (stretched := _stretched(layout, value.shape, shape)) is not None:
                candidates[stretched] = None
        home = next((self.homes[n] for n in operands if n in self.homes), None)
        if home is not None and home[0] == shape:
            candidates[home[1]] = None
        if len(candidates) == 1:
            return next(iter(candidates))
        values = self.recording.values

        def cost(layout: Layout) -> tuple[float, bool, int]:
            moved = 0
            for n in operands:
                needed = _aligned(layout, shape, values[n].shape)
                amount, _ = conversion_cost(self._layout(n), needed, values[n].shape, self.mesh)
                moved += amount * values[n].dtype.itemsize
            at_home = home is not None and layout == home[1]
            return moved, not at_home, -layout.spec.parts(self.mesh)

        return min(candidates, key=cost, default=Layout.replicated(len(shape)))

    def _pointwise(self, call: Call, known: Traits) -> None:
        values = self.recording.values
        operands = list(dict.fromkeys(read_values(call)))
        written = written_values(call)
        if len({self._written_layout(n) for n in written}) > 1:
            raise CannotPlan(f"{call.op} writes tensors of several layouts")
        shape = values[written[0] if written else call.results[0]].shape
        layout = self._elements(operands, shape, written[0] if written else None)
        parts = {n: self._in(n, _aligned(layout, shape, values[n].shape)) for n in operands}
        for n in written:
            self._wrote(n)
        root = self.parts[parts[operands[0]]].root if known.view else None
        makes = [self._define(n, layout, root) for n in call.results]
        self._run(call.op, call, parts, makes, writes=[parts[n] for n in written])
        self._work(layout, self._bytes_us(shape, layout, values[operands[0]].dtype))

    def _lists(self, call: Call, known: Traits) -> None:
        """An operator on lists: each index by itself."""
        lists = [a for a in call.args if isinstance(a, tuple) and a and isinstance(a[0], Ref)]
        if call.op._schema.name == "aten::_foreach_norm":
            self._norms(call)
            return
        if not known.pointwise or not lists:
            self._replicated(call)
            return
        values = self.recording.values
        shared = [a.number for a in call.args if isinstance(a, Ref)]
        parts: dict[int, int] = {}
        writes, makes, owned = [], [], False
        for i in range(len(lists[0])):
            operands = [a[i].number for a in lists if i < len(a)]
            written = operands[0] if known.writes else None
            shape = values[operands[0] if known.writes else call.results[i]].shape
            layout = self._elements(operands, shape, written)
            owned = owned or bool(layout.owner)
            for n in operands:
                part = self._in(n, _aligned(layout, shape, values[n].shape))
                if parts.setdefault(n, part) != part:
                    raise CannotPlan(f"{call.op} needs a tensor in two layouts")
            if written is not None:
                writes.append(parts[written])
            else:
                makes.append(self._define(call.results[i], layout))
            self._work(layout, self._bytes_us(shape, layout, values[operands[0]].dtype))
        for n in shared:
            parts[n] = self._in(n, Layout.replicated(len(values[n].shape)))
            if owned and math.prod(values[n].shape) > 1:
                raise CannotPlan(f"{call.op} takes a number for each of its tensors in a tensor")
        for n in read_values(call):  # numbers
            if n not in parts:
                parts[n] = self._in(n, Layout.replicated(len(values[n].shape)))
        for n in written_values(call):
            self._wrote(n)
        self._run(call.op, call, parts, makes, writes=writes, lists=True)

    def _bytes_us(self, shape: Sequence[int], layout: Layout, dtype: torch.dtype) -> float:
        device = self.cluster.device
        size = math.prod(shape) * dtype.itemsize / layout.spec.parts(self.mesh)
        return device.launch_us + 2e6 * size / device.bandwidth

    # -- reductions -------------------------------------------------------------------------------

    def _norm(self, call: Call) -> None:
        """A norm over dims."""
        arguments = _bound(call)
        x = arguments["self"].number
        order, dim = arguments.get("ord", 2), arguments.get("dim")
        keep, dtype = arguments.get("keepdim", False), arguments.get("dtype")
        dims = tuple(range(len(self.recording.values[x].shape))) if dim in (None, ()) else dim
        self._one_norm(call, x, call.results[0], order, dims, keep, dtype)

    def _norms(self, call: Call) -> None:
        """Norms of all tensors in a list."""
        arguments = _bound(call)
        order, dtype = arguments.get("ord", 2), arguments.get("dtype")
        together: dict[torch.dtype, list[tuple[int, int]]] = {}
        for place, result in zip(arguments["self"], call.results, strict=True):
            x = place.number
            value, layout = self.recording.values[x], self._complete(x)
            if order == 2 and dtype is None and any(layout.spec.dims) and not layout.owner:
                together.setdefault(value.dtype, []).append((x, result))
                continue
            single = Call(_ATEN.linalg_vector_norm.default, (place, order), (), (result,))
            self._one_norm(single, x, result, order, range(len(value.shape)), False, dtype)
        for group in together.values():
            self._split_norms(group)

    def _split_norms(self, group: Sequence[tuple[int, int]]) -> None:
        """Norms of tensors that are split, each with its result."""
        parts: dict[int, int] = {}
        totals, whole = [], Layout.replicated(0)
        for x, result in group:
            value, made = self.recording.values[x], self.recording.values[result]
            layout = self._complete(x)
            parts[x] = self._in(x, layout)
            totals.append(self._fresh(made._replace(dtype=_real(_wider(value.dtype)))))
            across = tuple(sorted(a for axes in layout.spec.dims for a in axes))
            self._define(totals[-1], Layout(ShardingSpec((), across)))
            self._work(layout, self._bytes_us(value.shape, layout, value.dtype))
        xs = tuple(ref(x) for x, _ in group)
        single = Call(_ATEN._foreach_norm.Scalar, (xs,), (), ())
        self._run(square_sums, single, parts, [self.held[t] for t in totals], lists=True)
        parts = {t: self._in(t, whole) for t in totals}
        makes = [self._define(result, whole) for _, result in group]
        dtype = self.recording.values[group[0][1]].dtype
        single = single._replace(args=(tuple(map(ref, totals)), dtype))
        self._run(roots_of_sums, single, parts, makes, lists=True)

    def _one_norm(
        self, call: Call, x: int, result: int, order: Any, dims: Sequence[int], keep: bool,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        # squares, since sums of them over ranks are the whole's
        pieces = (square_sum, root_of_sum) if order == 2 else None
        self._reduction(call, x, result, dims, keep, dtype, pieces)

    def _mean(self, call: Call) -> None:
        arguments = _bound(call)
        x, result = arguments["self"].number, call.results[0]
        shape, dims = self.recording.values[x].shape, arguments.get("dim")
        dims = tuple(range(len(shape))) if dims in (None, ()) else dims
        count = math.prod(shape[d] for d in dims)
        keep, dtype = arguments.get("keepdim", False), arguments.get("dtype")
        self._reduction(call, x, result, dims, keep, dtype, (plain_sum, mean_of_sum), (count,))

    def _reduction(
        self, call: Call, x: int, result: int, dims: Sequence[int], keep: bool,
        dtype: torch.dtype | None, pieces: tuple[Any, Any] | None, rest: tuple[Any, ...] = (),
    ) -> None:  # fmt: skip
        """A reduction over dims.

        Args:
            pieces: what each rank computes of its part, to be summed over ranks, and what becomes
                of the sum. None: the reduction is of whole tensors.
            rest: arguments of the second one.
        """
        value, made = self.recording.values[x], self.recording.values[result]
        layout = self._complete(x)
        reduced = {d % len(value.shape) for d in dims} if value.shape else set()
        across = sorted(a for d in reduced for a in layout.spec.dims[d])
        whole = Layout.replicated(len(made.shape))
        if across and pieces is None:
            layout, across = Layout.replicated(len(value.shape)), []
        parts = {x: self._in(x, layout)}
        left = _reduced(layout, reduced, keep, len(value.shape))
        if not across or pieces is None:
            self._run(call.op, call, parts, [self._define(result, left)])
        else:
            wide = value.dtype if dtype is None else dtype
            wide = torch.float32 if wide in (torch.bfloat16, torch.float16) else wide
            pending = left.with_spec(ShardingSpec(left.spec.dims, tuple(across)))
            kept = made.dtype if pieces[0] is plain_sum else _real(wide)
            total = self._fresh(made._replace(dtype=_wider(kept)))
            single = Call(call.op, (ref(x), tuple(sorted(reduced)), keep, wide), (), ())
            self._run(pieces[0], single, parts, [self._define(total, pending)])
            single = Call(call.op, (ref(total), *rest, made.dtype), (), ())
            parts = {total: self._in(total, whole)}
            self._run(pieces[1], single, parts, [self._define(result, whole)])
        self._work(layout, self._bytes_us(value.shape, layout, value.dtype))

    def _fresh(self, value: Value) -> int:
        """A value that the recording does not have."""
        number = self.recording.add(value)
        self.recording.roots.append(number)
        return number

    def _complete(self, value: int) -> Layout:
        """Its layout, or replicated if that is a sum that is due."""
        layout = self._layout(value)
        return Layout.replicated(layout.spec.ndim) if layout.is_partial else layout

    # -- all others -------------------------------------------------------------------------------

    def _at_owner(self, call: Call, coords: tuple[int, ...]) -> None:
        """Matrices on the rank that owns them."""
        owner = tuple(enumerate(coords))
        values = self.recording.values

        def owned(n: int) -> Layout:
            return Layout(ShardingSpec.replicated(len(values[n].shape)), owner)

        parts = {n: self._in(n, owned(n)) for n in dict.fromkeys(read_values(call))}
        known = traits(call.op)
        root = self.parts[parts[next(iter(parts))]].root if known.view else None
        makes = [self._define(n, owned(n), root) for n in call.results]
        self._run(call.op, call, parts, makes)
        self._work(owned(call.results[0]), self._flops_us(call))

    def _flops_us(self, call: Call) -> float:
        """Microseconds of a call on one rank that has everything."""
        values = [self.recording.values[n] for n in read_values(call)]
        made = self.recording.values[call.results[0]]
        device = self.cluster.device
        if traits(call.op).view:
            return 0.0
        if traits(call.op).pointwise or len(values[-1].shape) < 2:
            return device.launch_us + 2e6 * math.prod(made.shape) * made.dtype.itemsize / (
                device.bandwidth
            )
        rate = device.flops_per_s(str(made.dtype).removeprefix("torch."))
        if call.op._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            flops = 2 * math.prod(made.shape) * values[-1].shape[-2]
        else:  # decompositions
            flops = 10 * math.prod(values[0].shape) * values[0].shape[-1]
        return device.launch_us + 1e6 * flops / rate

    def _by_rule(self, call: Call, known: Traits) -> None:
        """The cheapest strategy of the operator's rule."""
        values = self.recording.values
        if known.writes:
            self._out_of_place(call, known)
            return
        operands = _operands(call)
        owners = {self._layout(n).owner for n in operands if n is not None and values[n].shape}
        owner = next(iter(owners)) if len(owners) == 1 else ()
        strategy = self._strategy(call, operands, owner)
        if strategy is None:
            self._replicated(call)
            return
        parts: dict[int, int] = {}
        for n, spec in zip(operands, strategy.inputs, strict=True):
            if n is not None:
                assert spec is not None
                parts[n] = self._in(n, Layout(spec.data(), owner))
        for n in read_values(call):  # numbers
            if n not in parts:
                parts[n] = self._in(n, Layout.replicated(len(values[n].shape)))
        args = call.args
        layouts = [Layout(spec, owner) for spec in strategy.outputs]
        root = self.parts[parts[next(iter(parts))]].root if known.view and parts else None
        makes = [
            self._define(n, layout, root) for n, layout in zip(call.results, layouts, strict=True)
        ]
        target: Any = call.op
        if str(call.op) in RESHAPES and str(call.op) != "aten.unsqueeze.default":
            written = self.recording.roots[call.results[0]] in self._written
            # a copy would hide a write
            target = _ATEN.view.default if known.view and written else _ATEN.reshape.default
            args = (call.args[0], LocalShape(values[call.results[0]].shape, layouts[0]))
            call = call._replace(kwargs=())
        elif strategy.splits:
            args = self._local_sizes(call, layouts[0])
        self._run(target, call, parts, makes, args)
        self._work(layouts[0], self._flops_us(call) * strategy.share(self.mesh))

    def _local_sizes(self, call: Call, layout: Layout) -> tuple[Any, ...]:
        """Operators that are told their result's shape are told the local one."""
        names = [a.name for a in call.op._schema.arguments]
        at = next((i for i, n in enumerate(names) if n in ("size", "shape")), None)
        if at is None or at >= len(call.args) or not isinstance(call.args[at], tuple):
            return call.args
        shape = LocalShape(self.recording.values[call.results[0]].shape, layout)
        return (*call.args[:at], shape, *call.args[at + 1 :])

    def _strategy(
        self, call: Call, operands: Sequence[int | None], owner: tuple[tuple[int, int], ...]
    ) -> Strategy | None:
        """None if the operator has no rule.

        Args:
            owner: of all operands, which are not split along its axes.
        """
        values = self.recording.values
        present = [None if n is None else values[n] for n in operands]
        made = [values[n] for n in call.results]
        rule = _rule_of(
            call.op, _described(call, values),
            tuple(None if v is None else v.shape for v in present), tuple(v.shape for v in made),
            tuple(None if v is None else v.stride for v in present),
            tuple(v is not None and v.dtype is torch.bool for v in present),
        )  # fmt: skip
        if rule is None:
            return None
        taken = {axis for axis, _ in owner}
        mesh = tuple(1 if axis in taken else n for axis, n in enumerate(self.mesh))
        home = next((self.homes[n] for n in operands if n in self.homes), None)
        link = max(self.cluster.links, key=lambda link: link.alpha + link.beta)
        work = self._flops_us(call)

        def moved_us(source: Layout, target: Layout, value: Value) -> float:
            amount, moves = conversion_cost(source, target, value.shape, self.mesh)
            return 1e6 * (link.alpha * moves + link.beta * amount * value.dtype.itemsize)

        def cost(strategy: Strategy) -> float:
            us = work * strategy.share(self.mesh)
            for n, spec in zip(operands, strategy.inputs, strict=True):
                if n is not None and spec is not None:
                    us += moved_us(self._layout(n), Layout(spec.data(), owner), values[n])
            for value, spec in zip(made, strategy.outputs, strict=True):
                whole = Layout(ShardingSpec.replicated(len(value.shape)), owner)
                if spec.partial:
                    us += moved_us(Layout(spec, owner), whole, value)
                elif home is not None and home[0] == value.shape:
                    us += 0.5 * moved_us(Layout(spec, owner), home[1], value)
            return us

        def allowed(strategy: Strategy) -> bool:
            if strategy.lowered or any(s is not None and s.partial for s in strategy.inputs):
                return False
            layouts: dict[int, Any] = {}  # a tensor that is given twice is in one layout
            return all(
                n is None or layouts.setdefault(n, spec) == spec
                for n, spec in zip(operands, strategy.inputs, strict=True)
            )

        floating = tuple(is_floating(_like(v)) for v in made)
        return min(filter(allowed, _strategies(rule, mesh, floating)), key=cost, default=None)

    def _replicated(self, call: Call) -> None:
        """An operator without a rule, on whole tensors: always right."""
        values = self.recording.values

        def whole(n: int) -> Layout:
            return Layout.replicated(len(values[n].shape))

        if traits(call.op).writes:
            raise CannotPlan(f"{call.op} has no rule and writes its operands")
        parts = {n: self._in(n, whole(n)) for n in dict.fromkeys(read_values(call))}
        root = self.parts[parts[next(iter(parts))]].root if traits(call.op).view and parts else None
        makes = [self._define(n, whole(n), root) for n in call.results]
        self._run(call.op, call, parts, makes, lists=False)
        if call.results:
            self._work(whole(call.results[0]), self._flops_us(call))

    def _out_of_place(self, call: Call, known: Traits) -> None:
        """An operator in place that is not on each element: its result is copied to what it writes.

        Raises:
            CannotPlan: there is no such operator out of place.
        """
        name, _, overload = str(call.op).removeprefix("aten.").partition(".")
        packet = getattr(_ATEN, name.removesuffix("_"), None)
        if not name.endswith("_") or len(known.writes) != 1 or packet is None:
            raise CannotPlan(f"{call.op} writes its operands and has no rule")
        if overload not in packet.overloads():
            raise CannotPlan(f"{call.op} has no counterpart out of place")
        (written,) = written_values(call)
        result = self._fresh(self.recording.values[written])
        functional = getattr(packet, overload)
        self._by_rule(call._replace(op=functional, results=(result,)), traits(functional))
        copy = Call(_ATEN.copy_.default, (ref(written), ref(result)), (), ())
        self._pointwise(copy, traits(_ATEN.copy_.default))

    # -- outputs ----------------------------------------------------------------------------------

    def _output(self, value: int, whole: bool) -> int:
        """The part in which a value is given out: one that a DTensor can have."""
        layout = self._complete(value)
        home = self.homes.get(value)
        ndim = layout.spec.ndim
        plain = not layout.owner or (home is not None and layout.owner == home[1].owner)
        if whole or not ndim:
            layout = Layout.replicated(ndim)
        elif not plain or any(list(axes) != sorted(axes) for axes in layout.spec.dims):
            at_home = home is not None and home[0] == self.recording.values[value].shape
            layout = home[1] if at_home and home is not None else Layout.replicated(ndim)
        part = self._in(value, layout)
        if self.parts[part].layout.owner != layout.owner:  # the same part, for fewer ranks
            part = self._in(value, self.parts[part].layout)
        return part

    def _cost_us(self) -> float:
        """Rounds of messages, their bytes, and the work of the busiest rank."""
        link = max(self.cluster.links, key=lambda link: link.alpha + link.beta)
        rounds = {(s.kind, s.level) for s in self.steps if s.communicates}
        moved = 0.0
        for step in self.steps:
            if step.communicates:
                source, target = self.parts[step.reads[0]], self.parts[step.makes[0]]
                amount, _ = conversion_cost(
                    source.layout, target.layout, source.value.shape, self.mesh
                )
                moved += amount * source.value.dtype.itemsize
        busiest = max((us for at, us in self.work_us.items() if at is not None), default=0.0)
        return (
            1e6 * (link.alpha * len(rounds) + link.beta * moved)
            + busiest
            + self.work_us.get(None, 0.0)
        )


def is_list(place: Any, count: int) -> bool:
    """Whether an argument has something for each of `count` tensors."""
    return type(place) is tuple and len(place) == count


# -- rules ----------------------------------------------------------------------------------------


@cache
def _like(value: Value) -> torch.Tensor:
    return torch.empty(0, dtype=value.dtype, device="meta")


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _real(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def _bound(call: Call) -> dict[str, Any]:
    """Arguments by schema name."""
    names = (a.name for a in call.op._schema.arguments)
    return dict(zip(names, call.args, strict=False)) | dict(call.kwargs)


def _operands(call: Call) -> list[int | None]:
    """Tensors among the arguments in schema order; lists flattened, None where absent."""
    bound, found = _bound(call), []
    for argument in call.op._schema.arguments:
        if "Tensor" in str(argument.type):
            value = bound.get(argument.name)
            items = value if isinstance(value, tuple) else (value,)
            found += [x.number if isinstance(x, Ref) else None for x in items]
    return found


def _described(call: Call, values: Sequence[Value]) -> tuple[tuple[str, Any], ...]:
    """Arguments by name, tensors as their shapes."""

    def shape(place: Any) -> Any:
        return values[place.number].shape if isinstance(place, Ref) else place

    def described(value: Any) -> Any:
        return tuple(map(described, value)) if isinstance(value, tuple) else shape(value)

    return tuple((k, described(v)) for k, v in _bound(call).items())


@cache
def _rule_of(
    op: torch._ops.OpOverload, arguments: Any, inputs: Any, outputs: Any, strides: Any, masks: Any
) -> OpRule | None:
    named = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments}
    try:
        return bind(RuleCall(op, named, inputs, outputs, masks, strides))
    except (ValueError, KeyError, IndexError):  # the row is for calls of other shapes
        return None


_STRATEGIES: dict[Any, list[Strategy]] = {}


def _strategies(rule: OpRule, mesh: tuple[int, ...], floating: tuple[bool, ...]) -> list[Strategy]:
    key = id(rule), mesh, floating  # `_rule_of` keeps its rules
    if key not in _STRATEGIES:
        _STRATEGIES[key] = strategies(rule, mesh, floating, any_order=False)
    return _STRATEGIES[key]


# -- layouts of operators on each element ---------------------------------------------------------


def _aligned(layout: Layout, shape: Sequence[int], operand: Sequence[int]) -> Layout:
    """The layout of an operand that is broadcast to a shape in a layout."""
    lead = len(shape) - len(operand)
    dims = tuple(
        layout.spec.dims[lead + d] if lead + d >= 0 and n == shape[lead + d] else ()
        for d, n in enumerate(operand)
    )
    return Layout(ShardingSpec(dims), layout.owner)


def _stretched(layout: Layout, operand: Sequence[int], shape: Sequence[int]) -> Layout | None:
    """The layout of a result whose operand, broadcast to its shape, is in a layout."""
    lead = len(shape) - len(operand)
    if lead < 0:
        return None
    dims = ((),) * lead + tuple(
        axes if n == shape[lead + d] else ()
        for d, (n, axes) in enumerate(zip(operand, layout.spec.dims, strict=True))
    )
    return Layout(ShardingSpec(dims), layout.owner)


def _reduced(layout: Layout, reduced: set[int], keep: bool, ndim: int) -> Layout:
    """The layout of a reduction, without the sums that are due."""
    dims = tuple(
        () if d in reduced else layout.spec.dims[d] for d in range(ndim) if keep or d not in reduced
    )
    return Layout(ShardingSpec(dims), layout.owner)
