"""What a report says at its top: whether the plan fits, how fast it is, and how to use it."""

from __future__ import annotations

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.tiers import HOST
from autopar.plan import ShardingPlan
from autopar.plan_records import StepSummary, StepWork
from autopar.units import bytes_text, count_text, flops_text, percent_text, time_text


def fits(memory_bytes: float, plan: ShardingPlan) -> bool:
    """Whether so much is within the plan's budget."""
    return memory_bytes <= plan.budget_bytes * (1 + 1e-9)


def amounts(work: StepWork, step_us: float) -> list[str]:
    """What a second processes: tokens, if there are any, and samples."""
    counts = {"tokens": work.tokens, "samples": work.samples}
    return [f"{count_text(1e6 * n / step_us)} {unit}/s" for unit, n in counts.items() if n]


def verdict(plan: ShardingPlan) -> list[tuple[str, str]]:
    """Whether the plan fits the memory, at which step time, and what makes it fit."""
    spare = plan.budget_bytes - plan.memory.total_bytes
    step = f"{time_text(plan.time.step_us)} per {plan.unit}"
    if not fits(plan.memory.total_bytes, plan):
        return [("fits", f"no: {step}, {bytes_text(-spare)} too much")]
    reasons = []
    if plan.microbatches > 1:
        reasons.append(f"{plan.microbatches} microbatches")
    if plan.time_splits:
        reasons.append(f"{len(plan.time_splits)} regions in slices")
    if plan.step is not None:
        again, off_device = _added(plan)
        if again > 0:
            reasons.append(f"recomputing and re-gathering, {time_text(again)} of it")
        if plan.states_on:
            reasons.append(f"{_place(plan)}, {time_text(off_device)} of it")
            reasons += _beside(plan.step)
        if plan.step.state_on_host:
            reasons.append("the optimizer's state on the host")
        if plan.step.parameters_on_host:
            reasons.append(f"{len(plan.step.parameters_on_host)} parameters on the host")
    by = [("made to fit by", "; ".join(reasons))] if reasons else []
    return [("fits", f"yes: {step}, {bytes_text(max(0.0, spare))} to spare"), *by]


def _added(plan: ShardingPlan) -> tuple[float, float]:
    """What fitting adds to a step: by recomputing and re-gathering, and by states off the device
    (their moves and the optimizer's step there), in microseconds."""
    step, added_us = plan.step, plan.added_us
    if step is None or not (plan.states_on or step.state_on_host or step.parameters_on_host):
        return added_us, 0.0
    again = sum(m.recompute_us + m.repeated_collectives_us for m in step.modules)
    return min(again, added_us), max(0.0, added_us - again)


def _beside(step: StepSummary) -> list[str]:
    """What of the optimizer's step on the host takes no time of its own."""
    host_step = step.host_step
    if host_step is None or host_step.exposed_us >= host_step.us:
        return []
    hidden, whole = time_text(host_step.us - host_step.exposed_us), time_text(host_step.us)
    return [f"{hidden} of the optimizer's {whole} beside the backward"]


def _place(plan: ShardingPlan) -> str:
    """Where states are that the device has no room for."""
    if plan.states_on == HOST:
        return "parameters, gradients and the optimizer's state on the host, and its step"
    return f"the optimizer's state on {plan.states_on}, its step and the parameters on the host"


def speed(plan: ShardingPlan, cluster: ClusterInfo) -> list[tuple[str, str]]:
    """What a second processes, which share of the devices' rated FLOP/s that is (model FLOPs
    utilization of PaLM, appendix B: nothing counts that is computed again), and what takes the
    time."""
    rows, seconds, work = [], 1e-6 * plan.time.step_us, plan.work
    if work is not None and seconds:
        rates = amounts(work, plan.time.step_us)
        if work.tokens:
            each = count_text(work.tokens / seconds / cluster.world_size)
            rates[0] += f", {each} per device"
        rows.append(("throughput", "; ".join(rates)))
        rated = cluster.device.rated_flops_per_s
        ideal = sum(count / rated(dtype) for dtype, count in work.flops.items())
        share = percent_text(ideal / cluster.world_size, seconds)
        flops = flops_text(sum(work.flops.values()))
        rows.append(("MFU", f"{share}, {flops} of the model per {plan.unit}"))
    return [*rows, (f"{plan.unit} is", ", ".join(_parts(plan)))]


def _parts(plan: ShardingPlan) -> list[str]:
    """What the step is spent on, the largest part first."""
    time = plan.time
    parts = {"compute": time.compute_us, "exposed communication": time.exposed_us}
    if plan.pipeline is not None:
        parts = {"compute": time.compute_us, "waiting in the pipeline": time.exposed_us}
    elif plan.added_us:
        parts["compute"] -= plan.added_us
        again, off_device = _added(plan)
        parts |= {"recomputation and re-gathering": again, "states off the device": off_device}
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return [f"{percent_text(us, time.step_us)} {name}" for name, us in ordered if us > 0]


def headline(plan: ShardingPlan, file: str = "") -> list[tuple[str, str]]:
    """What was planned, whether it fits, its speed, its purpose, predicted time and memory, and the
    line of code that uses it."""
    cluster = ClusterInfo.from_dict(plan.cluster)
    if plan.pipeline is not None:
        cluster = cluster.with_stages(plan.pipeline.ranks)
    mesh = cluster.mesh_text
    links = ", ".join(
        f"{cluster.axis_label(axis)} {1e-9 / link.beta:.3g} GB/s + {1e6 * link.alpha:.3g} us"
        for axis, link in enumerate(cluster.links)
    )
    error = _expected_error(cluster)
    planned = [("planned", "a forward: no gradients, no optimizer state")] if plan.forward else []
    optimizer = "None" if plan.forward else "optimizer"
    saved = f', plan="{file}"' if file else ""
    if plan.microbatches > 1 and not file:  # a plan's file says it
        saved = f", microbatches={plan.microbatches}"
    precision = [] if plan.precision is None else [("precision", str(plan.precision))]
    split = []
    if plan.pipeline is not None:
        stages, ranks = len(plan.pipeline.stages), plan.pipeline.ranks
        split.append(("pipeline", f"{stages} stages on {ranks} ranks, {plan.pipeline.schedule}"))
    if plan.microbatches > 1:
        split.append(("microbatches", str(plan.microbatches)))
    return [
        *planned,
        *verdict(plan),
        *speed(plan, cluster),
        ("model", f"{plan.model} (graph {plan.fingerprint})"),
        ("mesh", f"{mesh}: {cluster.world_size} x {cluster.device.name}"),
        ("links", links),
        *precision,
        *split,
        (plan.unit, time_text(plan.time.step_us) + ("" if plan.forward else error)),
        (
            "memory",
            f"{bytes_text(plan.memory.total_bytes)} of {bytes_text(plan.budget_bytes)} per device",
        ),
        ("use", f'auto_engine(model, {optimizer}, "{mesh}"{saved})'),
    ]


def _expected_error(cluster: ClusterInfo) -> str:
    """How far predictions for this device are from training steps that others measured, if some
    were published."""
    error = cluster.device.error_percent
    return "" if error is None else f" (published steps on this device: ±{error:g}% on average)"
