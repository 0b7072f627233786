"""What a pipeline is chosen for, and what is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autopar.cluster.link import Link
from autopar.errors import PlanError
from autopar.schedule.pipeline.actions import PipelineSchedule
from autopar.schedule.pipeline.blocks import Block
from autopar.schedule.pipeline.schedules import SCHEDULES
from autopar.schedule.pipeline.timeline import StageCost


@dataclass(frozen=True)
class PipelineProblem:
    """What a pipeline is chosen for.

    Args:
        blocks: the blocks of the model by the number of samples in a microbatch.
        ranks: of the pipeline.
        batch: samples in the batch of a step.
        link: between two ranks.
        budget_bytes: per device.
        schedules: names of those allowed, in `SCHEDULES`.
        stages_per_rank, microbatches: if they are fixed.
        cuts: the blocks at which stages after the first begin, if they are fixed.
        recompute: "none", "all" or, with cuts, how many blocks from the front of each stage are
            recomputed; if that is fixed.
        sends_beside: messages run beside compute; else they take the time of who sends them.
        beside_bytes: what a rank holds beside states and activations (inputs, and what an operator
            needs while it runs), by the number of samples in a microbatch.
    """

    blocks: Callable[[int], Sequence[Block]]
    ranks: int
    batch: int
    link: Link
    budget_bytes: float = math.inf
    schedules: tuple[str, ...] = tuple(row.name for row in SCHEDULES.values() if row.trains)
    stages_per_rank: int | None = None
    microbatches: int | None = None
    cuts: tuple[int, ...] | None = None
    recompute: str | tuple[int, ...] | None = None
    sends_beside: bool = True
    beside_bytes: Callable[[int], float] = lambda samples: 0.0

    def __post_init__(self) -> None:
        able = [row.name for row in SCHEDULES.values() if row.trains]
        wrong = [name for name in self.schedules if name not in able]
        if wrong or not self.schedules:
            raise PlanError(
                f"pipeline schedules {', '.join(self.schedules) or '(none)'}: choose of"
                f" {', '.join(able)}"
            )
        if min(self.ranks, self.batch) < 1:
            raise PlanError(
                f"a pipeline of {self.ranks} ranks for a batch of {self.batch}: each has to be 1 or"
                " more"
            )
        if self.microbatches is not None and not 1 <= self.microbatches <= self.batch:
            raise PlanError(
                f"a batch of {self.batch} in {self.microbatches} microbatches: each needs a sample;"
                f" choose 1 to {self.batch} microbatches, or a larger batch"
            )
        if self.recompute not in (None, "none", "all") and (
            isinstance(self.recompute, str) or self.cuts is None
        ):
            raise PlanError(
                f"recompute {self.recompute!r} of a pipeline: write none, all or, with cuts, the"
                " number of blocks per stage"
            )


@dataclass(frozen=True)
class PipelineChoice:
    """A pipeline, and what it takes.

    Args:
        cuts: the blocks at which stages after the first begin.
        recompute: by stage, how many of its blocks, from its front, are recomputed.
        costs: by stage.
        peak_bytes: by rank.
    """

    cuts: tuple[int, ...]
    microbatches: int
    schedule: PipelineSchedule
    recompute: tuple[int, ...]
    costs: tuple[StageCost, ...]
    step_us: float
    peak_bytes: tuple[float, ...]
    bubble_fraction: float
