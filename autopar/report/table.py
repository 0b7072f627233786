"""`Table`: what reports consist of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A titled table.

    Args:
        title: heading.
        columns: headings; `>` at the end marks a column of right-aligned numbers.
        rows: cells.
        note: text below the table.
        total: index of the row with the sums, -1 if there is none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    total: int = -1
