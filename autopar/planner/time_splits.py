"""Which regions of a rank's program run in slices, to fit a memory budget.

Greedy: at the peak of the program, the most promising regions (`region_search.py`) are written and
simulated exactly, and the one that fits, or lowers the peak most, is kept, in all equal blocks.
Then the next peak is looked at.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.fx as fx

from autopar.errors import PlanError
from autopar.passes.local_step import UntracedStep
from autopar.passes.lower import TracedStep
from autopar.passes.split_regions import IN_SLICES, copy_of, splittable, with_shapes
from autopar.plan_records import TimeSplit
from autopar.planner.region_search import (
    COUNTS,
    LEAST_GAIN,
    Candidate,
    RegionSearch,
    split_equal,
)
from autopar.schedule.order import in_order
from autopar.schedule.pareto import ScheduleFront
from autopar.schedule.program import Program, eager_schedule
from autopar.schedule.simulate import live_bytes, timeline
from autopar.units import bytes_text

log = logging.getLogger(__name__)

SECONDS = 60.0  # of the search
_ROUNDS = 12
_SCORING = 0.5  # of tracing and scoring a program
_MOST_NESTED = 600  # operators of a program whose slices are looked into
_GAIN_OF_MORE_SLICES = 0.05  # of the peak, for twice as many


@dataclass(frozen=True)
class Score:
    """What a program is simulated to take.

    Args:
        peak_bytes: the least that it can do with.
        us: without recomputation.
        at: name of the operator of the program at which the peak is.
        traced, program: that were simulated; None if its blocks became unequal.
    """

    peak_bytes: float
    us: float
    at: str
    traced: TracedStep | None = field(default=None, compare=False, repr=False)
    program: Program | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Choice:
    """Regions that were chosen.

    Args:
        splits: in the order in which they are made.
        candidates: each stands for a row of them, that equal it.
        program: with the regions in slices.
        before, after: scores.
    """

    splits: tuple[TimeSplit, ...]
    candidates: tuple[Candidate, ...]
    program: fx.GraphModule
    before: Score
    after: Score


@dataclass(frozen=True)
class _Lowered:
    """A program with one more region, and those that equal it, in slices."""

    score: Score
    splits: list[TimeSplit]
    candidate: Candidate
    program: fx.GraphModule


@dataclass
class _Clock:
    """The processor time of a search.

    Args:
        end: at which it ends.
        per_node: seconds to score a program, for each of its nodes; the fewest so far.
    """

    end: float
    per_node: float = math.inf

    @property
    def is_over(self) -> bool:
        return time.process_time() > self.end

    def has(self, seconds: float) -> bool:
        """Whether so many are left."""
        return time.process_time() + seconds <= self.end

    def allows(self, gm: fx.GraphModule) -> bool:
        """Whether a program may be scored in time."""
        return self.has(self.per_node * len(gm.graph.nodes) if math.isfinite(self.per_node) else 0)

    def timed(
        self, score: Callable[[fx.GraphModule], Score], gm: fx.GraphModule, share: float = 1.0
    ) -> Score:
        """Score a program, and note how long that takes.

        Args:
            share: of the work that other programs take.
        """
        start, count = time.process_time(), len(gm.graph.nodes)
        result = score(gm)
        self.per_node = min(self.per_node, (time.process_time() - start) / (share * count))
        return result


def with_candidates(
    step: UntracedStep, candidates: Sequence[Candidate]
) -> tuple[fx.GraphModule, tuple[TimeSplit, ...]]:
    """A program with regions in slices that were chosen for the same program with fewer blocks.

    Raises:
        PlanError: it lacks one of them.
    """
    gm = splittable(step.gm, step.arguments)
    splits: list[TimeSplit] = []
    for candidate in candidates:
        made = split_equal(gm, candidate)
        if not made:
            raise PlanError(f"the program has no region that equals {candidate.split.factor}")
        splits += made
        gm = with_shapes(gm, step.arguments)
    return gm, tuple(splits)


def choose_splits(
    step: UntracedStep,
    budget_bytes: float,
    score: Callable[[TracedStep], Score],
    *,
    training: bool,
    seconds: float = SECONDS,
) -> Choice | None:
    """Regions to run in slices, one at least, so that a program's peak comes within a budget, or as
    near as it gets; None if no region lowers it.

    Args:
        step: of a rank; is not changed.
        score: simulates a program.
        training: a backward follows.
        seconds: after which the search ends with what it has.

    Raises:
        PlanError: the program is short of equal blocks, and cannot stand for the whole.
    """
    clock = _Clock(time.process_time() + seconds)
    program, as_is = splittable(step.gm, step.arguments), step.as_is

    def traced_score(gm: fx.GraphModule) -> Score:
        return score(step.traced(gm))

    first = now = clock.timed(lambda _: score(as_is), step.gm, _SCORING)
    if math.isinf(first.peak_bytes):
        raise PlanError("blocks that stand for others do not equal them")
    lowered: list[_Lowered] = []
    for _ in range(_ROUNDS):
        if lowered and (now.peak_bytes <= budget_bytes or clock.is_over):
            break
        found = _lower(program, budget_bytes, now, traced_score, training, clock)
        if found is None:
            break
        lowered.append(found)
        now, program = found.score, with_shapes(found.program, step.arguments)
        log.info("split %s over time: peak %s", found.splits[0].factor, bytes_text(now.peak_bytes))
    if not lowered:
        return None
    splits = tuple(split for row in lowered for split in row.splits)
    return Choice(splits, tuple(row.candidate for row in lowered), program, first, now)


def _lower(
    program: fx.GraphModule,
    budget_bytes: float,
    now: Score,
    score: Callable[[fx.GraphModule], Score],
    training: bool,
    clock: _Clock,
) -> _Lowered | None:
    """One more region in slices, with those that equal it; None if that does not lower the
    peak."""
    best: _Lowered | None = None
    for candidate in _candidates(program, now, budget_bytes, training):
        found = _with_enough_slices(program, candidate, budget_bytes, now, score, clock)
        if found is None or (best and found.score.peak_bytes >= best.score.peak_bytes):
            continue
        best = found
        if best.score.peak_bytes <= budget_bytes or not _in_slices(best.program, best.score.at):
            break  # the peak is elsewhere
        if clock.is_over:
            break
    return best


def _candidates(
    program: fx.GraphModule, now: Score, budget_bytes: float, training: bool
) -> list[Candidate]:
    """Regions around the peak; in slices of others if there are none outside of them."""
    search = RegionSearch(program, now.peak_bytes, now.at, training, budget_bytes)
    found = search.best()
    if found or len(program.graph.nodes) > _MOST_NESTED:
        return found
    return replace(search, nested=True).best()


def _with_enough_slices(
    program: fx.GraphModule,
    candidate: Candidate,
    budget_bytes: float,
    now: Score,
    score: Callable[[fx.GraphModule], Score],
    clock: _Clock,
) -> _Lowered | None:
    """The program with a region and its equals in so many slices that the peak fits or is
    elsewhere; None if that does not lower it."""
    best: _Lowered | None = None
    least, gain = now.peak_bytes, LEAST_GAIN
    split = candidate.split
    seconds = 0.0
    while split.slices <= min(split.pieces, COUNTS[-1]) and clock.has(2 * seconds):
        start = time.process_time()
        tried = copy_of(program)
        candidate = replace(candidate, split=split)
        made = split_equal(tried, candidate)
        if not made or not clock.allows(tried):
            break
        new = clock.timed(score, copy_of(tried))
        if new.peak_bytes > (1 - gain) * least:
            break
        best = _Lowered(new, made, candidate, tried)
        least, gain = new.peak_bytes, _GAIN_OF_MORE_SLICES
        if new.peak_bytes <= budget_bytes or not _in_slices(tried, new.at):
            break
        split = replace(split, slices=2 * split.slices)
        seconds = time.process_time() - start
    return best


def _in_slices(gm: fx.GraphModule, name: str) -> bool:
    """Whether an operator belongs to slices."""
    return any(n.name == name and IN_SLICES in n.meta for n in gm.graph.nodes)


_UNKNOWN = Score(math.inf, math.inf, "")  # of programs whose blocks became unequal


def forward_score(step: UntracedStep, traced: TracedStep) -> Score:
    """Scores a program without a backward."""
    program = step.program_of(traced)
    if program is None:
        return _UNKNOWN
    simulated = timeline(program, eager_schedule(program))
    at = simulated.peak_at if simulated.events else 0
    origin = _origin(traced, program, program.forward[at:])
    return Score(simulated.peak_bytes, simulated.us, origin, traced, program)


def training_score(
    step: UntracedStep, traced: TracedStep, budget_bytes: float = 0.0, until: float = math.inf
) -> Score:
    """Scores a training step, by a schedule with a low peak that is found quickly; if it fits, by
    one that does.

    Args:
        until: the processor time after which the peak is that of checkpointing.
    """
    program = step.program_of(traced)
    if program is None:
        return _UNKNOWN
    ordered = in_order(program)
    least = ScheduleFront(ordered).low(budget_bytes, until)
    sequence = least.schedule.forward + least.schedule.backward
    peak = int(live_bytes(ordered, least.schedule).argmax())
    us = sum(program.ops[i].us for i in sequence)
    origin = _origin(traced, program, sequence[peak:])
    return Score(least.peak_bytes, us, origin, traced, program)


def _origin(traced: TracedStep, program: Program, sequence: Sequence[int]) -> str:
    """The module of the first operator of a sequence that was traced, or whose twin in a traced
    block was. Transfers to and from the host were not."""
    reading = traced.reading
    assert reading is not None, "regions are chosen for a schedule"
    calls = {op.name: call for op, call in zip(traced.program.ops, reading.calls, strict=False)}
    names = (program.ops[i].name.partition(".")[0] for i in sequence)
    call = next((calls[name] for name in names if name in calls), None)
    meta: dict[str, Any] = {} if call is None else call.meta
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack")
    return str(list(stack.values())[-1][1]) if stack else ""
