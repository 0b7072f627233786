"""The stages of a plan: a table, a picture of their timeline, and a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import plotly.graph_objects as go

from autopar.plan import ShardingPlan
from autopar.plan_records import PipelinePlan
from autopar.planner.stages import in_flight, schedule_of
from autopar.report import colors
from autopar.report.table import Table
from autopar.schedule.pipeline.actions import Kind
from autopar.schedule.pipeline.timeline import Span, StageCost, Timeline, simulate
from autopar.units import bytes_text, time_text

_WORDS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "gradients of inputs",
    Kind.WEIGHT: "gradients of weights",
}
_COLORS = {
    Kind.FORWARD: colors.FORWARD,
    Kind.BACKWARD: colors.BACKWARD,
    Kind.INPUT: colors.BACKWARD,
    Kind.WEIGHT: colors.WEIGHT,
}
# More bars than that are not seen apart: the picture ends there.
_MOST_SPANS = 4000


def pipeline_table(plan: ShardingPlan) -> Table | None:
    """A row per stage; None without a pipeline."""
    pipeline = plan.pipeline
    if pipeline is None:
        return None
    flying = in_flight(pipeline)
    rows = []
    for k, stage in enumerate(pipeline.stages):
        backward = stage.input_us + stage.weight_us
        rows.append(
            (
                str(k),
                str(stage.rank),
                stage.first,
                time_text(stage.forward_us),
                time_text(backward),
                bytes_text(stage.forward_bytes) if stage.forward_bytes else "",
                time_text(stage.send_forward_us) if stage.forward_bytes else "",
                bytes_text(stage.state_bytes),
                f"{flying[k]} x {bytes_text(stage.held_bytes)}",
            )
        )
    ranks = ", ".join(
        f"rank {rank} {bytes_text(nbytes)}" for rank, nbytes in enumerate(pipeline.peak_bytes)
    )
    begins = pipeline.layout or ",".join(stage.first for stage in pipeline.stages[1:])
    name = pipeline.schedule if "\n" not in pipeline.schedule else "of a file"
    return Table(
        "Pipeline",
        (
            "stage>", "rank>", "begins at", "forward>", "backward>", "sends>", "in>", "states>",
            "in flight>",
        ),
        tuple(rows),
        f"Schedule {name}, {pipeline.microbatches} microbatches; times are of one. Ranks are idle "
        f"for {pipeline.bubble_fraction:.1%} of the step. Memory: {ranks}. To change where stages "
        f"begin, edit and pass: --stages '{begins}'",
    )  # fmt: skip


def timeline_of(pipeline: PipelinePlan) -> Timeline:
    """The predicted timeline of all stages."""
    names = [f.name for f in fields(StageCost)]
    costs = [StageCost(**{name: getattr(s, name) for name in names}) for s in pipeline.stages]
    return simulate(schedule_of(pipeline), costs)


def _words(span: Span) -> str:
    action = span.action
    return f"stage {action.stage}, {_WORDS[action.kind]} of microbatch {action.microbatch}"


def timeline_figure(pipeline: PipelinePlan) -> go.Figure:
    """A row of bars per rank: forward, backward and, where they are split, the parts of it."""
    timeline = timeline_of(pipeline)
    ranks = [f"rank {rank}" for rank in range(pipeline.ranks)]
    every = [(rank, span) for rank, row in zip(ranks, timeline.spans, strict=True) for span in row]
    shown = sorted(every, key=lambda item: item[1].start_us)[:_MOST_SPANS]
    figure = go.Figure().update_layout(
        template="plotly_white", height=120 + 34 * pipeline.ranks, barmode="overlay",
        margin={"l": 10, "r": 10, "t": 10, "b": 10}, bargap=0.2,
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#24292f"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={"title": "ms, predicted", "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "automargin": True, "categoryarray": ranks},
    )  # fmt: skip
    for kind, color in _COLORS.items():
        own = [(rank, span) for rank, span in shown if span.action.kind is kind]
        if not own:
            continue
        figure.add_bar(
            name=_WORDS[kind], orientation="h", marker={"color": color, "line": {"width": 0.5}},
            y=[rank for rank, _ in own],
            x=[(span.end_us - span.start_us) * 1e-3 for _, span in own],
            base=[span.start_us * 1e-3 for _, span in own],
            customdata=[_words(span) for _, span in own],
            hovertemplate="%{customdata}: %{x:.3g} ms<extra></extra>",
        )  # fmt: skip
    return figure


def pipeline_trace(pipeline: PipelinePlan) -> dict[str, Any]:
    """The timeline as a Chrome trace: a track per rank; JSON."""
    return {"traceEvents": list(_events(timeline_of(pipeline))), "displayTimeUnit": "ms"}


def _events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "predicted step"}}
    for rank, row in enumerate(timeline.spans):
        track = {"pid": 0, "tid": rank}
        yield track | {"ph": "M", "name": "thread_name", "args": {"name": f"pipeline rank {rank}"}}
        for span in row:
            yield track | {
                "ph": "X",
                "name": str(span.action),
                "cat": _WORDS[span.action.kind],
                "ts": span.start_us,
                "dur": span.end_us - span.start_us,
                "args": {"stage": span.action.stage, "microbatch": span.action.microbatch},
            }
