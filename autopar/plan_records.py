"""What a plan says besides layouts: predictions, what was tried, slices, stages. Frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from autopar.units import mesh_text


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
FORWARD_MEMORY_KINDS = {  # of a plan without gradients
    "parameters": "parameters_bytes",
    "inputs and buffers": "buffers_bytes",
    "gathered results": "activations_bytes",
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
        flops: of forward and backward, if there is one, by the dtype of the result, with nothing
            computed twice.
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
        bounded: which of these the bound holds for: plans in which no more copies differ.
        trade: memory and time against those of the fastest plan, if that is another one.
        alike: the axes that all plans of the space split alike, in words.
    """

    method: str
    objective_us: float
    bound_us: float
    gap: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    sharing_us: Mapping[str, float] = field(default_factory=dict)
    bounded: str = ""
    trade: str = ""
    alike: str = ""


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
class HostStep:
    """The optimizer's step on the host, where the states are.

    Args:
        us: predicted time of all of it.
        exposed_us: of what comes after the backward; the rest runs beside it.
    """

    us: float
    exposed_us: float


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
        host_step: the optimizer's step, if it runs on the host.
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
    host_step: HostStep | None = None


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
