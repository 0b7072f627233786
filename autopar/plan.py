"""`ShardingPlan`: everything that was decided, as a frozen value that JSON can hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from autopar.errors import PlanError
from autopar.files import write_atomically
from autopar.ir.precision import Precision
from autopar.ir.spec import ShardingSpec
from autopar.units import mesh_text

FORMAT = 9


@dataclass(frozen=True)
class TimeEstimate:
    """Predicted step time.

    Args:
        compute_us: operators.
        exposed_us: communication that compute waits for.
        overlapped_us: communication that runs beside compute and does not lengthen the step.
        weights_us: the part of the communication, exposed or overlapped, that moves weights and
            their gradients.
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


# What reports call the fields.
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
class StepWork:
    """What a step processes on all devices.

    Args:
        samples, tokens: of the batch; no tokens where inputs are none.
        flops: of forward and backward by the dtype of the result, with nothing computed twice.
    """

    samples: int
    tokens: int
    flops: Mapping[str, float]

    def of_samples(self, samples: int) -> StepWork:
        """The work of another number of samples."""
        scale = samples / self.samples if self.samples else 1.0
        flops = {dtype: scale * count for dtype, count in self.flops.items()}
        return StepWork(samples, round(scale * self.tokens), flops)


@dataclass(frozen=True)
class SolverRecord:
    """How the plan was found, and how far it can be from the best one.

    Args:
        method: the solver's method.
        objective_us: the plan's step time, as the solver counts it.
        bound_us: no plan has a smaller objective.
        gap: relative distance from the bound to the objective.
        seconds: run time by phase of planning.
        sharing_us: the best objective by the way in which copies of repeated blocks share
            decisions.
    """

    method: str
    objective_us: float
    bound_us: float
    gap: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    sharing_us: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleSummary:
    """What the plan does in one module, or in all its copies in repeated blocks.

    Args:
        name: qualified name; `*` and `{0,2-5}` stand for indices of copies, "" for the model.
        words: a description: "data parallel on axis 0; tensor parallel on axis 1, column".
        count: number of copies.
        parameters: number of elements in all copies; a tied parameter counts where it is owned.
        time_us, memory_bytes: of all copies together, without the modules inside them. Over all
            entries of a plan they add up to the solver's objective, and to the memory without the
            transient peak.
    """

    name: str
    words: str
    count: int
    parameters: int
    time_us: float
    memory_bytes: float


@dataclass(frozen=True)
class Baseline:
    """A standard plan (DDP, FSDP, Megatron) under the same cost model, for comparison."""

    name: str
    time: TimeEstimate
    memory: MemoryEstimate


@dataclass(frozen=True)
class ParetoPoint:
    """The fastest plan that was found within a budget.

    Args:
        budget_bytes: per device; infinite for the plan without a limit.
        step_us, memory_bytes: predictions.
        bound_us: no plan within the budget is faster.
        words: a short description.
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
        step_us: step time of its fastest plan; infinite if none fits, or if the mesh was skipped.
        bound_us: no plan on the mesh is faster.
        memory_bytes: memory of that plan.
        note: why there is no plan.
        pipe: ranks of a pipeline, outside of the mesh.
    """

    mesh: tuple[int, ...]
    step_us: float
    bound_us: float
    memory_bytes: float
    note: str = ""
    pipe: int = 1

    @property
    def text(self) -> str:
        """`2x8`, or `pipe=4,2x8`."""
        mesh = mesh_text(self.mesh)
        return mesh if self.pipe == 1 else f"pipe={self.pipe},{mesh}"


@dataclass(frozen=True)
class TriedSize:
    """One size of a search for the largest batch, the longest sequence or the fewest devices.

    Args:
        size: in words.
        step_us: step time of its fastest plan; infinite if it has none.
        memory_bytes: of that plan, or the least that was found; infinite if nothing is known.
        note: what makes it fit, or why it has none.
        work: of its step.
    """

    size: str
    step_us: float
    memory_bytes: float
    note: str = ""
    work: StepWork | None = None


@dataclass(frozen=True)
class ModuleMemory:
    """What happens to the values of a module's forward, and to its parameters.

    Args:
        kept_bytes: values that stay on the device until the backward reads them.
        offloaded_bytes: values that wait for the backward on the host.
        parameters_bytes: parameters that are on the host for a part of the step.
        recompute_us, recompute_flops: operators that run a second time.
        repeated_collectives_us: collectives that run a second time.
    """

    module: str
    kept_bytes: int
    offloaded_bytes: int
    parameters_bytes: int
    recompute_us: float
    recompute_flops: float
    repeated_collectives_us: float


@dataclass(frozen=True)
class StepSummary:
    """A scheduled step. Bytes are per device.

    Args:
        us: predicted time of forward and backward.
        backward_us: when the backward starts.
        added_us: time spent on recomputation, re-gathering and waiting for the host.
        waited_us: by resource, how long compute waits for it.
        peak_bytes: the most that the step's own values take, less the parameters that are on the
            host at that time.
        eager_bytes: the same if the step kept everything.
        peak_at: where the peak is.
        resident_bytes: memory in use before the step.
        state_on_host: whether the optimizer's state is on the host outside of the optimizer step.
        parameters_on_host: names of the parameters that are on the host for a part of the step.
        live: over time: (us, bytes kept, bytes recomputed, other bytes, bytes of parameters on
            the host).
        modules: per block, in the order of the forward.
    """

    us: float
    backward_us: float
    added_us: float
    waited_us: Mapping[str, float]
    peak_bytes: int
    eager_bytes: int
    peak_at: str
    resident_bytes: float
    state_on_host: bool
    parameters_on_host: tuple[str, ...]
    live: tuple[tuple[float, int, int, int, int], ...]
    modules: tuple[ModuleMemory, ...]


@dataclass(frozen=True)
class TimeSplit:
    """A region of a rank's program that runs in slices, one after another.

    Splits of a plan are applied in order, each to what the ones before it made.

    Args:
        first, last: names of its first and its last operator.
        dim: of the first one's first result, that is sliced.
        pieces: that the dim comes in.
        slices: each takes one or more of the pieces; their numbers differ by one at most.
        at_once: the backward of each slice runs right after its forward.
        factor: what is sliced, for reports: "dim 1 of size 128 of linear".
        modules: that the region belongs to.
        sources: lines of the model, as `file:line`, where it begins and ends.
    """

    first: str
    last: str
    dim: int
    pieces: int
    slices: int
    at_once: bool = False
    factor: str = ""
    modules: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class StagePlan:
    """One stage of a pipeline, per device.

    Args:
        first: the module or operator at which it begins.
        rank: of the pipeline, that runs it.
        forward_us, input_us, weight_us: of one microbatch: forward, and backward for the gradients
            of inputs and of weights.
        send_forward_us, send_backward_us: of what it sends for one microbatch.
        forward_bytes, backward_bytes: of that.
        state_bytes: parameters, gradients and optimizer state.
        held_bytes: activations that it keeps for one microbatch in flight.
        weight_bytes: of these, what waits for the gradients of weights.
        recomputed_bytes: what the backward computes again.
        before_us, after_us: once per step: gathers of parameters; sums of gradients and the
            optimizer's step.
    """

    first: str
    rank: int
    forward_us: float
    input_us: float
    weight_us: float
    send_forward_us: float
    send_backward_us: float
    forward_bytes: float
    backward_bytes: float
    state_bytes: float
    held_bytes: float
    weight_bytes: float
    recomputed_bytes: float
    before_us: float
    after_us: float


@dataclass(frozen=True)
class PipelinePlan:
    """How a step runs in stages.

    Args:
        axis: of the mesh, whose coordinates are the ranks of the pipeline.
        ranks: of the pipeline.
        firsts: names of the operators at which stages begin, without the first stage's.
        schedule: name of the order of actions, or the actions themselves, a line per rank.
        microbatches: of the batch.
        stages: in their order.
        step_us: predicted time of a step.
        bubble_fraction: part of the step in which ranks are idle, on average.
        peak_bytes: by rank of the pipeline, predicted memory of a device.
        layout: all parts of the model, with `|` between stages; empty if one begins within a part.
    """

    axis: int
    ranks: int
    firsts: tuple[str, ...]
    schedule: str
    microbatches: int
    stages: tuple[StagePlan, ...]
    step_us: float
    bubble_fraction: float
    peak_bytes: tuple[float, ...]
    layout: str = ""


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
            raise PlanError(
                f"the plan was made for another graph: {self.model} {self.fingerprint}, this is "
                f"{model} {fingerprint}. Layers, shapes, batch size, dtype or the train/eval mode "
                "differ; plan again with the model and example batch of this run"
            )


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
