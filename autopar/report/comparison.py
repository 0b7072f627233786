"""Differences between plans and alternatives to a decision, as tables."""

from __future__ import annotations

import math
import re

from autopar.cluster.cluster import ClusterInfo
from autopar.planner.diff import Change, Difference
from autopar.planner.explain import Alternative, Explanation
from autopar.report.table import Table
from autopar.units import bytes_text, time_text

# Alternatives within this relative distance of the plan cost the same.
_SAME = 1e-6


def explanation_table(explanation: Explanation, *, shown_changes: int = 2) -> Table:
    """The table of `autopar explain`."""
    chosen, cluster = explanation.chosen, ClusterInfo.from_dict(explanation.plan.cluster)
    rows = tuple(_row(a, chosen, shown_changes) for a in explanation.alternatives)
    unit = explanation.plan.unit
    return Table(
        explanation.name,
        ("choice", "layout", f"{unit}>", "to the plan>", "memory>", "what else changes"),
        rows,
        "Each row is the best plan that makes this choice. A time with >= is a bound: it was not "
        "solved for, and no plan with that choice is faster." + _axes_note(cluster.axes_text),
    )


def _row(a: Alternative, chosen: Alternative, shown: int) -> tuple[str, ...]:
    name = f"* {a.choice}" if a.chosen else a.choice
    if math.isnan(a.step_us):
        return name, a.layouts, f">= {time_text(a.bound_us)}", "", "", ""
    if math.isinf(a.step_us):
        if math.isinf(a.memory_bytes):
            return name, a.layouts, "none", "", "", "no conversion leads there"
        return name, a.layouts, "none", "", bytes_text(a.memory_bytes), "does not fit the memory"
    added = a.step_us - chosen.step_us
    to_plan = f"{'-' if added < 0 else '+'}{time_text(abs(added))}"
    if abs(added) <= _SAME * chosen.step_us:
        to_plan = "same"
    lines = [re.sub(r" \([^)]*\)", "", line) for line in a.changes[:shown]]
    if len(a.changes) > shown:
        lines.append(f"and {len(a.changes) - shown} more")
    step, memory = time_text(a.step_us), bytes_text(a.memory_bytes)
    if a.chosen:
        return name, a.layouts, step, "", memory, "the plan"
    return name, a.layouts, step, to_plan, memory, "\n".join(lines) or "nothing else"


def difference_tables(difference: Difference, *, every: bool = False) -> list[Table]:
    """The tables of `autopar diff`.

    Args:
        every: list single decisions even if modules or parameters differ.
    """
    parts = [
        ("Made for", "", difference.setting),
        ("Predicted", "", difference.figures),
        ("Modules", "module", difference.modules),
        ("Parameters", "parameter", difference.parameters),
    ]
    if every or not (difference.modules or difference.parameters):
        parts.append(("Decisions", "decision", difference.decisions))
    note = _axes_note(difference.axes).strip()
    return [
        Table(
            title, (head, "first plan", "second plan"), tuple(map(_change_row, changes)),
            note if head in ("parameter", "decision") else "",
        )
        for title, head, changes in parts
        if changes
    ]  # fmt: skip


def _axes_note(axes: str) -> str:
    return f" Mesh axes in layouts: {axes}." if axes else ""


def _change_row(change: Change) -> tuple[str, str, str]:
    count = f" ({change.count})" if change.count > 1 else ""
    return change.name + count, change.before, change.after
