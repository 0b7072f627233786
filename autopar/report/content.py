"""The content of a report, as tables of strings. `text` and `html` only draw them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

from autopar.ir.repeats import pattern
from autopar.plan import ShardingPlan
from autopar.plan_records import (
    FORWARD_MEMORY_KINDS,
    MEMORY_KINDS,
    TIME_KINDS,
    Baseline,
    ModuleMemory,
    ModuleSummary,
    StepSummary,
    TimeEstimate,
    TimeSplit,
    TriedSize,
)
from autopar.planner.describe import grouped_names
from autopar.report.headline import amounts, fits
from autopar.report.pipeline import pipeline_table
from autopar.report.table import Table
from autopar.units import bytes_text, count_text, percent_text, time_text

# Modules without parameters that take less than this share of the time are summed up.
SMALL = 0.01


def modules_table(plan: ShardingPlan, *, fold: bool) -> Table:
    """The choice per module. With `fold`, small modules are summed up."""
    total_us = sum(m.time_us for m in plan.modules)
    # a module without time describes the modules inside it
    small = [m for m in plan.modules if 0 < m.time_us < SMALL * total_us and not m.parameters]
    if not fold or len(small) < 2:
        small = []
    rows = [_module_row(m, total_us) for m in plan.modules if m not in small]
    if small:
        rest = ModuleSummary(
            f"({len(small)} small ones)", "", sum(m.count for m in small), 0,
            sum(m.time_us for m in small), sum(m.memory_bytes for m in small),
        )  # fmt: skip
        rows.append(_module_row(rest, total_us))
    return Table(
        "Modules",
        ("module", "copies>", "parameters>", "choice", "time>", "share>", "memory>"),
        tuple(rows),
        "All copies together. Parameters are those of the unsharded model. Time includes all "
        "communication, overlapped or not. Memory is per device, without the transient peak.",
    )


def _module_row(m: ModuleSummary, total_us: float) -> tuple[str, ...]:
    own = m.time_us > 0 or m.memory_bytes > 0 or m.parameters > 0
    return (
        m.name or "(model)",
        str(m.count) if m.count > 1 else "",
        count_text(m.parameters) if m.parameters else "",
        m.words,
        time_text(m.time_us) if own else "",
        percent_text(m.time_us, total_us) if own else "",
        bytes_text(m.memory_bytes) if own and m.memory_bytes else "",
    )


def time_table(time: TimeEstimate, unit: str) -> Table:
    """The predicted time of a step or a forward, by kind."""
    parts = {kind: getattr(time, key) for kind, key in TIME_KINDS.items()}
    rows = [(kind, time_text(us), percent_text(us, time.step_us)) for kind, us in parts.items()]
    rows.insert(-1, (unit, time_text(time.step_us), "100.0%"))
    note = (
        f"Predicted. Overlapped communication runs beside compute and adds nothing to the {unit}."
    )
    columns = ("", "time>", f"of the {unit}>")
    return Table(f"{unit.capitalize()} time", columns, tuple(rows), note, len(rows) - 2)


def memory_table(plan: ShardingPlan) -> Table:
    """The predicted memory by kind."""
    memory, budget_bytes = plan.memory, plan.budget_bytes
    kinds = FORWARD_MEMORY_KINDS if plan.forward else MEMORY_KINDS
    parts = {kind: getattr(memory, key) for kind, key in kinds.items()}
    parts["total"] = memory.total_bytes
    rows = tuple((kind, bytes_text(n), percent_text(n, budget_bytes)) for kind, n in parts.items())
    note = (
        "Predicted, at the peak of the device that holds most; the budget is "
        f"{bytes_text(budget_bytes)}."
    )
    columns = ("", "memory>", "of the budget>")
    return Table("Memory per device", columns, rows, note, total=len(rows) - 1)


def alike_blocks(modules: Sequence[ModuleMemory]) -> list[ModuleMemory]:
    """Copies of a block with nearly the same numbers as one entry, of all of them."""
    same: dict[tuple[Any, ...], list[ModuleMemory]] = defaultdict(list)
    for module in modules:
        _, *numbers = astuple(module)
        same[pattern(module.module), *(f"{n:.2g}" for n in numbers)].append(module)
    every, grouped = [m.module for m in modules], []
    for alike in same.values():
        named = {m.module: m for m in alike}
        for name, copies in grouped_names(list(named), every):
            _, *columns = zip(*(astuple(named[copy]) for copy in copies), strict=True)
            grouped.append(ModuleMemory(name, *map(sum, columns)))
    return grouped


def _host_step(step: StepSummary) -> str:
    """How long the optimizer's step on the host takes."""
    if step.host_step is None:
        return ""
    beside_us = step.host_step.us - step.host_step.exposed_us
    part = f"{time_text(beside_us)} of it" if beside_us > 0 else "none of it"
    return f", for {time_text(step.host_step.us)}, {part} beside the backward"


def step_table(plan: ShardingPlan) -> Table | None:
    """What is kept, offloaded, recomputed and re-gathered, per block, if that was decided."""
    step = plan.step
    if step is None or (plan.forward and not step.modules):
        return None

    def row(name: str, modules: Sequence[ModuleMemory]) -> tuple[str, ...]:
        def total(key: str, text: Callable[[float], str]) -> str:
            amount = sum(getattr(m, key) for m in modules)
            return text(amount) if amount else ""

        parameters = total("parameters_bytes", bytes_text)
        parameters = parameters and f"{parameters} of parameters"
        on_host = " + ".join(filter(None, (total("offloaded_bytes", bytes_text), parameters)))
        kept, recomputed = total("kept_bytes", bytes_text), total("recompute_us", time_text)
        return name, kept, on_host, recomputed, total("repeated_collectives_us", time_text)

    rows = [row(m.module or "(model)", [m]) for m in alike_blocks(step.modules)]
    rows.append(row("total", step.modules))
    waits = ", ".join(f"{time_text(us)} for {resource}" for resource, us in step.waited_us.items())
    passes = "The forward takes" if plan.forward else "Forward and backward take"
    if plan.microbatches > 1:
        passes = "Forward and backward of one microbatch take"
    notes = (
        f"{passes} {time_text(step.us)}. Of that, {time_text(step.added_us)} "
        f"serve to fit the memory. Compute waits {waits or 'for nothing'}.",
        f"The step's own values peak at {bytes_text(step.peak_bytes)}, at {step.peak_at}; they "
        f"would peak at {bytes_text(step.eager_bytes)} if everything were kept. "
        f"{bytes_text(step.resident_bytes)} are in use before the step.",
        "The optimizer's state is on the host outside of its step." if step.state_on_host else "",
        f"Between steps, states are on the {plan.states_on}: parameters are fetched and gradients "
        f"stored while the step runs, and the optimizer steps there{_host_step(step)}."
        if plan.states_on
        else "",
        f"On the host for a part of the step: {', '.join(step.parameters_on_host)}."
        if step.parameters_on_host
        else "",
    )
    return Table(
        "Values within the forward" if plan.forward else "From forward to backward",
        ("module", "kept>", "on the host>", "recomputed>", "re-gathered>"),
        tuple(rows),
        " ".join(filter(None, notes)),
        total=len(rows) - 1,
    )


def time_splits_table(plan: ShardingPlan) -> Table | None:
    """Regions that run in slices, if there are any."""
    if not plan.time_splits:
        return None
    alike: dict[tuple[str, int, bool, tuple[str, ...]], list[TimeSplit]] = {}
    for split in plan.time_splits:
        key = split.factor, split.slices, split.at_once, split.sources
        alike.setdefault(key, []).append(split)
    rows = []
    for (factor, slices, at_once, sources), splits in alike.items():
        modules = dict.fromkeys(_outermost(split.modules) or "(model)" for split in splits)
        backward = "at once" if at_once else "as scheduled"
        rows.append((", ".join(modules), factor, str(slices), backward, " to ".join(sources)))
    note = "The slices of a region run one after another."
    if not plan.forward:
        note += " At once: the backward of a slice follows its forward."
    if plan.whole_results:
        note += (
            f" The caller gets {'; '.join(plan.whole_results)}: that is whole, whatever is split. "
            "A model that does not return it needs less memory."
        )
    columns = ("module", "split", "slices>", "backward", "source")
    shown = [k for k, column in enumerate(columns) if column != "backward" or not plan.forward]
    every = [tuple(row[k] for k in shown) for row in (columns, *rows)]
    return Table("Split over time", every[0], tuple(every[1:]), note)


def _outermost(modules: Sequence[str]) -> str:
    """The module that all of some are in."""
    parts = [m.split(".") for m in modules]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def plans(plan: ShardingPlan) -> list[Baseline]:
    """The plan and its baselines in one list, the plan first."""
    return [Baseline("autopar", plan.time, plan.memory), *plan.baselines]


def baselines_table(plan: ShardingPlan) -> Table | None:
    """The plan beside the baselines, if they were requested."""
    if not plan.baselines:
        return None
    rows = tuple(
        (
            b.name,
            time_text(b.time.step_us),
            f"{b.time.step_us / plan.time.step_us:.2f}x" if plan.time.step_us else "-",
            *(time_text(getattr(b.time, key)) for key in TIME_KINDS.values()),
            bytes_text(b.memory.total_bytes),
            "yes" if fits(b.memory.total_bytes, plan) else "NO",
        )
        for b in plans(plan)
    )
    columns = (
        "plan", f"{plan.unit}>", "to autopar>", "compute>", "exposed>", "overlapped>", "memory>",
        "fits>",
    )  # fmt: skip
    return Table(
        "Baselines",
        columns,
        rows,
        "All by the same cost model. What a baseline leaves open is solved for, without a memory "
        "limit.",
    )


def pareto_table(plan: ShardingPlan) -> Table | None:
    """The fastest plans by budget, if they were requested."""
    points = plan.pareto_front
    if not points:
        return None
    fastest = points[0].step_us
    previous = ["", *(p.words for p in points)]
    rows = tuple(
        (
            "none" if math.isinf(p.budget_bytes) else bytes_text(p.budget_bytes),
            bytes_text(p.memory_bytes),
            time_text(p.step_us),
            f"{p.step_us / fastest:.3f}x" if fastest else "-",
            percent_text(p.step_us - p.bound_us, p.step_us),
            "yes" if fits(p.memory_bytes, plan) else "NO",
            p.words if p.words != words else "",
        )
        for p, words in zip(points, previous, strict=False)
    )
    columns = (
        "budget>", "memory>", f"{plan.unit}>", "to the first>", "gap>", "fits>", "most parameters",
    )  # fmt: skip
    return Table(
        "Time and memory",
        columns,
        rows,
        "The fastest plan that was found within each budget. It fits if it needs at most the "
        f"{bytes_text(plan.budget_bytes)} of this plan's budget.",
    )


def meshes_table(plan: ShardingPlan) -> Table | None:
    """The meshes that were compared, the fastest first, if the mesh was searched for."""
    if not plan.meshes:
        return None
    chosen = 1, plan.mesh
    if plan.pipeline is not None:
        axis = plan.pipeline.axis
        chosen = plan.pipeline.ranks, (*plan.mesh[:axis], *plan.mesh[axis + 1 :])
    rows = tuple(
        (
            m.text,
            time_text(m.step_us) if math.isfinite(m.step_us) else "-",
            time_text(m.bound_us) if math.isfinite(m.bound_us) else "-",
            bytes_text(m.memory_bytes) if math.isfinite(m.memory_bytes) else "",
            "chosen" if (m.pipe, m.mesh) == chosen else m.note,
        )
        for m in sorted(plan.meshes, key=lambda m: (m.step_us, m.bound_us))
    )
    return Table("Meshes", ("mesh", f"{plan.unit}>", "bound>", "memory>", ""), rows)


def sizes_table(plan: ShardingPlan) -> Table | None:
    """The sizes that were planned for, if one of them was asked for."""
    if not plan.sizes:
        return None

    def row(of: TriedSize) -> tuple[str, ...]:
        memory = bytes_text(of.memory_bytes) if math.isfinite(of.memory_bytes) else ""
        if not math.isfinite(of.step_us):
            return of.size, "", memory, "", of.note
        rate = amounts(of.work, of.step_us)[0] if of.work else ""
        return of.size, time_text(of.step_us), memory, rate, of.note

    return Table(
        "Sizes",
        ("size>", f"{plan.unit}>", "memory>", "throughput>", ""),
        tuple(map(row, plan.sizes)),
        "In the order of trying. Of what does not fit, the least memory that was found.",
    )


def solver_table(plan: ShardingPlan) -> Table:
    """How the plan was found, how far it can be from the best one, and how long that took."""
    solver = plan.solver
    among = f" with {solver.bounded}" if solver.bounded != "" and len(solver.sharing_us) > 1 else ""
    among += solver.alike and f" where {solver.alike}"
    words = f"{solver.trade}; with a memory budget, time alone counts"
    trade = [("trade", words)] if solver.trade else []
    rows = [
        ("method", solver.method),
        ("objective", f"{time_text(solver.objective_us)} per {plan.unit}, overlap deducted"),
        ("bound", f"no plan of the search space{among} is below {time_text(solver.bound_us)}"),
        ("gap", f"{solver.gap:.3%}"),
        *trade,
        *((how, time_text(step)) for how, step in solver.sharing_us.items()),
        *((stage, f"{seconds:.2f} s") for stage, seconds in solver.seconds.items()),
    ]
    return Table("Solver", ("", "value"), tuple(rows))


def unruled_table(plan: ShardingPlan) -> Table | None:
    """Operators that run replicated, if any."""
    if not plan.unruled:
        return None
    calls: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for call, us in plan.unruled.items():
        operator, _, where = call.partition(": ")[2].partition(" at ")
        calls[operator].append((us, where))
    totals = {operator: sum(us for us, _ in each) for operator, each in calls.items()}
    rows = tuple(
        (
            operator,
            str(len(calls[operator])),
            "/".join(max(calls[operator])[1].split("/")[-2:]),
            time_text(us),
            percent_text(us, plan.time.step_us),
        )
        for operator, us in sorted(totals.items(), key=lambda item: -item[1])
    )
    return Table(
        "Operators without a sharding rule",
        ("operator", "calls>", "for example at", "time>", f"of the {plan.unit}>"),
        rows,
        "They run replicated, which is always correct. A row in autopar/sharding/rules would split "
        "them.",
    )


def constraints_table(plan: ShardingPlan) -> Table | None:
    """The layouts that the user fixed, if any."""
    if not plan.constraints:
        return None
    return Table("Constraints", ("name", "layout"), tuple(plan.constraints.items()))


def decisions_table(plan: ShardingPlan) -> Table:
    """Every decision of the plan."""
    rows = tuple((name, c, plan.layouts.get(name, "")) for name, c in plan.choices.items())
    return Table(
        "Decisions",
        ("decision", "choice", "layout"),
        rows,
        "Parameters and inputs choose a layout. Operators choose a factor per mesh axis.",
    )


def tables(plan: ShardingPlan, *, fold: bool) -> list[Table]:
    """All tables except the one of decisions, in the order of a report."""
    every = [
        pipeline_table(plan),
        modules_table(plan, fold=fold),
        time_table(plan.time, plan.unit),
        memory_table(plan),
        step_table(plan),
        time_splits_table(plan),
        baselines_table(plan),
        pareto_table(plan),
        meshes_table(plan),
        sizes_table(plan),
        constraints_table(plan),
        solver_table(plan),
        unruled_table(plan),
    ]
    return [table for table in every if table is not None]
