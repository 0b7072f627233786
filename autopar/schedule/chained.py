"""Schedules of the chain: the options of its stages, composed by the rotor program."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from autopar.schedule.build import BackwardBuilder
from autopar.schedule.options import (
    KEPT_SHARES,
    StageOption,
    forward_peak,
    kept_without_output,
    span_option,
    stage_options,
)
from autopar.schedule.program import Program, Schedule
from autopar.schedule.stages import Stage
from autopar.solver.chain import ChainStage, ChainTable, Keep, Plan

T = TypeVar("T")

_SLOTS = 1600
_SPANS = (2, 3, 4, 5, 6)  # stages between which nothing need be kept


class ChainSchedules:
    """The schedules of a chain: one for every cost that it can have.

    Args:
        common: storages that are kept whatever the plan.
        cost: of recomputing each operator.
        memory: the largest budget, in bytes.
        until: the processor time at which it gives up.

    Raises:
        TimeoutError: that has come.

    Attributes:
        budgets: of the chain, from the largest down, `common` included. The peak of a schedule is
            near its budget; the chain does not see everything.
    """

    def __init__(
        self, program: Program, stages: Sequence[Stage], common: frozenset[int],
        cost: Mapping[int, float], memory: float, until: float = math.inf,
    ) -> None:  # fmt: skip
        self._program, self._stages, self._common = program, stages, common
        self._stage_options = _options(program, stages, cost, until)
        chain = [
            ChainStage(
                program.nbytes[stage.input] if stage.input >= 0 else 0,
                program.nbytes[stage.output] if stage.output >= 0 else 0,
                sum(cost[i] for i in stage.forward),
                forward_peak(program, stage, frozenset()),
                tuple(option.costs for option in choices),
            )
            for stage, choices in zip(stages, self._stage_options, strict=True)
        ]
        self._reserved = sum(program.nbytes[s] for s in common)
        self._table = ChainTable(chain, max(1.0, memory - self._reserved), _SLOTS)
        self.budgets = [budget + self._reserved for budget in self._table.budgets()]

    def schedule(self, budget: float) -> Schedule:
        """The schedule of one of the budgets."""
        plan = self._table.plan(budget - self._reserved)
        return _schedule_of_plan(
            self._program, self._stages, self._stage_options, self._common, plan
        )


def _options(
    program: Program, stages: Sequence[Stage], cost: Mapping[int, float], until: float
) -> list[list[StageOption]]:
    """Per stage, its own options and those that span it and stages after it. Each kind of stage is
    solved once."""

    def in_time() -> None:
        if time.process_time() > until:
            raise TimeoutError("the chain has stages of too many kinds")

    def own_options(stage: Stage) -> tuple[StageOption, ...]:
        in_time()
        return stage_options(program, stage, cost)

    own = _per_kind(program, stages, own_options)
    levels = [  # per stage and share, what it keeps if its output is not kept
        [frozenset(twin[s] for s in kept) for kept in kinds]
        for kinds, twin in _per_kind(
            program, stages, lambda stage: kept_without_output(program, stage, cost)
        )
    ]
    spans: dict[str, list[StageOption]] = {}
    options = []
    for k, (kinds, twin) in enumerate(own):
        choices = [StageOption(frozenset(twin[s] for s in o.kept), o.costs) for o in kinds]
        for length in _SPANS:
            joined = stages[k : k + length]
            if len(joined) < length:
                break
            kept_sets = [
                frozenset[int]().union(*(levels[m][share] for m in range(k, k + length)))
                - {joined[-1].output}
                for share in range(len(KEPT_SHARES))
            ]
            kind = "\n\n".join(s.kind for s in joined)
            if kind not in spans:
                in_time()
                spans[kind] = [span_option(program, joined, kept, cost) for kept in kept_sets]
            choices += [
                StageOption(kept, o.costs) for kept, o in zip(kept_sets, spans[kind], strict=True)
            ]
        options.append(choices)
    return options


def _per_kind(
    program: Program, stages: Sequence[Stage], solve: Callable[[Stage], T]
) -> list[tuple[T, dict[int, int]]]:
    """A result for every stage, computed once per kind; and that stage's storages, by those of the
    stage it was computed for."""
    solved: dict[str, tuple[Stage, T]] = {}
    for stage in stages:
        if stage.kind not in solved:
            solved[stage.kind] = stage, solve(stage)
    return [(solved[s.kind][1], _twins(program, solved[s.kind][0], s)) for s in stages]


def _twins(program: Program, first: Stage, other: Stage) -> dict[int, int]:
    """Storages of a stage to those of another of its kind."""

    def storages(stage: Stage) -> Iterator[int]:
        for i in (*stage.forward, *stage.backward):
            yield from (*program.ops[i].reads, *program.ops[i].makes)

    return dict(zip(storages(first), storages(other), strict=True))


def _schedule_of_plan(
    program: Program, stages: Sequence[Stage], options: Sequence[Sequence[StageOption]],
    common: frozenset[int], plan: Plan,
) -> Schedule:  # fmt: skip
    """Write out a plan of the chain."""
    backward = BackwardBuilder(program, common)
    written = [
        frozenset(s for i in stage.forward for s in program.ops[i].makes) for stage in stages
    ]

    def free(first: int, end: int, kept: Iterable[int]) -> None:
        backward.alive -= frozenset[int]().union(*written[first:end]) - common - frozenset(kept)

    def play(plan: Plan, last: int, saved: bool) -> None:
        """Run the backward of a plan; what it keeps is saved by the forward, or recomputed here."""
        steps: list[tuple[int, int]] = []
        for step in plan:
            if isinstance(step, Keep):
                i, option = step.stage, options[step.stage][step.option]
                end = i + option.costs.span
                kept = option.kept | ({stages[end - 1].output} if end <= last else set())
                if saved:
                    backward.alive |= kept
                elif end <= last:
                    backward.recompute(sorted(kept, key=lambda s: (program.maker[s], s)))
                    free(i, end, kept)
                steps.append((i, end))
                continue
            border = stages[step.then].input
            if saved:
                backward.alive.add(border)
            else:
                backward.recompute([border])
                free(step.first, step.then, [border])
            play(step.later, last, saved)
            backward.alive.discard(border)
            play(step.again, step.then - 1, False)
        for i, end in reversed(steps):
            for stage in reversed(stages[i:end]):
                backward.run(stage.backward)
            free(i, end, ())

    play(plan, len(stages) - 1, True)
    return backward.schedule()
