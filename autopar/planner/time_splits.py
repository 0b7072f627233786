"""Which regions of a rank's program run in slices, to fit a memory budget.

Greedy: at the peak of the program, regions are grown around it along every dim of every operator
before it (`passes/regions.py`); what each would need in slices is estimated from live ranges; the
most promising are written and simulated exactly; and the one that fits at the least added time, or
lowers the peak most, is kept, in all equal blocks that need it. Then the next peak is looked at.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.fx as fx

from autopar.errors import InfeasibleError, PlanError
from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import ModelGraph
from autopar.passes.lower import TracedStep, trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.passes.regions import Growth, Region, Ways, as_model_graph, may_split
from autopar.passes.split_regions import (
    IN_SLICES,
    calls_in_order,
    copied,
    split_region,
    splittable,
    with_shapes,
)
from autopar.plan import TimeSplit
from autopar.schedule.budget import MemoryPlan, StepBudget
from autopar.schedule.joint import JointProgram
from autopar.schedule.order import in_order
from autopar.schedule.pareto import ScheduleFront
from autopar.schedule.program import Program, eager_schedule
from autopar.schedule.simulate import live_bytes, timeline
from autopar.schedule.streams import step_us
from autopar.units import bytes_text

log = logging.getLogger(__name__)

SECONDS = 30.0  # of the search
EVEN = 1e-2  # of a step: what fitting may cost before regions are split
_FURTHEST = 160  # operators before the peak at which a region may begin
_LONGEST = 240  # operators of a region
_SMALLEST_SHARE = 0.02  # of the peak: smaller results begin no region
_PIECES = (64, 32, 16, 8, 4, 2)  # where the single elements of a dim cannot be told apart
_COUNTS = (2, 4, 8, 16, 32, 64)
_TRIED = 3  # regions that are written and simulated, per peak
_ROUNDS = 12
_LEAST_GAIN = 0.01  # of the peak
_GAIN_OF_MORE_SLICES = 0.05  # of the peak, for twice as many
_SAME_SHARE = 0.05  # of the peak: estimates that differ by less are the same
_LARGE_RESULT = 0.2  # of the peak
_SMALL = 0.25  # of what slices do not shrink: that much of a slice is small


@dataclass(frozen=True)
class Score:
    """What a program is simulated to take.

    Args:
        peak_bytes: the least that it can do with.
        us: without recomputation.
        at: name of the operator of the program at which the peak is.
    """

    peak_bytes: float
    us: float
    at: str


@dataclass(frozen=True)
class Choice:
    """Regions that were chosen.

    Args:
        splits: in the order in which they are made.
        program: with the regions in slices.
        before, after: scores.
    """

    splits: tuple[TimeSplit, ...]
    program: fx.GraphModule
    before: Score
    after: Score


def choose_splits(
    gm: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    budget_bytes: float,
    score: Callable[[fx.GraphModule], Score],
    *,
    training: bool,
    seconds: float = SECONDS,
) -> Choice | None:
    """Regions to run in slices, so that a program's peak comes within a budget, or as near as it
    gets; None if no region lowers it.

    Args:
        gm: a rank's program; is not changed.
        arguments: tensors that it is called with.
        score: simulates a program; may change it.
        training: a backward follows.
        seconds: after which the search ends with what it has.
    """
    deadline = time.monotonic() + seconds
    program = splittable(gm, arguments)
    first = now = score(_copy(program))
    splits: list[TimeSplit] = []
    for _ in range(_ROUNDS):
        if now.peak_bytes <= budget_bytes or time.monotonic() > deadline:
            break
        found = _lower(program, arguments, budget_bytes, now, score, training, deadline)
        if found is None:
            break
        now, made, program = found
        splits += made
        log.info("split %s over time: peak %s", made[0].factor, bytes_text(now.peak_bytes))
    return Choice(tuple(splits), program, first, now) if splits else None


def _lower(
    program: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    budget_bytes: float,
    now: Score,
    score: Callable[[fx.GraphModule], Score],
    training: bool,
    deadline: float,
) -> tuple[Score, list[TimeSplit], fx.GraphModule] | None:
    """One more region in slices, with those that equal it; None if that does not lower the
    peak."""
    search = _Search(program, now, training, budget_bytes)
    best: tuple[Score, list[TimeSplit], fx.GraphModule] | None = None
    for candidate in search.best():
        found = _with_enough_slices(program, candidate, budget_bytes, now, score)
        if found is None or (best is not None and found[0].peak_bytes >= best[0].peak_bytes):
            continue
        best = found
        if best[0].peak_bytes <= budget_bytes or not _in_slices(best[2], best[0].at):
            break  # the peak is elsewhere
        if time.monotonic() > deadline:
            break
    if best is None:
        return None
    new, made, tried = best
    return new, made, with_shapes(tried, arguments)


def _with_enough_slices(
    program: fx.GraphModule,
    candidate: _Candidate,
    budget_bytes: float,
    now: Score,
    score: Callable[[fx.GraphModule], Score],
) -> tuple[Score, list[TimeSplit], fx.GraphModule] | None:
    """The program with a region and its equals in so many slices that the peak fits or is
    elsewhere; None if that does not lower it."""
    best: tuple[Score, list[TimeSplit], fx.GraphModule] | None = None
    least, gain = now.peak_bytes, _LEAST_GAIN
    split = candidate.split
    while split.slices <= min(split.pieces, _COUNTS[-1]):
        tried = _copy(program)
        made = _with_twins(tried, replace(candidate, split=split))
        if not made:
            break
        new = score(_copy(tried))
        if new.peak_bytes > (1 - gain) * least:
            break
        best, least, gain = (new, made, tried), new.peak_bytes, _GAIN_OF_MORE_SLICES
        if new.peak_bytes <= budget_bytes or not _in_slices(tried, new.at):
            break
        split = replace(split, slices=2 * split.slices)
    return best


def _in_slices(gm: fx.GraphModule, name: str) -> bool:
    """Whether an operator belongs to slices."""
    return any(n.name == name and IN_SLICES in n.meta for n in gm.graph.nodes)


def forward_score(
    arguments: Sequence[torch.Tensor], options: LowerOptions
) -> Callable[[fx.GraphModule], Score]:
    """Scores programs without a backward."""

    def score(gm: fx.GraphModule) -> Score:
        reading = _reading(gm, arguments, options)
        simulated = timeline(reading.program, eager_schedule(reading.program))
        at = reading.program.forward[simulated.peak_at] if simulated.events else 0
        return Score(simulated.peak_bytes, simulated.us, _origin(reading, at))

    return score


def training_score(
    arguments: Sequence[torch.Tensor], options: LowerOptions
) -> Callable[[fx.GraphModule], Score]:
    """Scores training steps, by a schedule with a low peak that is found quickly."""

    def score(gm: fx.GraphModule) -> Score:
        reading = _reading(gm, arguments, options)
        program = in_order(reading.program)
        least = ScheduleFront(program).low()
        sequence = least.schedule.forward + least.schedule.backward
        peak = int(live_bytes(program, least.schedule).argmax())
        us = sum(program.ops[i].us for i in sequence)
        return Score(least.peak_bytes, us, _origin(reading, sequence[peak]))

    return score


def _reading(
    gm: fx.GraphModule, arguments: Sequence[torch.Tensor], options: LowerOptions
) -> JointProgram:
    reading = trace_step(gm, arguments, options).reading
    assert reading is not None, "regions are chosen for a schedule"
    return reading


def _origin(reading: JointProgram, i: int) -> str:
    """The operator of the program that an operator of the joint graph comes from."""
    meta = reading.calls[i].meta
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack")
    return str(list(stack.values())[-1][1]) if stack else ""


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(gm, copied(gm.graph))


@dataclass(frozen=True)
class FittedStep:
    """A step that fits its memory.

    Args:
        gm: its forward program.
        splits: the regions of it that run in slices.
        whole_results: as of a plan.
    """

    gm: fx.GraphModule
    traced: TracedStep
    memory: MemoryPlan
    splits: tuple[TimeSplit, ...] = ()
    whole_results: tuple[str, ...] = ()

    def compared_with(self, whole: Program) -> FittedStep:
        """The same, with the time of its slices in what it takes longer than a program without."""
        own, other = (step_us(p, eager_schedule(p)) for p in (self.traced.program, whole))
        added = max(0.0, self.memory.added_us + own - other)
        return replace(self, memory=replace(self.memory, added_us=added))


def split_step(
    gm: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    options: LowerOptions,
    budget: StepBudget,
) -> FittedStep | None:
    """Schedule a step with regions of it in slices; None if none lowers its peak.

    Args:
        gm: a rank's forward program; is not changed.
        arguments: tensors that it is called with; only their metadata is used.

    Raises:
        InfeasibleError: the step does not fit in slices either.
    """
    training = any(t.requires_grad for t in arguments)
    score = (training_score if training else forward_score)(arguments, options)
    choice = choose_splits(gm, arguments, budget.step_bytes, score, training=training)
    if choice is None:
        return None
    traced = trace_step(_copy(choice.program), arguments, options)
    memory = budget.choose(traced.program)
    whole = _whole_results(choice.program, memory.peak_bytes)
    return FittedStep(choice.program, traced, memory, choice.splits, whole)


def _whole_results(gm: fx.GraphModule, peak_bytes: float) -> tuple[str, ...]:
    """Results that are a large part of a peak."""
    outputs: Any = gm.graph.output_node().args[0]
    large = []
    for k, x in enumerate(outputs):
        value = x.meta["val"] if isinstance(x, fx.Node) else None
        if isinstance(value, torch.Tensor) and value.nbytes >= _LARGE_RESULT * peak_bytes:
            size = bytes_text(value.nbytes)
            large.append(f"result {k} of shape {list(value.shape)} ({size})")
    return tuple(large)


def fit_step(
    gm: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    options: LowerOptions,
    budget: StepBudget,
) -> FittedStep:
    """Schedule a step, with regions of it in slices if nothing else fits, or if that is faster.

    Args:
        gm: a rank's forward program; is not changed.
        arguments: tensors that it is called with; only their metadata is used.

    Raises:
        InfeasibleError: nothing fits.
    """
    traced = trace_step(_copy(gm), arguments, options)
    whole: FittedStep | None = None
    errors: list[InfeasibleError] = []
    try:
        whole = FittedStep(gm, traced, budget.choose(traced.program))
        if whole.memory.added_us <= EVEN * whole.memory.timeline.us:
            return whole
    except InfeasibleError as error:
        errors.append(error)
    try:
        split = split_step(gm, arguments, options, budget)
        if split is not None and (
            whole is None or split.memory.timeline.us < whole.memory.timeline.us
        ):
            return split.compared_with(traced.program)
    except InfeasibleError as error:
        errors.append(error)
    if whole is None:
        raise min(errors, key=lambda error: error.smallest_bytes)
    return whole


@dataclass(frozen=True)
class _Candidate:
    """A region with its number of slices.

    Args:
        nodes: its operators.
        peak_bytes: estimated, while it runs.
        covered: live bytes that it lowers, summed over its operators.
    """

    split: TimeSplit
    nodes: tuple[fx.Node, ...]
    peak_bytes: float
    covered: float


@dataclass
class _Search:
    """Regions around the peak of a program."""

    gm: fx.GraphModule
    score: Score
    training: bool
    budget_bytes: float
    nested: bool = False
    known: Ways = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph: ModelGraph = as_model_graph(self.gm)
        self.order = calls_in_order(self.gm)
        self.number = {node: k for k, node in enumerate(self.order)}
        self.live = _LiveRanges(self.gm, self.order)
        self.text = _as_text(self.order)
        names = {node.name: k for k, node in enumerate(self.order)}
        self.at = names.get(self.score.at, self.live.peak_at)

    def best(self) -> list[_Candidate]:
        """The most promising regions, of different places or dims."""
        most = (1 - _LEAST_GAIN) * self.score.peak_bytes
        found = [c for g in self._growths() for c in self._along(g) if c.peak_bytes <= most]
        fitting = [c for c in found if c.peak_bytes <= self.budget_bytes]
        grain = _SAME_SHARE * self.score.peak_bytes
        ranked = sorted(fitting, key=lambda c: (c.split.slices, -c.covered, -_many(c)))[
            : _TRIED // 2
        ]
        ranked += sorted(found, key=lambda c: (c.peak_bytes // grain, -c.covered, -_many(c)))
        chosen: dict[tuple[str, int], _Candidate] = {}
        for c in ranked:
            chosen.setdefault((c.split.first, c.split.dim), c)
            if len(chosen) == _TRIED:
                break
        return list(chosen.values())

    def _growths(self) -> Iterator[Growth]:
        smallest = _SMALLEST_SHARE * self.score.peak_bytes
        for k in range(self.at, max(-1, self.at - _FURTHEST), -1):
            node = self.order[k]
            if IN_SLICES in node.meta and not self.nested:
                return
            if node.target is operator.getitem or not may_split(node):
                continue
            value = tensors_of(node.meta["val"])[0]
            if value.nbytes < smallest or self.live.is_view(node):
                continue
            for dim, extent in enumerate(value.shape):
                for pieces in (int(extent), *(n for n in _PIECES if n < extent)):
                    if pieces < 2 or extent % pieces:
                        continue
                    growth = Growth(self.graph, self.order, k, dim, pieces, self.known)
                    if growth.began and self._reaches(growth):
                        yield growth
                        break

    def _reaches(self, growth: Growth) -> bool:
        while growth.end < self.at:
            if not self._advance(growth):
                return False
        return True

    def _advance(self, growth: Growth) -> bool:
        following = growth.order[growth.end + 1 : growth.end + 2]
        sliced = any(IN_SLICES in node.meta for node in following)
        return (self.nested or not sliced) and growth.advance()

    def _along(self, growth: Growth) -> Iterator[_Candidate]:
        """The best ends of a region that has grown to the peak."""
        best: list[_Candidate] = []
        while True:
            region = growth.region()
            if region is not None:
                candidate = self._candidate(region, growth)
                if candidate is not None:
                    best.append(candidate)
            if growth.end - growth.start > _LONGEST or not self._advance(growth):
                break
        yield from best

    def _places(self, first: int, last: int) -> int | None:
        """How many regions equal that one; None if the peak's operator also stands elsewhere."""
        pattern, peak = self.text[first : last + 1], self.text[self.at]
        places = self.text.count(pattern)
        if places * pattern.count(peak) < self.text.count(peak):
            return None
        return places

    def _candidate(self, region: Region, growth: Growth) -> _Candidate | None:
        fixed, inner = self.live.of_region(region, growth.start, growth.end, self.training)
        if inner <= 0:
            return None
        most = min(_COUNTS[-1], region.pieces)
        counts = [n for n in _COUNTS if n <= most] or [most]
        count = next(
            (n for n in counts if fixed + inner / n <= self.budget_bytes),
            next((n for n in counts if inner / n <= _SMALL * fixed), counts[-1]),
        )
        first, last = region.nodes[0], region.nodes[-1]
        info = [n.meta["autopar"] for n in region.nodes if n.meta.get("autopar")]
        value = tensors_of(first.meta["val"])[0]
        at_once = self.training and _is_loss(region)
        split = TimeSplit(
            first.name, last.name, region.dim, region.pieces, count, at_once,
            f"dim {region.dim} of size {int(value.shape[region.dim])} of {_named(first)}",
            tuple(dict.fromkeys(i.module for i in info)),
            tuple(dict.fromkeys(i.source for i in (info[0], info[-1]))),
        )  # fmt: skip
        peak = fixed + inner / count
        places = self._places(growth.start, growth.end)
        if places is None:
            return None
        covered = places * float(
            np.maximum(self.live.live[growth.start : growth.end + 1] - peak, 0).sum()
        )
        return _Candidate(split, region.nodes, peak, covered) if covered else None


def _many(candidate: _Candidate) -> int:
    """Slices that there can be."""
    return min(candidate.split.pieces, _COUNTS[-1])


def _as_text(order: Sequence[fx.Node]) -> str:
    """Operators as characters, equal for equal operators on values of the same shapes."""
    known: dict[object, str] = {}
    kinds = (
        (str(n.target), *((tuple(t.shape), t.dtype) for t in tensors_of(n.meta.get("val"))))
        for n in order
    )
    return "".join(known.setdefault(kind, chr(0x1000 + len(known))) for kind in kinds)


def _named(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _is_loss(region: Region) -> bool:
    """Whether all it gives is one number that is a sum over slices."""
    if len(region.given) != 1:
        return False
    ((node, result),) = region.given
    value = tensors_of(node.meta["val"])[result]
    short = any(
        t.dtype is torch.float16 for n in region.nodes for t in tensors_of(n.meta.get("val"))
    )
    return value.ndim == 0 and region.given[node, result] == "P" and not short


def _signature(nodes: Sequence[fx.Node]) -> tuple[object, ...]:
    """Equal for regions of the same operators on values of the same shapes."""
    number = {node: k for k, node in enumerate(nodes)}

    def described(n: fx.Node) -> Any:
        if n in number:
            return number[n]
        return tuple((tuple(t.shape), t.dtype) for t in tensors_of(n.meta.get("val")))

    return tuple(
        (str(n.target), repr(fx.node.map_arg((n.args, n.kwargs), described))) for n in nodes
    )


def _with_twins(gm: fx.GraphModule, candidate: _Candidate) -> list[TimeSplit]:
    """Split a region and those that equal it, in place."""
    order, made = calls_in_order(gm), list[TimeSplit]()
    length, k = len(candidate.nodes), 0
    signature = _signature(candidate.nodes)
    known: Ways = {}
    graph = as_model_graph(gm)
    while k + length <= len(order):
        nodes = order[k : k + length]
        if nodes[0].target is candidate.nodes[0].target and _signature(nodes) == signature:
            growth = Growth(graph, order, k, candidate.split.dim, candidate.split.pieces, known)
            while growth.began and growth.end < k + length - 1 and growth.advance():
                pass
            region = growth.region() if growth.end == k + length - 1 else None
            if region is not None:
                split = _renamed(candidate.split, region)
                try:
                    split_region(gm, region, split)
                except PlanError as error:
                    log.info("not split: %s", error)
                    return []
                made.append(split)
                k += length
                continue
        k += 1
    return made


def _renamed(split: TimeSplit, region: Region) -> TimeSplit:
    """The same split of a region that equals the first."""
    info = [n.meta["autopar"] for n in region.nodes if n.meta.get("autopar")]
    return replace(
        split, first=region.nodes[0].name, last=region.nodes[-1].name,
        modules=tuple(dict.fromkeys(i.module for i in info)),
        sources=tuple(dict.fromkeys(i.source for i in (info[0], info[-1]))),
    )  # fmt: skip


class _LiveRanges:
    """Storages of a program with shapes, from their making to their last use.

    Views share the storage of what they show. What operators hold inside is not seen.
    """

    def __init__(self, gm: fx.GraphModule, order: Sequence[fx.Node]) -> None:
        number = self.number = {node: k for k, node in enumerate(order)}
        keys: dict[int, int] = {}
        self.start: list[int] = []
        self.end: list[int] = []
        self.nbytes: list[int] = []
        self.of: dict[fx.Node, list[int]] = {}
        for node in gm.graph.nodes:
            at = number.get(node, -1 if node.op != "output" else len(order))
            for n in node.all_input_nodes:
                for s in self.of[n]:
                    self.end[s] = at
            self.of[node] = []
            for t in tensors_of(node.meta.get("val")) if node.op != "output" else ():
                key = t.untyped_storage()._cdata
                if key not in keys:
                    keys[key] = len(self.start)
                    given = node.op in ("placeholder", "get_attr")
                    self.start.append(-1 if given else at)
                    self.end.append(at)
                    self.nbytes.append(0 if given else int(t.untyped_storage().nbytes()))
                self.of[node].append(keys[key])
        start, end = np.array(self.start), np.array(self.end)
        nbytes = np.array(self.nbytes, dtype=np.float64)
        self.starts, self.ends, self.sizes = start, end, nbytes
        count = len(order) + 2
        change = np.bincount(np.maximum(start, 0), nbytes, count)
        change -= np.bincount(np.maximum(end, 0) + 1, nbytes, count)[:count]
        self.live = np.cumsum(change)
        self.peak_at = int(self.live[: len(order)].argmax()) if order else 0

    def is_view(self, node: fx.Node) -> bool:
        """Whether a node makes no storage."""
        return all(self.start[s] != self.number.get(node) for s in self.of[node])

    def of_region(
        self, region: Region, first: int, last: int, training: bool
    ) -> tuple[float, float]:
        """Bytes that stay as they are while a region runs in slices, and those that are divided by
        the number of slices."""
        starts, ends, sizes = self.starts, self.ends, self.sizes
        held = float(sizes[(starts < first) & (ends >= first)].sum())
        inside = (starts >= first) & (starts <= last)
        fixed = set[int]()
        for node in region.before:
            fixed.update(s for s in self.of[node] if inside[s])
        sums = parts = 0.0
        for (node, k), state in region.given.items():
            own = self.of[node]
            s = own[k] if k < len(own) else own[0]
            if inside[s]:
                fixed.add(s)
            if state == "P":
                sums += float(sizes[s])
            else:
                parts += float(sizes[s])
        whole = float(sizes[list(fixed)].sum()) if fixed else 0.0
        mask = inside.copy()
        mask[list(fixed)] = False
        if training:  # the backward of a slice has all of them
            inner = 2 * float(sizes[mask].sum())
        else:
            span = last - first + 2
            begin = starts[mask] - first
            until = np.minimum(ends[mask], last) - first + 1
            change = np.bincount(begin, sizes[mask], span) - np.bincount(until, sizes[mask], span)
            inner = float(np.cumsum(change).max(initial=0))
        return held + whole + sums, inner + parts
