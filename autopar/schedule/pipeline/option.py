"""One schedule at one number of microbatches: what cuts take then, and cuts to begin with.

Borders are where stages begin, and the number of blocks: stage s has blocks borders[s] to
borders[s + 1] - 1. Counts say by stage how many of its blocks, from its front, are recomputed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autopar.schedule.pipeline.actions import PipelineSchedule
from autopar.schedule.pipeline.blocks import Chain
from autopar.schedule.pipeline.memory import Counts, fitting_counts, live_counts
from autopar.schedule.pipeline.partition import Spans, partition
from autopar.schedule.pipeline.schedules import SCHEDULES, make_schedule, rank_of_stage
from autopar.schedule.pipeline.timeline import StageCost, step_time_us

Borders = tuple[int, ...]

# After so many microbatches, or three rounds, the next ones take as long as all that follow.
SETTLED_MICROBATCHES = 36


@dataclass(frozen=True, order=True)
class Score:
    """How good borders are; less is better. What does not fit is worse than all that fits."""

    excess_bytes: float
    step_us: float


class Option:
    """One schedule at one number of microbatches.

    Args:
        recompute: "none", "all", counts by stage, or None if it is to be chosen.
        sends_beside: messages run beside compute.
    """

    def __init__(
        self, name: str, ranks: int, per_rank: int, microbatches: int, chain: Chain,
        budget_bytes: float, recompute: str | Counts | None, sends_beside: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.microbatches, self.sends_beside = name, microbatches, sends_beside
        self.ranks, self.per_rank = ranks, per_rank
        self.chain, self.budget_bytes, self.recompute = chain, budget_bytes, recompute
        self.stages = ranks * per_rank
        self.splits = SCHEDULES[name].splits_backward
        self.rank_of = rank_of_stage(SCHEDULES[name].placement, ranks, per_rank)
        self.stages_of = [
            [s for s, owner in enumerate(self.rank_of) if owner == rank] for rank in range(ranks)
        ]
        self._stage_times: dict[tuple[float, float], np.ndarray] = {}
        self._fits: dict[tuple[object, ...], tuple[list[Counts], float]] = {}

    def schedule(self, microbatches: int | None = None) -> PipelineSchedule:
        return make_schedule(
            self.name, self.ranks, microbatches or self.microbatches, self.per_rank
        )

    # --- time -----------------------------------------------------------------------------------

    def costs(self, borders: Borders, counts: Counts | None = None) -> list[StageCost]:
        """By stage."""
        counts = counts or (0,) * self.stages
        costs = [
            self.chain.cost(*at, count)
            for at, count in zip(itertools.pairwise(borders), counts, strict=True)
        ]
        for stage, (nbytes, us) in self.chain.copies(borders, self.rank_of).items():
            costs[stage] = replace(
                costs[stage],
                state_bytes=costs[stage].state_bytes + nbytes,
                before_us=costs[stage].before_us + us,
                after_us=costs[stage].after_us + us,
            )
        return costs if self.sends_beside else self._with_sends(costs)

    def _with_sends(self, costs: Sequence[StageCost]) -> list[StageCost]:
        """Messages take the time of the stage that sends them."""
        sends = []
        for stage, cost in enumerate(costs):
            forth = stage + 1 < self.stages and self.rank_of[stage + 1] != self.rank_of[stage]
            back = stage > 0 and self.rank_of[stage - 1] != self.rank_of[stage]
            sends.append(
                replace(
                    cost,
                    forward_us=cost.forward_us + forth * cost.send_forward_us,
                    input_us=cost.input_us + back * cost.send_backward_us,
                    send_forward_us=0.0,
                    send_backward_us=0.0,
                )
            )
        return sends

    def rank_bounds_us(self, costs: Sequence[StageCost]) -> list[float]:
        """By rank, a time before which no order of its actions ends the step.

        Before its first F, the first microbatch passes all stages before its own; after its last
        I (or B), the last gradient does. W may fill the time after that.
        """
        m = self.microbatches
        bounds, fill_us, drain_us = [0.0] * self.ranks, 0.0, 0.0
        for stage, cost in enumerate(costs[: self.ranks]):
            rank = self.rank_of[stage]
            own = [costs[s] for s in self.stages_of[rank]]
            start_us = max(fill_us, cost.before_us)
            busy_us = m * sum(c.forward_us + c.backward_us for c in own)
            late_us = m * sum(c.weight_us for c in own) if self.splits else 0.0
            done_us = start_us + busy_us + min(c.after_us for c in own)
            bounds[rank] = max(done_us, start_us + busy_us - late_us + drain_us)
            fill_us = start_us + cost.forward_us + cost.send_forward_us
            drain_us += cost.input_us if self.splits else cost.backward_us
            if stage + 1 < self.ranks:
                drain_us += costs[stage + 1].send_backward_us
        return bounds

    @cached_property
    def least_us(self) -> float:
        """A time before which the step ends with no borders: one microbatch passes all blocks, and
        the ranks compute everything."""
        sums = self.chain.sums
        passes = sums["forward_us"] + sums["input_us"]
        us = passes + sums["weight_us"]
        one_us = (passes if self.splits else us)[-1]
        return float(max(one_us, self.microbatches * max(us[-1] / self.ranks, np.diff(us).max())))

    def bound_us(self, costs: Sequence[StageCost]) -> float:
        return max(self.rank_bounds_us(costs))

    @cached_property
    def _sizes(self) -> tuple[int, int] | None:
        """Two numbers of microbatches between which the step grows as it does up to their real
        number, with rounds of the same size; None if that number is not larger."""
        size = math.ceil(self.microbatches / max(1, self.microbatches // self.ranks))
        rounds = max(3, math.ceil(SETTLED_MICROBATCHES / size))
        sizes = rounds * size, (rounds + rounds // 3) * size
        return sizes if self.microbatches > sizes[1] else None

    @cached_property
    def actions(self) -> int:
        """How many `estimate_us` simulates."""
        return (3 if self.splits else 2) * self.stages * sum(self._sizes or (self.microbatches,))

    @property
    def all_actions(self) -> int:
        return (3 if self.splits else 2) * self.stages * self.microbatches

    def estimate_us(self, costs: Sequence[StageCost]) -> float:
        """The step. That of many microbatches is extrapolated from fewer."""
        if not self._sizes:
            return step_time_us(self.schedule(), costs)
        few, more = self._sizes
        few_us, more_us = (step_time_us(self.schedule(m), costs) for m in self._sizes)
        return more_us + (self.microbatches - more) * (more_us - few_us) / (more - few)

    # --- memory ---------------------------------------------------------------------------------

    @cached_property
    def live(self) -> tuple[np.ndarray, ...]:
        """By rank, `live_counts`. Most schedules hold no more for more microbatches."""
        if self._sizes:
            few, more = (live_counts(self.schedule(m)) for m in self._sizes)
            if all(map(np.array_equal, few, more)):
                return more
        return live_counts(self.schedule())

    def fits(self, borders: Borders) -> list[tuple[list[Counts], float]]:
        """By rank, its `fitting_counts`."""
        copies = self.chain.copies(borders, self.rank_of)
        found = []
        for rank, stages in enumerate(self.stages_of):
            at = [(borders[s], borders[s + 1]) for s in stages]
            state_bytes = sum(copies[s][0] for s in stages if s in copies)
            key = rank, state_bytes, *at
            if key not in self._fits:
                tables = [self.chain.stage(*blocks) for blocks in at]
                state_bytes += sum(t.cost.state_bytes for t in tables)
                allowed = [self._allowed(s, b - a) for s, (a, b) in zip(stages, at, strict=True)]
                self._fits[key] = fitting_counts(
                    self.live[rank], tables, allowed, state_bytes, self.budget_bytes
                )
            found.append(self._fits[key])
        return found

    def _allowed(self, stage: int, blocks: int) -> Sequence[int]:
        if self.recompute is None:
            return range(blocks + 1)
        if isinstance(self.recompute, str):
            return (0 if self.recompute == "none" else blocks,)
        return (self.recompute[stage],)

    def all_counts(self, borders: Borders) -> Iterator[Counts]:
        """Those that fit where none less do, the fastest of every rank first."""
        for chosen in itertools.product(*(counts for counts, _ in self.fits(borders))):
            by_stage = {
                stage: count
                for stages, counts in zip(self.stages_of, chosen, strict=True)
                for stage, count in zip(stages, counts, strict=True)
            }
            yield tuple(by_stage[stage] for stage in range(self.stages))

    def peak_bytes(self, borders: Borders) -> float:
        """The least of the fullest rank."""
        return max(peak for _, peak in self.fits(borders))

    # --- cuts -----------------------------------------------------------------------------------

    def all_borders(self) -> Iterator[Borders]:
        blocks = len(self.chain.blocks)
        for cuts in itertools.combinations(range(1, blocks), self.stages - 1):
            yield 0, *cuts, blocks

    def bound(self, borders: Borders) -> tuple[Score, float]:
        """A score that is not more than that of the borders; and a sum over ranks, which prefers
        ranks of equal time among borders of the same bound."""
        counts = next(self.all_counts(borders), None)
        of_rank = self.rank_bounds_us(self.costs(borders, counts))
        excess = 0.0
        if counts is None:
            excess = sum(max(0.0, peak - self.budget_bytes) for _, peak in self.fits(borders))
        return Score(excess, max(of_rank)), sum(us * us for us in of_rank)

    def score(self, borders: Borders) -> Score:
        counts = next(self.all_counts(borders), None)
        if counts is None:
            return self.bound(borders)[0]
        return Score(0.0, self.estimate_us(self.costs(borders, counts)))

    def starts(self) -> list[Borders]:
        """Where the slowest rank is as fast as possible if each has one stage, otherwise where the
        slowest stage is; and `smallest`, unless all fits without recomputation."""
        borders, slowest = partition(len(self.chain.blocks), self.stages, self._stage_us)
        if not math.isfinite(slowest):
            return [self.smallest()]
        if any(next(self.all_counts(borders), (1,))):
            return [borders, self.smallest()]
        return [borders]

    def smallest(self) -> Borders:
        """Borders whose fullest stage is as empty as possible."""
        return partition(
            len(self.chain.blocks),
            self.stages,
            lambda stage: self._spans.peak_bytes(*self._live(stage), self._recompute),
        )[0]

    def _stage_us(self, stage: int) -> np.ndarray:
        """`rank_bounds_us`, or a part of it, for all spans of blocks."""
        live, spans, m = self._live(stage), self._spans, self.microbatches
        if live not in self._stage_times:
            more_us = spans.recompute_us(*live, self._recompute, self.budget_bytes / self.per_rank)
            passes = spans.of("forward_us") + spans.of("input_us") + more_us
            busy = passes + spans.of("weight_us")
            fill, drain = spans.before("forward_us"), spans.before("input_us")
            if self.per_rank > 1:
                times = busy
            elif self.splits:
                times = fill + np.maximum(m * busy, m * passes + drain)
            else:
                times = fill + drain + spans.before("weight_us") + m * busy
            self._stage_times[live] = times
        return self._stage_times[live]

    @property
    def _spans(self) -> Spans:
        return self.chain.spans(self.stages)

    @property
    def _recompute(self) -> str | None:
        assert not isinstance(self.recompute, tuple), "counts by stage need the cuts"
        return self.recompute

    def _live(self, stage: int) -> tuple[float, float]:
        """How many microbatches a stage holds when its rank is fullest: for its backward, for W."""
        rank = self.rank_of[stage]
        at = self.stages_of[rank].index(stage)
        fullest = self.live[rank][0]
        return max(1.0, fullest[at]), fullest[self.per_rank + at]
