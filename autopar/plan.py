"""`ShardingPlan`: what was decided, as a frozen value that is JSON in and out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from autopar.errors import PlanError
from autopar.files import write_atomically
from autopar.ir.spec import ShardingSpec
from autopar.plan_step import StepSummary

FORMAT = 4


@dataclass(frozen=True)
class TimeEstimate:
    """Predicted step time in microseconds: what adds up, and what hides behind compute.

    `weights_us` is the communication of weights and their gradients, exposed or overlapped.
    """

    compute_us: float
    exposed_us: float
    overlapped_us: float
    weights_us: float = 0.0

    @property
    def step_us(self) -> float:
        return self.compute_us + self.exposed_us


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes per device by kind."""

    parameters_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    buffers_bytes: float
    transient_bytes: float

    @property
    def total_bytes(self) -> float:
        return sum(asdict(self).values())


# Field names by how reports call them.
MEMORY_KINDS = {
    "parameters": "parameters_bytes",
    "gradients": "gradients_bytes",
    "optimizer state": "optimizer_bytes",
    "saved activations": "activations_bytes",
    "buffers": "buffers_bytes",
    "transient peak": "transient_bytes",
}
TIME_KINDS = {
    "compute": "compute_us",
    "exposed communication": "exposed_us",
    "overlapped communication": "overlapped_us",
}


@dataclass(frozen=True)
class SolverRecord:
    """How the plan was found, and how good it is known to be.

    Args:
        sharing_us: the best step found, by which copies of repeated blocks shared one decision.
    """

    method: str
    objective_us: float
    bound_us: float
    gap: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    sharing_us: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleSummary:
    """What the plan does in one module, or in all copies of it in repeated blocks, for reports.

    Args:
        name: qualified name; `*` and `{0,2-5}` stand for indices of copies, "" for the model.
        words: "data parallel on axis 0; tensor parallel on axis 1, column".
        count: number of copies.
        parameters: elements, of all copies together; a tied parameter counts where it is owned.
        time_us, memory_bytes: of all copies together, without modules inside of them; the sum over
            a plan's entries is the solver's objective, and the memory without the transient peak.
    """

    name: str
    words: str
    count: int
    parameters: int
    time_us: float
    memory_bytes: float


@dataclass(frozen=True)
class Baseline:
    """A plan as people write it by hand, under the same cost model, for comparison."""

    name: str
    time: TimeEstimate
    memory: MemoryEstimate
    fits: bool


@dataclass(frozen=True)
class ParetoPoint:
    """The fastest plan found within a budget.

    Args:
        budget_bytes: per device; infinite for the plan without a limit.
        step_us, memory_bytes: predictions.
        bound_us: no plan within the budget is faster.
        words: what it does, in short.
    """

    budget_bytes: float
    step_us: float
    memory_bytes: float
    bound_us: float
    words: str = ""


@dataclass(frozen=True)
class MeshResult:
    """One logical mesh of a search over them.

    Args:
        mesh: size of each axis.
        step_us: of its fastest plan; infinite where none fits or none was looked for.
        bound_us: no plan on it is faster.
        memory_bytes: of that plan.
        note: why there is no plan.
    """

    mesh: tuple[int, ...]
    step_us: float
    bound_us: float
    memory_bytes: float
    note: str = ""


@dataclass(frozen=True)
class ShardingPlan:
    """One legal way to run a model on a mesh.

    Args:
        model: the model's class name, for messages.
        fingerprint: of the graph the plan was made for.
        mesh: size of each mesh axis.
        cluster: the `ClusterInfo` as data.
        choices: decision name to candidate name, for every decision of the search space.
        parameters: qualified name to storage layout.
        reshard_after_forward: parameters gathered again for backward (ZeRO-3).
        time, memory: predictions.
        solver: provenance.
        budget_bytes: per device.
        unruled: operators that ran replicated for lack of a rule, with their predicted time.
        modules: what was chosen, per module.
        layouts: decision name to the layouts of its results.
        baselines: hand-written plans on the same cluster, where they were asked for.
        optimizer_state: bytes of it per byte of trainable parameter.
        constraints: what the plan was asked to keep to.
        source: the model file, where it was planned from one.
        pareto_front: fastest plans by budget, where they were asked for.
        meshes: the logical meshes that were compared, where the mesh was searched for.
        step: what the step keeps and computes again, where that was decided; `time` and `memory`
            are then those of that.
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

    def parameter_specs(self) -> dict[str, ShardingSpec]:
        """Storage layout of every parameter by qualified name."""
        return {name: ShardingSpec.parse(spec) for name, spec in self.parameters.items()}

    # -- JSON -----------------------------------------------------------------------------------

    def to_json(self) -> str:
        body = asdict(self)
        text = json.dumps(body, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return json.dumps({"autopar_plan": FORMAT, "sha256": digest, "plan": body}, indent=1)

    def save(self, path: str | Path) -> None:
        """Write atomically: the file is the whole plan or does not change."""
        write_atomically(path, self.to_json())

    @staticmethod
    def from_json(text: str, *, source: str = "plan") -> ShardingPlan:
        """Inverse of `to_json`.

        Raises:
            PlanError: not a plan, of another format version, or changed after it was written.
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
                f"{source} is JSON but no autopar plan: it lacks the key 'autopar_plan'"
            )
        if data["autopar_plan"] != FORMAT:
            raise PlanError(
                f"{source} has plan format {data['autopar_plan']}, this autopar reads {FORMAT}; "
                "make the plan again with this version"
            )
        body = data.get("plan") or {}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if digest != data.get("sha256"):
            raise PlanError(
                f"{source} was changed after it was written (checksum {digest[:12]} instead of "
                f"{str(data.get('sha256'))[:12]}); make the plan again"
            )
        known = {f.name for f in fields(ShardingPlan)}
        if set(body) - known or known - set(body):
            raise PlanError(f"{source}: keys {sorted(set(body) ^ known)} are missing or unknown")
        return ShardingPlan(
            **body
            | {
                "mesh": tuple(body["mesh"]),
                "reshard_after_forward": tuple(body["reshard_after_forward"]),
                "time": TimeEstimate(**body["time"]),
                "memory": MemoryEstimate(**body["memory"]),
                "solver": SolverRecord(**body["solver"]),
                "modules": tuple(ModuleSummary(**m) for m in body["modules"]),
                "baselines": tuple(_baseline(b) for b in body["baselines"]),
                "pareto_front": tuple(ParetoPoint(**p) for p in body["pareto_front"]),
                "step": None if body["step"] is None else StepSummary.from_dict(body["step"]),
                "meshes": tuple(
                    MeshResult(**m | {"mesh": tuple(m["mesh"])}) for m in body["meshes"]
                ),
            }
        )

    @staticmethod
    def load(path: str | Path) -> ShardingPlan:
        """Read a plan file.

        Raises:
            PlanError: missing or malformed.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        return ShardingPlan.from_json(text, source=str(path))

    # -- use ------------------------------------------------------------------------------------

    def check(self, *, fingerprint: str, mesh: tuple[int, ...], model: str) -> None:
        """Refuse a plan that was made for something else.

        Raises:
            PlanError: naming what differs.
        """
        if self.mesh != mesh:
            raise PlanError(
                f"the plan was made for mesh {'x'.join(map(str, self.mesh))}, "
                f"this run has {'x'.join(map(str, mesh))}; plan again with --mesh"
            )
        if self.fingerprint != fingerprint:
            raise PlanError(
                f"the plan was made for another graph: {self.model} {self.fingerprint}, this is "
                f"{model} {fingerprint}. Layers, shapes, batch size, dtype or the train/eval mode "
                "differ; plan again with the model and example batch of this run"
            )


def _baseline(data: Mapping[str, Any]) -> Baseline:
    return Baseline(
        data["name"],
        TimeEstimate(**data["time"]),
        MemoryEstimate(**data["memory"]),
        data["fits"],
    )
