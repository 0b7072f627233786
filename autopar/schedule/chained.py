"""Schedules of the chain: the options of its stages, composed by the rotor program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from autopar.schedule.build import schedule_of_plan
from autopar.schedule.options import THROUGH, forward_peak, span_option, stage_options, through
from autopar.schedule.program import Program, Schedule
from autopar.schedule.stages import Stage
from autopar.solver.chain import ChainOption, ChainStage, ChainTable

T = TypeVar("T")

_SLOTS = 400
_SPANS = (2, 3, 4, 5, 6)  # stages between which nothing need be kept


@dataclass(frozen=True)
class _Choice:
    """An option of a stage: what it keeps, and its numbers."""

    kept: frozenset[int]
    numbers: ChainOption


def chain_schedules(
    program: Program,
    stages: Sequence[Stage],
    common: frozenset[int],
    cost: Mapping[int, float],
    memory: float,
) -> Iterator[Schedule]:
    """A schedule for every cost that the chain can have.

    Args:
        common: storages that are kept whatever the plan.
        cost: of running each operator again.
        memory: the largest budget, in bytes.
    """
    choices = _choices(program, stages, cost)
    chain = [
        ChainStage(
            program.nbytes[stage.input] if stage.input >= 0 else 0,
            program.nbytes[stage.output] if stage.output >= 0 else 0,
            sum(cost[i] for i in stage.forward),
            forward_peak(program, stage, frozenset()),
            tuple(c.numbers for c in mine),
        )
        for stage, mine in zip(stages, choices, strict=True)
    ]
    options = [[(c.kept, c.numbers.span) for c in mine] for mine in choices]
    reserved = sum(program.nbytes[s] for s in common)
    table = ChainTable(chain, max(1.0, memory - reserved), _SLOTS)
    for budget in table.budgets():
        yield schedule_of_plan(program, stages, options, common, table.plan(budget))


def _choices(
    program: Program, stages: Sequence[Stage], cost: Mapping[int, float]
) -> list[list[_Choice]]:
    """Of every stage, its own options and those that span stages after it. Each kind of stage is
    looked at once."""
    own = _per_kind(program, stages, lambda stage: stage_options(program, stage, cost))
    passing = _per_kind(program, stages, lambda stage: through(program, stage, cost))
    levels = [
        [frozenset(twin[s] for s in kept) for kept in found] for found, twin in passing
    ]  # of every stage and share, what it keeps where its output is not kept
    spans: dict[str, list[ChainOption]] = {}
    choices = []
    for k, (options, twin) in enumerate(own):
        mine = [_Choice(frozenset(twin[s] for s in o.kept), o.numbers) for o in options]
        for length in _SPANS:
            joined = stages[k : k + length]
            if len(joined) < length:
                break
            kept = [
                frozenset[int]().union(*(levels[m][share] for m in range(k, k + length)))
                - {joined[-1].output}
                for share in range(len(THROUGH))
            ]
            kind = "\n\n".join(s.kind for s in joined)
            if kind not in spans:
                spans[kind] = [span_option(program, joined, each, cost).numbers for each in kept]
            mine += map(_Choice, kept, spans[kind])
        choices.append(mine)
    return choices


def _per_kind(
    program: Program, stages: Sequence[Stage], find: Callable[[Stage], T]
) -> list[tuple[T, dict[int, int]]]:
    """Something of every stage, found once per kind, and how its storages are called there."""
    known: dict[str, tuple[Stage, T]] = {}
    for stage in stages:
        if stage.kind not in known:
            known[stage.kind] = stage, find(stage)
    return [(known[s.kind][1], _twins(program, known[s.kind][0], s)) for s in stages]


def _twins(program: Program, first: Stage, other: Stage) -> dict[int, int]:
    """Storages of a stage to those of another of its kind."""
    pairs = zip((*first.forward, *first.backward), (*other.forward, *other.backward), strict=True)
    return {
        s: t
        for i, j in pairs
        for s, t in zip(
            (*program.ops[i].reads, *program.ops[i].makes),
            (*program.ops[j].reads, *program.ops[j].makes),
            strict=True,
        )
    }
