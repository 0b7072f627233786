"""Parts of values in layouts, conversions between them, and the rounds of messages they take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.optim.layout import Layout, conversion_cost
from autopar.optim.pieces import narrowed
from autopar.optim.recording import (
    Call,
    Formula,
    NumberOf,
    Recording,
    Ref,
    Slot,
    Value,
    number_of,
    places,
    read_values,
    ref,
    traits,
)
from autopar.optim.steps import LocalShape, Part, Step, is_list
from autopar.sharding.node_rules import is_floating

_ATEN = torch.ops.aten

# Values up to this size are summed into a buffer that all ranks share, whatever their layout.
SMALL_BYTES = 1 << 15


class NeedsWhole(Exception):
    """Memory of the recording is written through a view that shards do not have.

    Args:
        root: the memory.
    """

    def __init__(self, root: int) -> None:
        super().__init__(root)
        self.root = root


@dataclass
class Parts:
    """What a plan holds, while it is made.

    Attributes:
        held: per value its part.
        copies: per value parts in other layouts, until the value is written.
        homes: shape and layout of the parameter that a value belongs to.
        work_us: microseconds of operators, by the coordinates of their owner or None.
        aliases: values per root.
    """

    recording: Recording
    mesh: tuple[int, ...]
    cluster: ClusterInfo
    gathered: frozenset[int]  # roots that every rank has whole while the program runs
    parts: list[Part] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)
    copies: dict[int, dict[Layout, int]] = field(default_factory=dict)
    homes: dict[int, tuple[tuple[int, ...], Layout]] = field(default_factory=dict)
    work_us: dict[tuple[int, ...] | None, float] = field(default_factory=dict)
    aliases: dict[int, list[int]] = field(default_factory=dict)
    # Per root the first level at which its last value can be used, and at which all users of it
    # are done.
    _made_at: dict[int, int] = field(default_factory=dict)
    _used_until: dict[int, int] = field(default_factory=dict)

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
            NeedsWhole: some of it would not see the write.
        """
        root = self.parts[self.held[value]].root
        for other in self.aliases[self.recording.roots[value]]:
            if self.parts[self.held[other]].root != root:
                raise NeedsWhole(self.recording.roots[value])
            self.copies.pop(other, None)

    def _fresh(self, value: Value) -> int:
        """A value that the recording does not have."""
        number = self.recording.add(value)
        self.recording.roots.append(number)
        return number

    def _complete(self, value: int) -> Layout:
        """Its layout, or replicated if that is a sum that is due."""
        layout = self._layout(value)
        return Layout.replicated(layout.spec.ndim) if layout.is_partial else layout

    # -- steps that run ---------------------------------------------------------------------------

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

    def _bytes_us(self, shape: Sequence[int], layout: Layout, dtype: torch.dtype) -> float:
        device = self.cluster.device
        size = math.prod(shape) * dtype.itemsize / layout.spec.parts(self.mesh)
        return device.launch_us + 2e6 * size / device.bandwidth

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


@cache
def _like(value: Value) -> torch.Tensor:
    return torch.empty(0, dtype=value.dtype, device="meta")
