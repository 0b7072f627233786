"""Which regions of a rank's program run in slices, to fit a memory budget.

Greedy: at the peak of the program, the most promising regions (`region_search.py`) are written and
simulated exactly, and the one that fits, or lowers the peak most, is kept, in all equal blocks.
Then the next peak is looked at.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from autopar.passes.lower import trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.passes.split_regions import IN_SLICES, copy_of, splittable, with_shapes
from autopar.plan import TimeSplit
from autopar.planner.region_search import (
    COUNTS,
    LEAST_GAIN,
    Candidate,
    RegionSearch,
    split_equal,
)
from autopar.schedule.joint import JointProgram
from autopar.schedule.order import in_order
from autopar.schedule.pareto import ScheduleFront
from autopar.schedule.program import eager_schedule
from autopar.schedule.simulate import live_bytes, timeline
from autopar.units import bytes_text

log = logging.getLogger(__name__)

SECONDS = 30.0  # of the search
_ROUNDS = 12
_MOST_NESTED = 600  # operators of a program whose slices are looked into
_GAIN_OF_MORE_SLICES = 0.05  # of the peak, for twice as many


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
    first = now = score(copy_of(program))
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
    best: tuple[Score, list[TimeSplit], fx.GraphModule] | None = None
    for candidate in _candidates(program, now, budget_bytes, training):
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
) -> tuple[Score, list[TimeSplit], fx.GraphModule] | None:
    """The program with a region and its equals in so many slices that the peak fits or is
    elsewhere; None if that does not lower it."""
    best: tuple[Score, list[TimeSplit], fx.GraphModule] | None = None
    least, gain = now.peak_bytes, LEAST_GAIN
    split = candidate.split
    while split.slices <= min(split.pieces, COUNTS[-1]):
        tried = copy_of(program)
        made = split_equal(tried, replace(candidate, split=split))
        if not made:
            break
        new = score(copy_of(tried))
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
