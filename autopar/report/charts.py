"""The charts of a report, as plotly figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import plotly.graph_objects as go

from autopar.plan import ShardingPlan
from autopar.plan_records import (
    FORWARD_MEMORY_KINDS,
    MEMORY_KINDS,
    TIME_KINDS,
    Baseline,
    StepSummary,
)
from autopar.report import colors
from autopar.report.content import alike_blocks, plans
from autopar.report.pipeline import timeline_figure
from autopar.units import bytes_text, bytes_unit, time_text

_TIME_COLORS = (colors.COMPUTE, colors.EXPOSED, colors.OVERLAPPED)
_MEMORY_COLORS = (
    colors.PARAMETERS, colors.GRADIENTS, colors.OPTIMIZER, colors.KEPT, colors.BUFFERS,
    colors.TRANSIENT,
)  # fmt: skip
_GIB = 2.0**30
_BUDGET_LINE = {"color": "#b3261e", "dash": "dash", "width": 1.5}
_LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"}


def figures(plan: ShardingPlan) -> dict[str, list[go.Figure]]:
    """The charts by heading, in the order of the page."""
    charts = {
        f"Predicted {plan.unit} time": [_time_figure(plans(plan))],
        "Predicted memory per device": [_memory_figure(plan)],
    }
    if plan.pipeline is not None:
        charts["Timeline of the stages"] = [timeline_figure(plan.pipeline)]
    if plan.step is not None:
        charts[f"Memory over the {plan.unit}"] = [
            live_figure(plan.step, plan.unit), modules_figure(plan.step),
        ]  # fmt: skip
    if plan.pareto_front:
        charts["Time against memory"] = [_pareto_figure(plan)]
    return charts


def _figure(height: int, traces: Sequence[Any] = (), **layout: Any) -> go.Figure:
    return go.Figure(traces).update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#24292f"},
        **layout,
    )


# -- plan and baselines -------------------------------------------------------------------------


def _time_figure(rows: Sequence[Baseline]) -> go.Figure:
    values = {kind: [getattr(b.time, key) for b in rows] for kind, key in TIME_KINDS.items()}
    return _bars(rows, values, _TIME_COLORS, 1e-3, time_text, "ms")


def _memory_figure(plan: ShardingPlan) -> go.Figure:
    rows, budget_bytes = plans(plan), plan.budget_bytes
    kinds = FORWARD_MEMORY_KINDS if plan.forward else MEMORY_KINDS
    values = {kind: [getattr(b.memory, key) for b in rows] for kind, key in kinds.items()}
    of_kind = dict(zip(MEMORY_KINDS.values(), _MEMORY_COLORS, strict=True))
    title = f"GiB; the budget is {bytes_text(budget_bytes)}"
    filled = [of_kind[key] for key in kinds.values()]
    figure = _bars(rows, values, filled, 1 / _GIB, bytes_text, title)
    # a line far beyond all bars would squeeze them
    if budget_bytes < 3 * max(b.memory.total_bytes for b in rows):
        figure.add_vline(x=budget_bytes / _GIB, line=_BUDGET_LINE)
    return figure


def _bars(
    rows: Sequence[Baseline],
    values: Mapping[str, Sequence[float]],
    filled: Sequence[str],
    scale: float,
    text: Callable[[float], str],
    title: str,
) -> go.Figure:
    """Stacked horizontal bars, one per plan, the first plan on top."""
    names = [b.name for b in rows]
    bars = [
        go.Bar(
            name=kind,
            y=names,
            x=[v * scale for v in lengths],
            orientation="h",
            marker_color=color,
            customdata=[text(v) for v in lengths],
            hovertemplate="%{y}: " + kind + " %{customdata}<extra></extra>",
        )
        for (kind, lengths), color in zip(values.items(), filled, strict=True)
    ]
    return _figure(
        110 + 34 * len(names), bars, barmode="stack", bargap=0.35, legend=_LEGEND,
        xaxis_title=title, yaxis={"autorange": "reversed", "automargin": True},
    )  # fmt: skip


def _pareto_figure(plan: ShardingPlan) -> go.Figure:
    """Time against memory of the fastest plans by budget."""
    points = plan.pareto_front
    line = go.Scatter(
        x=[p.memory_bytes / _GIB for p in points],
        y=[p.step_us * 1e-3 for p in points],
        mode="lines+markers",
        # a budget between two plans has to take the slower one
        line={"shape": "vh", "color": colors.COMPUTE},
        marker={"size": 8},
        customdata=[(bytes_text(p.memory_bytes), time_text(p.step_us), p.words) for p in points],
        hovertemplate="%{customdata[1]} in %{customdata[0]}<br>%{customdata[2]}<extra></extra>",
    )
    figure = _figure(
        320, [line],
        xaxis={"title": "GiB per device", "rangemode": "tozero", "automargin": True},
        yaxis={"title": f"ms per {plan.unit}", "rangemode": "tozero", "automargin": True},
    )  # fmt: skip
    if plan.budget_bytes < 2 * points[0].memory_bytes:
        figure.add_vline(x=plan.budget_bytes / _GIB, line=_BUDGET_LINE)
    return figure


# -- the scheduled step -------------------------------------------------------------------------


def live_figure(step: StepSummary, unit: str = "step") -> go.Figure:
    """Live bytes over time by origin, and below zero the bytes of parameters on the host."""
    backward = unit == "step"
    dashed = "; the backward starts at the dashed line" if backward else ""
    us, kept, recomputed, other, on_host = zip(*step.live, strict=True) if step.live else ((),) * 5
    times = [t * 1e-3 for t in us]
    sums = [sum(parts) for parts in zip(kept, recomputed, other, strict=True)]
    totals, (memory, scale) = list(map(bytes_text, sums)), bytes_unit(max(sums, default=0))
    figure = _figure(
        320, legend=_LEGEND,
        xaxis={"title": f"ms, predicted{dashed}"},
        yaxis={
            "title": f"{memory} that the {unit} makes", "rangemode": "tozero", "automargin": True,
        },
    )  # fmt: skip
    other_name = "gradients and temporary values" if backward else "temporary values"
    for name, color, values in (
        ("kept from the forward", colors.KEPT, kept),
        ("recomputed, re-gathered or reloaded", colors.RECOMPUTED, recomputed),
        (other_name, colors.TRANSIENT, other),
    ):
        figure.add_scatter(
            name=name, x=times, y=[v / scale for v in values], stackgroup="live",
            line={"shape": "hv", "width": 0}, fillcolor=color, customdata=totals,
            hovertemplate="%{y:.2f} " + f"{memory} of %{{customdata}} {name}<extra></extra>",
        )  # fmt: skip
    if any(on_host):
        figure.add_scatter(
            name="parameters on the host", x=times, y=[-v / scale for v in on_host],
            line={"shape": "hv", "width": 0}, fill="tozeroy", fillcolor=colors.ON_HOST,
            hovertemplate="%{y:.2f} " + memory + " of parameters on the host<extra></extra>",
        )  # fmt: skip
    if 0 < step.backward_us < step.us:
        figure.add_vline(x=step.backward_us * 1e-3, line={"dash": "dash", "width": 1})
    return figure


def modules_figure(step: StepSummary) -> go.Figure:
    """Bytes kept and offloaded, and the time of recomputation and re-gathering: alike blocks are
    one bar, of all of them."""
    modules = [m for m in alike_blocks(step.modules) if any(astuple(m)[1:])]
    names = [m.module or "(no module)" for m in modules]
    most = max((m.kept_bytes + m.offloaded_bytes + m.parameters_bytes for m in modules), default=0)
    memory, scale = bytes_unit(most)
    figure = _figure(
        110 + 22 * len(names), bargap=0.35, barmode="stack", legend=_LEGEND,
        xaxis={"title": memory, "domain": [0, 0.48]},
        xaxis2={"title": "ms", "domain": [0.52, 1], "anchor": "y"},
        yaxis={"autorange": "reversed", "automargin": True},
    )  # fmt: skip
    for axis, name, color, key in (
        ("x", "kept", colors.KEPT, "kept_bytes"),
        ("x", "offloaded", colors.OFFLOADED, "offloaded_bytes"),
        ("x", "parameters on the host", colors.ON_HOST, "parameters_bytes"),
        ("x2", "recomputed", colors.RECOMPUTED, "recompute_us"),
        ("x2", "re-gathered", colors.REPEATED, "repeated_collectives_us"),
    ):
        unit, divisor = (memory, scale) if axis == "x" else ("ms", 1e3)
        figure.add_bar(
            name=name, x=[getattr(m, key) / divisor for m in modules], y=names, xaxis=axis,
            orientation="h", marker_color=color,
            hovertemplate="%{y}: %{x:.3g} " + f"{unit} {name}<extra></extra>",
        )  # fmt: skip
    return figure
