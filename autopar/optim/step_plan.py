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
from typing import Any

import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.ir.spec import ShardingSpec
from autopar.optim.layout import Layout, aligned, conversion_cost, stretched
from autopar.optim.lazy_tensor import CannotPlan
from autopar.optim.matrices import matrix_regions
from autopar.optim.parts import NeedsWhole
from autopar.optim.recording import (
    Call,
    Recording,
    Ref,
    Traits,
    Value,
    read_values,
    ref,
    traits,
    written_values,
)
from autopar.optim.reductions import Reductions
from autopar.optim.rules import allowed_strategies, operands_of
from autopar.optim.steps import LocalShape, Step, StepPlan
from autopar.sharding.rule import Strategy
from autopar.sharding.rules.view import RESHAPES

_ATEN = torch.ops.aten


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
        planner = _Planner(
            recording, mesh, cluster, frozenset(gathered), calls=calls, owners=owners
        )
        try:
            return planner.plan(wanted, whole)
        except NeedsWhole as error:
            if error.root in gathered:
                raise CannotPlan("it writes through a view of what it cannot gather") from None
            gathered.add(error.root)


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
class _Planner(Reductions):
    """
    Args:
        calls: positions of those that are needed.
        owners: of matrices: per call the coordinates of a rank.
    """

    calls: Sequence[int] = ()
    owners: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    _written: set[int] = field(default_factory=set)  # roots

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
            if (result := stretched(layout, value.shape, shape)) is not None:
                candidates[result] = None
        home = next((self.homes[n] for n in operands if n in self.homes), None)
        if home is not None and home[0] == shape:
            candidates[home[1]] = None
        if len(candidates) == 1:
            return next(iter(candidates))
        values = self.recording.values

        def cost(layout: Layout) -> tuple[float, bool, int]:
            moved = 0
            for n in operands:
                needed = aligned(layout, shape, values[n].shape)
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
        parts = {n: self._in(n, aligned(layout, shape, values[n].shape)) for n in operands}
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
                part = self._in(n, aligned(layout, shape, values[n].shape))
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

    def _by_rule(self, call: Call, known: Traits) -> None:
        """The cheapest strategy of the operator's rule."""
        values = self.recording.values
        if known.writes:
            self._out_of_place(call, known)
            return
        operands = operands_of(call)
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
        """The cheapest; None if the operator has no rule.

        Args:
            owner: of all operands, which are not split along its axes.
        """
        values = self.recording.values
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
            for result, spec in zip(call.results, strategy.outputs, strict=True):
                value = values[result]
                whole = Layout(ShardingSpec.replicated(len(value.shape)), owner)
                if spec.partial:
                    us += moved_us(Layout(spec, owner), whole, value)
                elif home is not None and home[0] == value.shape:
                    us += 0.5 * moved_us(Layout(spec, owner), home[1], value)
            return us

        return min(allowed_strategies(call, values, mesh) or (), key=cost, default=None)

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
