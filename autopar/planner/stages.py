"""The stages of a plan's pipeline: where the model is cut, in which order stages run, and what that
takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.link import Link
from autopar.errors import ConstraintError, MeshError, PlanError
from autopar.plan import ShardingPlan
from autopar.plan_records import MemoryEstimate, PipelinePlan, StagePlan, TimeEstimate
from autopar.planner.batch_bytes import BatchBytes
from autopar.planner.pipeline_blocks import OperatorChain, operator_chain
from autopar.planner.planner import Planned
from autopar.planner.stage_names import firsts_of, layout_of, name_of
from autopar.schedule.pipeline.actions import Kind, PipelineSchedule
from autopar.schedule.pipeline.blocks import Block
from autopar.schedule.pipeline.check import check
from autopar.schedule.pipeline.choose import choose_pipeline
from autopar.schedule.pipeline.problem import PipelineChoice, PipelineProblem
from autopar.schedule.pipeline.schedules import SCHEDULES, make_schedule


@dataclass(frozen=True)
class PipelineOptions:
    """What a user fixes of a pipeline; None of what is to be chosen.

    Args:
        axis: of the mesh, whose coordinates are the ranks.
        ranks: of the pipeline.
        link: between two of them.
        schedule: a name in `SCHEDULES`, or a file of actions (CSV, a row per rank).
        stages: names of modules or operators at which the second and later stages begin, separated
            by commas.
        if_possible: stages are those of another call of the model, which has other operators.
    """

    axis: int
    ranks: int
    link: Link
    schedule: str | None = None
    stages: str | None = None
    if_possible: bool = False

    @staticmethod
    def of(
        cluster: ClusterInfo, schedule: str | None, stages: str | None
    ) -> PipelineOptions | None:
        """The options of a mesh; None if it has no axis of several stages.

        Raises:
            MeshError: a schedule or stages are given, and there is no such axis.
        """
        axis, ranks = cluster.pipe_axis, cluster.pipeline_ranks
        if axis is None or ranks == 1:
            if schedule is not None or stages is not None:
                raise MeshError(
                    f"schedule= and stages= are of a pipeline, and mesh {cluster.mesh_text} has "
                    "none; name one of its axes pipe, as in 'pipe=2,data=4'"
                )
            return None
        return PipelineOptions(axis, ranks, cluster.links[axis], schedule, stages)

    def as_in(self, plan: PipelinePlan) -> PipelineOptions:
        """The stages of a plan, for other calls of the model."""
        firsts = ",".join(stage.first for stage in plan.stages[1:])
        return replace(self, schedule=plan.schedule, stages=firsts, if_possible=True)

    @property
    def actions(self) -> PipelineSchedule | None:
        """The schedule of a file.

        Raises:
            PlanError: there is no such schedule and no such file, or it cannot run.
        """
        name = self.schedule
        if name is None or name in SCHEDULES:
            return None
        if any(c.isspace() for c in name):  # of a plan
            return PipelineSchedule.parse(name)
        if not name.endswith(".csv"):
            raise PlanError(
                f"there is no pipeline schedule {name!r}; it is one of "
                f"{', '.join(n for n, row in SCHEDULES.items() if row.trains)}, or a CSV file of "
                "actions with a row per rank"
            )
        schedule = PipelineSchedule.read_csv(Path(name))
        if len(schedule.ranks) != self.ranks:
            raise PlanError(
                f"the schedule in {name} is for {len(schedule.ranks)} ranks, and the mesh has "
                f"{self.ranks} along its pipe axis"
            )
        check(schedule)
        return schedule


def _check_count(stages: int, schedules: Sequence[str], options: PipelineOptions) -> None:
    """Refuse a number of stages that no schedule has.

    Raises:
        PlanError: naming the schedules and their numbers.
    """
    rows = [SCHEDULES[name] for name in schedules]
    for row in rows:
        per_rank, rest = divmod(stages, options.ranks)
        least = row.stages_per_rank
        if not rest and (per_rank == least or (row.more and per_rank > least)):
            return
    ways = ", ".join(
        f"{row.name} {row.stages_per_rank * options.ranks}{' or a multiple' if row.more else ''}"
        for row in rows
    )
    raise PlanError(
        f"stages= cuts the model into {stages} stages; on {options.ranks} ranks, schedules run so "
        f"many: {ways}. Name one place less than there are stages, or another schedule="
    )


# Costs of a block that depend on the size of a microbatch.
_LINES = tuple(f.name for f in fields(Block) if f.name not in ("name", "shares"))


def schedule_of(plan: PipelinePlan) -> PipelineSchedule:
    """The order of actions on every rank."""
    if plan.schedule not in SCHEDULES:
        return PipelineSchedule.parse(plan.schedule)
    stages = len(plan.firsts) + 1
    return make_schedule(plan.schedule, plan.ranks, plan.microbatches, stages // plan.ranks)


def in_flight(pipeline: PipelinePlan) -> list[int]:
    """By stage, the most microbatches whose activations it holds at a time."""
    most = [0] * len(pipeline.stages)
    for row in schedule_of(pipeline).ranks:
        now = [0] * len(pipeline.stages)
        for action in row:
            if action.kind is Kind.FORWARD:
                now[action.stage] += 1
                most[action.stage] = max(most[action.stage], now[action.stage])
            elif action.kind is not Kind.WEIGHT:
                now[action.stage] -= 1
    return most


def plan_stages(
    planned: Planned,
    options: PipelineOptions,
    samples: int,
    microbatches: int | None,
    *,
    chains: Mapping[int, OperatorChain] | None = None,
) -> ShardingPlan:
    """The plan of a microbatch, with the fastest pipeline that fits the memory.

    Args:
        samples: of the batch.
        microbatches: of the batch; chosen if None.
        chains: costs by the samples of a microbatch; those of the plan if None.

    Raises:
        InfeasibleError: no pipeline fits; it names the stage.
        PlanError: there are more stages than places to cut, or a name that the model lacks.
    """
    own = next(iter(chains)) if chains else -(-samples // (microbatches or 1))
    chains = chains or {own: operator_chain(planned.space, planned.choices)}
    chain = next(iter(chains.values()))
    given = options.actions
    names = [n for n, row in SCHEDULES.items() if row.trains]
    stages_per_rank = None
    if given is not None:
        stages_per_rank = given.stages // options.ranks
        names = ["interleaved" if stages_per_rank > 1 else "1f1b"]
    elif options.schedule is not None:
        names = [options.schedule]
    cuts: tuple[int, ...] | None = None
    places = chain.places_for(options.ranks)
    if options.stages is not None:
        try:
            fixed = firsts_of(planned.graph, options.stages)
            places = sorted({*places, *fixed})  # stages recompute block by block
            cuts = tuple(places.index(first) + 1 for first in fixed)
        except ConstraintError:
            if not options.if_possible:
                raise
    if cuts is not None and given is None:
        _check_count(len(cuts) + 1, names, options)
    least = options.ranks * min(SCHEDULES[n].stages_per_rank for n in names)
    if cuts is None and len(places) + 1 < least:
        places = list(range(1, len(chain.nodes)))
    known = {size: c.between(places) for size, c in chains.items()}
    memory = _of_batch(planned, samples / own)
    per_sample = memory.transient_bytes / own
    beside = memory.buffers_bytes + memory.activations_bytes
    problem = PipelineProblem(
        partial(_blocks_at, known), options.ranks, samples, options.link, planned.plan.budget_bytes,
        tuple(names), stages_per_rank, microbatches, cuts,
        sends_beside=planned.space.cluster.device.runs_beside,
        beside_bytes=lambda size: beside + per_sample * size,
    )  # fmt: skip
    choice = choose_pipeline(problem)
    firsts = [places[k - 1] for k in choice.cuts]
    blocks = _blocks_at(known, -(-samples // choice.microbatches))
    plan = _with_pipeline(planned, options, chain, blocks, choice, firsts, given, memory)
    work = None if plan.work is None else plan.work.of_samples(samples)
    return replace(plan, work=work)


def _blocks_at(known: Mapping[int, Sequence[Block]], size: int) -> list[Block]:
    """Blocks for microbatches of a size, on the lines through those of known sizes.

    Smaller ones than the smallest known cost as much: layouts may not split so few samples.
    """
    sizes = sorted(known)
    if size in known or size < sizes[0] or len(sizes) == 1:
        return list(known.get(size, known[sizes[0]]))
    high = next((k for k in range(1, len(sizes)) if sizes[k] >= size), len(sizes) - 1)
    a, b = sizes[high - 1], sizes[high]
    share = (size - a) / (b - a)
    blocks = []
    for x, y in zip(known[a], known[b], strict=True):
        at: dict[str, Any] = {
            name: _on_line(getattr(x, name), getattr(y, name), share) for name in _LINES
        }
        at["weight_bytes"] = min(at["weight_bytes"], at["held_bytes"])
        blocks.append(replace(y, **at))
    return blocks


def _on_line(first: float, second: float, share: float) -> float:
    return max(0.0, first + share * (second - first))


def _with_pipeline(
    planned: Planned, options: PipelineOptions, chain: OperatorChain, blocks: Sequence[Block],
    choice: PipelineChoice, firsts: Sequence[int], given: PipelineSchedule | None,
    beside: MemoryEstimate,
) -> ShardingPlan:  # fmt: skip
    schedule = choice.schedule if given is None else given
    edges = [0, *choice.cuts, len(blocks)]
    stages = []
    for k, cost in enumerate(choice.costs):
        last = blocks[edges[k + 1] - 1]
        before = blocks[edges[k] - 1] if edges[k] else None
        stages.append(
            StagePlan(
                name_of(planned.graph, chain.nodes[firsts[k - 1]].name) if k else "the input",
                schedule.rank_of_stage[k],
                forward_bytes=last.forward_bytes if k + 1 < len(choice.costs) else 0.0,
                backward_bytes=before.backward_bytes if before else 0.0,
                **{f.name: getattr(cost, f.name) for f in fields(cost)},
            )
        )
    layout = layout_of(planned.graph, firsts)
    pipeline = PipelinePlan(
        options.axis, options.ranks, tuple(chain.nodes[k].name for k in firsts),
        str(schedule) if given is not None else schedule.name, choice.microbatches, tuple(stages),
        choice.step_us, choice.bubble_fraction, choice.peak_bytes, layout or "",
    )  # fmt: skip
    compute = max(
        choice.microbatches
        * sum(s.forward_us + s.input_us + s.weight_us for s in stages if s.rank == rank)
        for rank in range(options.ranks)
    )
    time = TimeEstimate(compute, max(0.0, choice.step_us - compute), 0.0)
    return replace(
        planned.plan, time=time, memory=_memory(beside, pipeline), pipeline=pipeline,
        microbatches=choice.microbatches,
    )  # fmt: skip


def _of_batch(planned: Planned, microbatches: float) -> MemoryEstimate:
    """The memory of a microbatch's plan with all that is there of the batch, but for activations,
    which stages hold."""
    memory = replace(planned.plan.memory, activations_bytes=0.0)
    return BatchBytes.of(planned).added_to(memory, microbatches)


def _memory(known: MemoryEstimate, pipeline: PipelinePlan) -> MemoryEstimate:
    """Of the fullest rank.

    Args:
        known: as of `_of_batch`.
    """
    fullest = max(range(pipeline.ranks), key=pipeline.peak_bytes.__getitem__)
    states = sum(s.state_bytes for s in pipeline.stages if s.rank == fullest)
    total = known.parameters_bytes + known.gradients_bytes + known.optimizer_bytes or 1.0
    share = states / total
    activations = pipeline.peak_bytes[fullest] - states
    return MemoryEstimate(
        known.parameters_bytes * share, known.gradients_bytes * share,
        known.optimizer_bytes * share, activations + known.activations_bytes, known.buffers_bytes,
        known.transient_bytes,
    )  # fmt: skip
