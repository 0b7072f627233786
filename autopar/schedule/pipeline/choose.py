"""The joint choice of a pipeline: cuts, microbatches, schedule and recomputation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from autopar.errors import InfeasibleError, PlanError
from autopar.gc_utils import collection_paused
from autopar.schedule.pipeline.blocks import Chain
from autopar.schedule.pipeline.layout import layout_text
from autopar.schedule.pipeline.option import Borders, Option
from autopar.schedule.pipeline.problem import PipelineChoice, PipelineProblem
from autopar.schedule.pipeline.schedules import SCHEDULES
from autopar.schedule.pipeline.search import best_found, best_of_all
from autopar.schedule.pipeline.timeline import simulate
from autopar.units import bytes_text

# Every choice is looked at for so few blocks, or if so few cuts have so few actions in all.
EXHAUSTIVE_BLOCKS = 8
EXHAUSTIVE_CUTS = 10_000
EXHAUSTIVE_ACTIONS = 10_000_000
# Otherwise, a rank and all have at most so many stages: more save little of the bubble.
MOST_PER_RANK = 8
MOST_STAGES = 256


def choose_pipeline(problem: PipelineProblem) -> PipelineChoice:
    """The fastest that fits the budget.

    For few blocks, or if the cuts are fixed, nothing is faster. For more, cuts are improved until
    no block that moves to another stage makes the step faster.
    """
    with collection_paused():
        options = _options(problem)
        blocks = len(options[0].chain.blocks)
        borders = None if problem.cuts is None else [(0, *problem.cuts, blocks)]
        if borders or blocks <= EXHAUSTIVE_BLOCKS or _few(options):
            found = best_of_all(options, borders)
        else:
            found = best_found(options)
        if found is None:
            raise _infeasible(problem, options)
        schedule = found.option.schedule()
        costs = tuple(found.option.costs(found.borders, found.counts))
        timeline = simulate(schedule, costs)
        return PipelineChoice(
            found.borders[1:-1], schedule.microbatches, schedule, found.counts, costs,
            timeline.step_us, timeline.peak_bytes, max(0.0, timeline.bubble_fraction),
        )  # fmt: skip


def _options(problem: PipelineProblem) -> list[Option]:
    """All schedules at all numbers of microbatches, the simplest first."""
    p, batch = problem.ranks, problem.batch
    if problem.microbatches is not None:
        numbers = {problem.microbatches}
    else:
        numbers = {m for m in range(1, batch + 1) if batch % m == 0 or m & (m - 1) == 0}
    blocks = {m: problem.blocks(-(-batch // m)) for m in sorted(numbers)}
    count = len(next(iter(blocks.values())))
    assert all(len(b) == count for b in blocks.values()), "the same blocks for all microbatches"
    if count < p:
        raise PlanError(
            f"a pipeline of {p} ranks needs {p} stages or more, but the model can be cut at"
            f" {count - 1} places, into {count} stages; use {count} ranks or fewer, or allow cuts"
            " at more places"
        )
    _check_cuts(problem, count)
    chains = {
        (m, splits): Chain(of_m, problem.link, splits)
        for m, of_m in blocks.items()
        for splits in (False, True)
    }
    options = [
        Option(
            name, p, per_rank, m, chains[m, SCHEDULES[name].splits_backward],
            problem.budget_bytes - _beside(problem, m), problem.recompute, problem.sends_beside,
        )
        for m in blocks
        for name in problem.schedules
        for per_rank in _stages_per_rank(problem, name, count)
    ]  # fmt: skip
    if not options:
        given = problem.stages_per_rank or "any number of"
        able = f"{len(problem.cuts) + 1}" if problem.cuts else f"at most {count}"
        raise PlanError(
            f"no pipeline of {able} stages on {p} ranks with {given} stages per rank and schedule"
            f" {' or '.join(problem.schedules)}; change cuts, stages_per_rank or schedules"
        )
    return options


def _stages_per_rank(problem: PipelineProblem, name: str, blocks: int) -> list[int]:
    row, p, fixed = SCHEDULES[name], problem.ranks, problem.stages_per_rank
    if problem.cuts is not None:
        stages = len(problem.cuts) + 1
        if stages % p or fixed not in (None, stages // p):
            return []
        fixed = stages // p
    most = blocks // p
    if blocks > EXHAUSTIVE_BLOCKS:
        most = min(most, MOST_PER_RANK, max(2, MOST_STAGES // p))
    return [
        n
        for n in (range(1, most + 1) if fixed is None else [fixed])
        if n * p <= blocks and (n == row.stages_per_rank or (row.more and n > row.stages_per_rank))
    ]


def _check_cuts(problem: PipelineProblem, blocks: int) -> None:
    borders = (0, *(problem.cuts or ()), blocks)
    if any(cut <= before for before, cut in itertools.pairwise(borders)):
        raise PlanError(
            f"cuts {problem.cuts} of a pipeline: write the blocks at which stages after the first"
            f" begin, in ascending order, from 1 to {blocks - 1}"
        )
    if isinstance(problem.recompute, tuple):
        lengths = [b - a for a, b in itertools.pairwise(borders)]
        counts = problem.recompute
        if len(counts) != len(lengths) or any(
            not 0 <= c <= n for c, n in zip(counts, lengths, strict=True)
        ):
            raise PlanError(
                f"recompute {counts} of a pipeline whose stages have {lengths} blocks: give each"
                " stage a number from 0 to that of its blocks"
            )


def _beside(problem: PipelineProblem, microbatches: int) -> float:
    return problem.beside_bytes(-(-problem.batch // microbatches))


def _few(options: Iterable[Option]) -> bool:
    """Whether all cuts of all options can be looked at."""
    cuts = [(o.all_actions, math.comb(len(o.chain.blocks) - 1, o.stages - 1)) for o in options]
    return (
        sum(number for _, number in cuts) <= EXHAUSTIVE_CUTS
        and sum(actions * number for actions, number in cuts) <= EXHAUSTIVE_ACTIONS
    )


def _infeasible(problem: PipelineProblem, options: Sequence[Option]) -> InfeasibleError:
    """Why nothing fits, by what needs the least."""
    blocks = options[0].chain.blocks
    proven = len(blocks) <= EXHAUSTIVE_BLOCKS

    def borders_of(option: Option) -> Iterable[Borders]:
        if problem.cuts is not None:
            return [(0, *problem.cuts, len(blocks))]
        return option.all_borders() if proven else [option.smallest()]

    smallest, at, borders = min(
        (option.peak_bytes(borders) + _beside(problem, option.microbatches), at, borders)
        for at, option in enumerate(options)
        for borders in borders_of(option)
    )
    option = options[at]
    rank = max(range(option.ranks), key=lambda r: option.fits(borders)[r][1])
    stages = option.stages_of[rank]
    names = [block.name for block in blocks]
    where = "; ".join(
        f"stage {s}: {layout_text((), names[borders[s] : borders[s + 1]])}" for s in stages
    )
    costs = option.costs(borders)
    state_bytes = sum(costs[s].state_bytes for s in stages)
    beside = _beside(problem, option.microbatches)
    live_bytes = smallest - state_bytes - beside
    if state_bytes >= live_bytes:
        remedy = "shard them, or use more ranks"
    elif problem.microbatches is None and problem.recompute is None:
        remedy = "use smaller blocks, a smaller batch or more ranks"
    else:
        remedy = "allow more microbatches and recomputation"
    others = f", beside {bytes_text(beside)} of inputs and temporary values" if beside else ""
    main = "states" if state_bytes >= live_bytes else "activations"
    return InfeasibleError(
        f"no pipeline of {option.ranks} ranks fits {bytes_text(problem.budget_bytes)} per device."
        f" The smallest{'' if proven else ' found'} needs {bytes_text(smallest)} ({option.name},"
        f" {option.microbatches} microbatches): rank {rank} ({where}) has"
        f" {bytes_text(state_bytes)} of parameters, gradients and optimizer state (states) and"
        f" {bytes_text(live_bytes)} of activations{others}. Most are {main}: {remedy}, or raise"
        f" the budget to {bytes_text(smallest)}",
        budget_bytes=problem.budget_bytes,
        smallest_bytes=smallest,
        proven=proven,
    )
