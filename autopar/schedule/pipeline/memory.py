"""What ranks hold at once, and how many blocks they have to recompute to fit a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from autopar.schedule.pipeline.actions import Kind, PipelineSchedule
from autopar.schedule.pipeline.blocks import StageTable

# By stage of a rank, how many of its blocks, from its front, are recomputed.
Counts = tuple[int, ...]

# All counts of a rank are tried if there are so few; otherwise they are chosen stage by stage.
MOST_COUNTS = 512


@lru_cache(maxsize=256)
def live_counts(schedule: PipelineSchedule) -> tuple[np.ndarray, ...]:
    """By rank, what it holds at once: one row per combination that occurs, the fullest first.

    By stage of the rank, how many microbatches are held for their backward, how many for W, and
    whether (1) its backward runs: 3 × stages columns. `peak_bytes` is the most over the rows.
    """
    return tuple(_live_counts(schedule, rank) for rank in range(len(schedule.ranks)))


def _live_counts(schedule: PipelineSchedule, rank: int) -> np.ndarray:
    column = {stage: k for k, stage in enumerate(schedule.stages_of_rank[rank])}
    stages = len(column)
    live = [0] * (3 * stages)
    rows: dict[tuple[int, ...], None] = {}
    for stage, kind, _ in schedule.ranks[rank]:
        at = column[stage]
        if kind is Kind.FORWARD:
            live[at] += 1
            rows[tuple(live)] = None
        elif kind is Kind.WEIGHT:
            live[stages + at] -= 1
        else:
            live[2 * stages + at] = 1
            rows[tuple(live)] = None
            live[2 * stages + at] = 0
            live[at] -= 1
            live[stages + at] += kind is Kind.INPUT
    table = np.array(list(rows), float)
    # Most moments hold less than the fullest, of everything.
    fullest = table[table.sum(1).argmax()]
    return np.vstack([fullest, table[(table > fullest).any(1)]])


def fitting_counts(
    live: np.ndarray,
    stages: Sequence[StageTable],
    allowed: Sequence[Sequence[int]],
    state_bytes: float,
    budget_bytes: float,
) -> tuple[list[Counts], float]:
    """Counts of a rank that fit the budget where none less do, the fastest first; and the least
    peak that was found, in bytes.

    Args:
        live: `live_counts` of the rank.
        allowed: by stage, the counts to choose from, in ascending order.
        state_bytes: of all stages.
    """

    def peaks(counts: np.ndarray) -> np.ndarray:  # a column per choice, a row per stage
        held = [s.held_bytes[c] for s, c in zip(stages, counts, strict=True)]
        weight = [np.full(counts.shape[1], s.cost.weight_bytes) for s in stages]
        more = [s.recomputed_bytes[c] for s, c in zip(stages, counts, strict=True)]
        return state_bytes + (live @ np.stack([*held, *weight, *more])).max(0)

    def recompute_us(counts: Counts) -> float:
        return sum(float(s.recompute_us[c]) for s, c in zip(stages, counts, strict=True))

    if len(stages) == 1 or math.prod(map(len, allowed)) <= MOST_COUNTS:
        grid = np.array(list(itertools.product(*allowed))).T
        found = peaks(grid)
        if found[0] <= budget_bytes:  # the least counts of all
            return [tuple(map(int, grid[:, 0]))], float(found.min())
        fitting = [tuple(map(int, column)) for column in grid.T[found <= budget_bytes]]
        return sorted(_minimal(fitting), key=recompute_us), float(found.min())

    # First the stages that free the most memory per time.
    def rate(stage: int) -> float:
        held, us = stages[stage].held_bytes, stages[stage].recompute_us
        freed = live[0, stage] * (held[allowed[stage][0]] - held[allowed[stage][-1]])
        return float(freed / max(us[-1], 1e-9))

    counts = np.array([of_stage[0] for of_stage in allowed])
    peak = float(peaks(counts[:, None])[0])
    for stage in sorted(range(len(stages)), key=rate, reverse=True):
        if peak <= budget_bytes:
            break
        grid = np.tile(counts[:, None], len(allowed[stage]))
        grid[stage] = allowed[stage]
        found = peaks(grid)
        enough = np.flatnonzero(found <= budget_bytes)
        best = enough[0] if len(enough) else found.argmin()
        counts, peak = grid[:, best], float(found[best])
    return ([tuple(map(int, counts))] if peak <= budget_bytes else []), peak


def _minimal(fitting: Sequence[Counts]) -> list[Counts]:
    """Those that are not more than another one in every stage."""
    kept: list[Counts] = []
    for counts in sorted(fitting, key=sum):
        if not any(all(a <= b for a, b in zip(k, counts, strict=True)) for k in kept):
            kept.append(counts)
    return kept
