"""The values between the stages of `autopar/compile.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.fx as fx

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.ranks import Ranks
from autopar.errors import EngineError
from autopar.ir.graph import ModelGraph
from autopar.passes.apply_sharding import LocalProgram
from autopar.passes.compile_mode import CompileMode
from autopar.passes.lower import LoweredStep
from autopar.passes.verify import collective_signature
from autopar.plan import ShardingPlan
from autopar.planner.planner import ADAM_STATE, Planned
from autopar.progress import SILENT, TIME_LIMIT, Progress
from autopar.schedule.budget import MemoryPlan, StepBudget, frozen_bytes
from autopar.schedule.program import Program

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The rank that a step is compiled for.

    Args:
        coords: on the mesh.
        groups: names of its process groups, one per mesh axis.
        device_type: of its tensors.
        ranks: all ranks of the run.
    """

    coords: tuple[int, ...]
    groups: tuple[str, ...]
    device_type: str = "cpu"
    ranks: Ranks = field(default_factory=Ranks)

    def of_a_stage(self, cluster: ClusterInfo) -> Place:
        """The place on the mesh of its pipeline stage."""
        axis = cluster.pipe_axis
        coords = tuple(0 if k == axis else c for k, c in enumerate(self.coords))
        return replace(self, coords=coords)

    def number(self, mesh: Sequence[int]) -> int:
        """Of the rank among all of a mesh."""
        number = 0
        for coordinate, size in zip(self.coords, mesh, strict=True):
            number = number * size + coordinate
        return number

    def check_agreement(self, *graphs: fx.GraphModule | None) -> None:
        """Refuse graphs that communicate in another order than rank 0's: they would deadlock.

        Raises:
            EngineError: on all ranks, naming those that differ.
        """
        signatures = (collective_signature(gm, self.groups) for gm in graphs if gm is not None)
        differing = self.ranks.differing(" ".join(signatures))
        if differing:
            raise EngineError(
                f"ranks {differing} built another sequence of collectives than rank 0; they must "
                "run the same model, batch shapes and autopar version"
            )


@dataclass(frozen=True)
class StepPlan:
    """A plan, with what planning knows besides.

    Args:
        program: of the first rank's step.
        memory: its schedule, if planning has made one.
        planned: the search space and the choices of a new plan.
    """

    plan: ShardingPlan
    program: Program | None = None
    memory: MemoryPlan | None = None
    planned: Planned | None = None

    @staticmethod
    def of_rank_zero(decide: Callable[[], StepPlan], ranks: Ranks) -> StepPlan:
        """Rank 0's plan on every rank; its schedule stays on rank 0."""
        decided: list[StepPlan] = []

        def on_rank_zero() -> str:
            decided.append(decide())
            return decided[0].plan.to_json()

        text = ranks.from_rank_zero(on_rank_zero)
        return decided[0] if decided else StepPlan(ShardingPlan.from_json(text))

    def schedule_of(self, program: Program) -> MemoryPlan | None:
        """The schedule, if it is of that program."""
        if self.program is None or self.program.same_as(program):
            return self.memory
        log.info("the step was traced to another program than in planning: scheduled again")
        return None


@dataclass(frozen=True)
class Arguments:
    """What a rank's program is called with.

    Args:
        tensors: of the shapes, dtypes and grad flags of the call; may be fake.
        offloadable: names of the parameters that may be on the host for a part of the step; all
            if None.
    """

    tensors: Sequence[torch.Tensor]
    offloadable: frozenset[str] | None = None


@dataclass(frozen=True)
class CompiledStep:
    """One rank's step for one shape of inputs.

    Args:
        graph: the captured model.
        plan: of all ranks.
        local: this rank's forward program.
        lowered: its forward and backward graph; None if the local program runs eagerly.
        memory: what the step keeps, recomputes and offloads; None without a budget.
    """

    graph: ModelGraph
    plan: ShardingPlan
    local: LocalProgram
    lowered: LoweredStep | None
    memory: MemoryPlan | None


@dataclass(frozen=True)
class StepOptions:
    """How a step is compiled.

    Args:
        cluster: what the step runs on; its memory is the budget that a schedule keeps to, and
            without one the step keeps what eager PyTorch keeps.
        lowered: False leaves the local program as it is, to run eagerly (debugging).
        compile: how the graphs are compiled.
        optimizer_state: bytes of optimizer state per byte of trainable parameter.
        steps_on: the tiers that the optimizer can step on.
        states_on: the tier of all states, "" for the device; None to choose.
        time_limit: seconds of processor time for schedules that planning has not made.
        dump_passes: folder for the graph before and after each pass.
        progress: is told the stages, on every rank.
    """

    cluster: ClusterInfo
    lowered: bool = True
    compile: CompileMode = field(default_factory=CompileMode)
    optimizer_state: float = ADAM_STATE
    steps_on: tuple[str, ...] = ()
    states_on: str | None = None
    time_limit: float = TIME_LIMIT
    dump_passes: Path | None = None
    progress: Progress = SILENT

    def budget(
        self, graph: ModelGraph, plan: ShardingPlan, arguments: Arguments
    ) -> StepBudget | None:
        """The budget of this run, or of the plan if its step was scheduled."""
        memory_bytes = self.cluster.memory_bytes
        if memory_bytes is None and plan.step is not None:
            memory_bytes = plan.budget_bytes
        if memory_bytes is None:
            return None
        copied = sum(graph.placeholders[k].meta["val"].nbytes for k in graph.mutated_placeholders)
        budget = StepBudget.of(
            arguments.tensors, memory_bytes, self.optimizer_state, copied, self.cluster.host_link
        )
        is_open = plan.states_on or self.states_on is None
        return replace(
            budget, tiers=self.cluster.off_device_tiers if is_open else (),
            states_on=plan.states_on, steps_on=self.steps_on,
            frozen_bytes=frozen_bytes(arguments.tensors[: len(graph.parameters)]),
        )  # fmt: skip
