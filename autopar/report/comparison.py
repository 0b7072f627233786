"""Differences between plans, and alternatives to a decision, as tables."""

from __future__ import annotations

import math
import re

from autopar.planner.diff import Change, Difference
from autopar.planner.explain import Alternative, Explanation
from autopar.report.content import Table
from autopar.units import bytes_text, time_text

# Alternatives that are this close to the plan cost the same.
_SAME = 1e-6


def explanation_table(found: Explanation, *, shown_changes: int = 2) -> Table:
    """What `autopar explain` prints."""
    own = found.chosen
    rows = tuple(_row(a, own, shown_changes) for a in found.alternatives)
    return Table(
        found.name,
        ("choice", "layout", "step>", "to the plan>", "memory>", "what else changes"),
        rows,
        "Per row the best plan that makes this choice. A step with >= was not solved for: no plan "
        "with that choice is below it.",
    )


def _row(a: Alternative, own: Alternative, shown: int) -> tuple[str, ...]:
    name = f"* {a.choice}" if a.chosen else a.choice
    if math.isnan(a.step_us):
        return name, a.layouts, f">= {time_text(a.bound_us)}", "", "", ""
    if math.isinf(a.step_us):
        if math.isinf(a.memory_bytes):
            return name, a.layouts, "none", "", "", "no conversion leads there"
        return name, a.layouts, "none", "", bytes_text(a.memory_bytes), "does not fit the memory"
    more = a.step_us - own.step_us
    same = abs(more) <= _SAME * own.step_us
    to_plan = (
        "" if a.chosen else "same" if same else f"{'-' if more < 0 else '+'}{time_text(abs(more))}"
    )
    words = [re.sub(r" \([^)]*\)", "", line) for line in a.changes[:shown]]
    if len(a.changes) > shown:
        words.append(f"and {len(a.changes) - shown} more")
    said = "the plan" if a.chosen else "\n".join(words) or "nothing else"
    return name, a.layouts, time_text(a.step_us), to_plan, bytes_text(a.memory_bytes), said


def difference_tables(found: Difference, *, every: bool = False) -> list[Table]:
    """What `autopar diff` prints.

    Args:
        every: also single decisions, where modules say what they come to.
    """
    parts = [
        ("Made for", "", found.setting),
        ("Predicted", "", found.figures),
        ("Modules", "module", found.modules),
        ("Parameters", "parameter", found.parameters),
    ]
    if every or not (found.modules or found.parameters):
        parts.append(("Decisions", "decision", found.decisions))
    return [
        Table(title, (head, "first plan", "second plan"), tuple(map(_change_row, changes)))
        for title, head, changes in parts
        if changes
    ]


def _change_row(change: Change) -> tuple[str, str, str]:
    count = f" ({change.count})" if change.count > 1 else ""
    return change.what + count, change.before, change.after
