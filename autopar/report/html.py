"""The plan as one self-contained HTML page: no file or address besides it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from autopar.plan import MEMORY_KINDS, TIME_KINDS, Baseline, ShardingPlan
from autopar.report.content import (
    Table,
    decisions_table,
    headline,
    plans,
    tables,
)
from autopar.report.step_chart import step_html
from autopar.units import bytes_text, time_text

# One hue per family: what computes or is held for good dark, what varies lighter, hidden time pale.
_TIME_COLORS = ("#3b6ea5", "#d9822b", "#e6dccb")
_MEMORY_COLORS = ("#1f4e79", "#3b6ea5", "#7fa8d1", "#d9822b", "#b0aba3", "#efc08a")
_ROW_HEIGHT = 34

_STYLE = """
:root { --ink: #24292f; --dim: #6a737d; --line: #e3e6e9; --head: #f6f7f8; }
body { margin: 2.5rem auto; max-width: 1080px; padding: 0 1.5rem; background: #fff;
       color: var(--ink); font: 14px/1.5 system-ui, "Segoe UI", "Helvetica Neue", sans-serif; }
h1 { font-size: 1.5rem; font-weight: 600; margin: 0 0 1rem; }
h2 { font-size: 1.05rem; font-weight: 600; margin: 2.2rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.5rem; margin: 0; }
dt { color: var(--dim); } dd { margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
table.narrow { width: auto; min-width: 26rem; }
th { text-align: left; font-weight: 500; color: var(--dim); background: var(--head); }
th, td { padding: .28rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th.n, td.n { text-align: right; white-space: nowrap; }
td:first-child { white-space: nowrap; }
tr.total td { font-weight: 600; }
p.note { color: var(--dim); margin: .4rem 0 0; font-size: .9em; }
summary { cursor: pointer; font-size: 1.05rem; font-weight: 600; margin: 2.2rem 0 .5rem; }
details table { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .85em; }
"""


def render_html(plan: ShardingPlan) -> str:
    """The report as a page, with charts of time and memory beside the baselines."""
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in headline(plan))
    shown = tables(plan, fold=False)
    decisions = decisions_table(plan)
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>autopar: {escape(plan.model)}</title>",
            f"<style>{_STYLE}</style>",
            f"<script>{get_plotlyjs()}</script>",
            "</head><body>",
            f"<h1>{escape(plan.model)}</h1><dl>{facts}</dl>",
            "<h2>Predicted step time</h2>",
            _chart(_time_figure(plans(plan))),
            "<h2>Predicted memory per device</h2>",
            _chart(_memory_figure(plans(plan), plan.budget_bytes)),
            *_step(plan),
            *_front(plan),
            *(f"<h2>{escape(table.title)}</h2>{_table(table)}" for table in shown),
            f"<details><summary>{decisions.title} ({len(decisions.rows)})</summary>",
            f"{_table(decisions)}</details>",
            "</body></html>",
        )
    )


def _table(table: Table) -> str:
    kinds = [' class="n"' if column.endswith(">") else "" for column in table.columns]
    head = "".join(
        f"<th{kind}>{escape(column.removesuffix('>'))}</th>"
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    body = "".join(
        f"<tr{' class=total' if i == table.total else ''}>"
        + "".join(f"<td{k}>{escape(cell)}</td>" for cell, k in zip(row, kinds, strict=True))
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    width = ' class="narrow"' if len(table.columns) < 4 else ""
    return f"<table{width}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


# -- charts -------------------------------------------------------------------------------------


def _time_figure(shown: Sequence[Baseline]) -> go.Figure:
    values = {kind: [getattr(b.time, key) for b in shown] for kind, key in TIME_KINDS.items()}
    figure = _bars(shown, values, _TIME_COLORS, 1e-3, time_text)
    figure.update_layout(xaxis_title="ms; overlapped communication does not lengthen the step")
    return figure


def _memory_figure(shown: Sequence[Baseline], budget_bytes: float) -> go.Figure:
    values = {kind: [getattr(b.memory, key) for b in shown] for kind, key in MEMORY_KINDS.items()}
    figure = _bars(shown, values, _MEMORY_COLORS, 2.0**-30, bytes_text)
    figure.update_layout(xaxis_title=f"GiB; the budget is {bytes_text(budget_bytes)}")
    # a budget far beyond all bars would squeeze them; the axis title still says it
    if budget_bytes < 3 * max(b.memory.total_bytes for b in shown):
        figure.add_vline(
            x=budget_bytes / 2**30, line={"color": "#b3261e", "dash": "dash", "width": 1.5}
        )
    return figure


def _step(plan: ShardingPlan) -> list[str]:
    """Bytes alive over the step, and what is kept by module, if that was decided."""
    if plan.step is None:
        return []
    return ["<h2>Memory over the step</h2>", step_html(plan.step)]


def _front(plan: ShardingPlan) -> list[str]:
    """Time against memory of the fastest plans by budget, if they were asked for."""
    if not plan.pareto_front:
        return []
    points = plan.pareto_front
    figure = go.Figure(
        go.Scatter(
            x=[p.memory_bytes / 2**30 for p in points],
            y=[p.step_us * 1e-3 for p in points],
            mode="lines+markers",
            # between two plans there is none: less memory than a plan needs takes the slower one
            line={"shape": "vh", "color": _TIME_COLORS[0]},
            marker={"size": 8},
            customdata=[
                (bytes_text(p.memory_bytes), time_text(p.step_us), p.words) for p in points
            ],
            hovertemplate="%{customdata[1]} in %{customdata[0]}<br>%{customdata[2]}<extra></extra>",
        )
    )
    figure.update_layout(
        template="plotly_white",
        height=320,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        xaxis={"title": "GiB per device", "rangemode": "tozero", "automargin": True},
        yaxis={"title": "ms per step", "rangemode": "tozero", "automargin": True},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#24292f"},
    )
    if plan.budget_bytes < 2 * points[0].memory_bytes:
        figure.add_vline(
            x=plan.budget_bytes / 2**30, line={"color": "#b3261e", "dash": "dash", "width": 1.5}
        )
    return ["<h2>Time against memory</h2>", _chart(figure)]


def _bars(
    shown: Sequence[Baseline],
    values: dict[str, list[float]],
    colors: Sequence[str],
    scale: float,
    text: Callable[[float], str],
) -> go.Figure:
    """Stacked horizontal bars, one per plan, the first plan on top."""
    names = [b.name for b in shown]
    figure = go.Figure(
        [
            go.Bar(
                name=kind,
                y=names,
                x=[v * scale for v in row],
                orientation="h",
                marker_color=color,
                customdata=[text(v) for v in row],
                hovertemplate="%{y}: " + kind + " %{customdata}<extra></extra>",
            )
            for (kind, row), color in zip(values.items(), colors, strict=True)
        ]
    )
    figure.update_layout(
        barmode="stack",
        template="plotly_white",
        height=110 + _ROW_HEIGHT * len(names),
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        yaxis={"autorange": "reversed", "automargin": True},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        bargap=0.35,
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#24292f"},
    )
    return figure


def _chart(figure: go.Figure) -> str:
    return plotly.io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        config={"displaylogo": False, "displayModeBar": False, "responsive": True},
    )
