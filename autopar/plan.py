"""`ShardingPlan`: everything that was decided, as a frozen value that JSON can hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from autopar.errors import PlanError
from autopar.files import write_atomically
from autopar.ir.precision import Precision
from autopar.ir.spec import ShardingSpec
from autopar.plan_records import (
    Baseline,
    MemoryEstimate,
    MeshResult,
    ModuleSummary,
    ParetoPoint,
    PipelinePlan,
    SolverRecord,
    StepSummary,
    StepWork,
    TimeEstimate,
    TimeSplit,
    TriedSize,
)
from autopar.units import mesh_text

FORMAT = 9


@dataclass(frozen=True)
class ShardingPlan:
    """One legal way to run a model on a mesh.

    Args:
        model: the model's class name, for messages.
        fingerprint: identifies the graph that the plan was made for.
        mesh: size of each mesh axis.
        cluster: `ClusterInfo.to_dict()`.
        choices: decision name to candidate name, for every decision of the search space.
        parameters: qualified name to storage layout.
        reshard_after_forward: parameters that are re-gathered for the backward (ZeRO-3).
        time, memory: predictions. They include the schedule of `step`.
        solver: how the plan was found.
        budget_bytes: memory per device.
        unruled: predicted time of each operator that runs replicated because it has no rule.
        modules: what was chosen, per module.
        layouts: decision name to the layouts of its results.
        baselines: standard plans on the same cluster, if they were requested.
        optimizer_state: bytes of optimizer state per byte of trainable parameter.
        constraints: layouts that the user fixed, by name.
        source: the model file, if the plan was made from one.
        pareto_front: fastest plans by budget, if they were requested.
        meshes: the meshes that were compared, if the mesh was searched for.
        step: what the step keeps, recomputes and offloads, if that was decided.
        precision: dtypes of the step; None for those of the model.
        microbatches: slices of the batch that the step processes one after another; the plan is
            that of one.
        pipeline: its stages. The mesh has one rank on their axis.
        work: what a step processes.
        sizes: those that were tried, if one was searched for.
        time_splits: regions of a rank's program that run in slices, in the order in which they are
            split.
        states_on: the tier ("host", "nvme") that has the optimizer's state, and runs its step;
            parameters and gradients are on the host then. Empty if all are on the device.
        whole_results: results of the model, besides scalars, that are a large part of its step's
            peak: no split makes them smaller.
        forward: it is the plan of a forward, without gradients; predictions are of that.
    """

    model: str
    fingerprint: str
    mesh: tuple[int, ...]
    cluster: Mapping[str, Any]
    choices: Mapping[str, str]
    parameters: Mapping[str, str]
    reshard_after_forward: tuple[str, ...]
    time: TimeEstimate
    memory: MemoryEstimate
    solver: SolverRecord
    budget_bytes: float
    unruled: Mapping[str, float] = field(default_factory=dict)
    modules: tuple[ModuleSummary, ...] = ()
    layouts: Mapping[str, str] = field(default_factory=dict)
    baselines: tuple[Baseline, ...] = ()
    optimizer_state: float = 2.0
    constraints: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    pareto_front: tuple[ParetoPoint, ...] = ()
    meshes: tuple[MeshResult, ...] = ()
    step: StepSummary | None = None
    precision: Precision | None = None
    microbatches: int = 1
    pipeline: PipelinePlan | None = None
    work: StepWork | None = None
    sizes: tuple[TriedSize, ...] = ()
    time_splits: tuple[TimeSplit, ...] = ()
    states_on: str = ""
    whole_results: tuple[str, ...] = ()
    forward: bool = False

    @property
    def unit(self) -> str:
        """What its predictions are of, for reports: a "step" of training, or a "forward"."""
        return "forward" if self.forward else "step"

    @property
    def added_us(self) -> float:
        """How much longer the step takes to fit the memory, in all microbatches."""
        return 0.0 if self.step is None else self.microbatches * self.step.added_us

    def parameter_specs(self) -> dict[str, ShardingSpec]:
        """Storage layout of every parameter by qualified name."""
        return {name: ShardingSpec.parse(spec) for name, spec in self.parameters.items()}

    def to_json(self) -> str:
        """The plan with a format number and a checksum. Infinite and undefined floats stay."""
        # NumPy's numbers become Python's, and 0 in a float field becomes 0.0, as it is when read
        plan = msgspec.convert(msgspec.to_builtins(self, enc_hook=float), ShardingPlan)
        body = msgspec.to_builtins(plan)
        return json.dumps({"autopar_plan": FORMAT, "sha256": _digest(body), "plan": body}, indent=1)

    def save(self, path: str | Path) -> None:
        """Write the plan to a file. On failure, a file that is already there does not change."""
        write_atomically(path, self.to_json())

    @staticmethod
    def from_json(text: str, *, source: str = "plan") -> ShardingPlan:
        """Inverse of `to_json`.

        Args:
            source: what error messages call the text.

        Raises:
            PlanError: the text is not a plan, has another format, or was changed.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"{source} is not JSON (line {error.lineno}: {error.msg}): the file is truncated "
                "or damaged; make it again with `autopar plan ... -o`"
            ) from error
        if not isinstance(data, dict) or "autopar_plan" not in data:
            raise PlanError(
                f"{source} is JSON but not an autopar plan: it lacks the key 'autopar_plan'"
            )
        if data["autopar_plan"] != FORMAT:
            raise PlanError(
                f"{source} has plan format {data['autopar_plan']}, this autopar reads {FORMAT}; "
                "make the plan again with this version"
            )
        body, digest = data.get("plan"), _digest(data.get("plan"))
        if digest != data.get("sha256"):
            raise PlanError(
                f"{source} was changed after it was written (checksum {digest[:12]} instead of "
                f"{str(data.get('sha256'))[:12]}); make the plan again"
            )
        try:
            return msgspec.convert(body, ShardingPlan)
        except msgspec.ValidationError as error:
            raise PlanError(f"{source} is not a plan: {error}; make the plan again") from error

    @staticmethod
    def load(path: str | Path) -> ShardingPlan:
        """Read a plan file.

        Raises:
            PlanError: the file is missing or malformed.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        return ShardingPlan.from_json(text, source=str(path))

    def check(
        self,
        *,
        fingerprint: str,
        mesh: tuple[int, ...],
        model: str,
        precision: Precision | None = None,
        pipeline_ranks: int = 1,
    ) -> None:
        """Refuse a graph or a mesh that the plan was not made for.

        Args:
            mesh: of one stage, if there is a pipeline.

        Raises:
            PlanError: naming what differs.
        """
        planned = 1 if self.pipeline is None else self.pipeline.ranks
        if planned != pipeline_ranks:
            raise PlanError(
                f"the plan was made for {planned} rank(s) along a mesh axis named pipe, this run "
                f"has {pipeline_ranks}; plan again with --mesh"
            )
        if self.mesh != mesh:
            raise PlanError(
                f"the plan was made for mesh {mesh_text(self.mesh)}, "
                f"this run has {mesh_text(mesh)}; plan again with --mesh"
            )
        if self.precision != precision:
            raise PlanError(
                f"the plan was made for precision {self.precision or 'of the model'}, this run "
                f"has {precision or 'that of the model'}; leave precision= out to take the plan's"
            )
        if self.fingerprint != fingerprint:
            kind = " of a forward in evaluation mode" if self.forward else ""
            raise PlanError(
                f"the plan was made for another graph{kind}: {self.model} {self.fingerprint}, this "
                f"is {model} {fingerprint}. Layers, shapes, batch size, dtype or the train/eval "
                "mode differ; plan again with the model and example batch of this run"
            )


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
