"""The plan as text."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from autopar.plan import ShardingPlan
from autopar.report.content import Table, headline, tables

WIDTH = 120


def render(plan: ShardingPlan, *, color: bool = False, width: int = WIDTH) -> str:
    """The report as text, with terminal colours only where asked for."""
    head = RichTable(box=None, show_header=False, padding=(0, 2, 0, 0))
    head.add_column(style="dim")
    head.add_column()
    for key, value in headline(plan):
        head.add_row(key, value)
    return draw(tables(plan, fold=True), head, color=color, width=width)


def draw(
    shown: Sequence[Table],
    head: RichTable | None = None,
    *,
    color: bool = False,
    width: int = WIDTH,
) -> str:
    """Tables as text, below each other."""
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=width,
        force_terminal=color,
        color_system="auto" if color else None,
        highlight=False,
    )
    if head is not None:
        console.print(head)
    for table in shown:
        console.print()
        console.print(_drawn(table))
        if table.note:
            console.print(table.note, style="dim")
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="dim",
    )
    for column in table.columns:
        number = column.endswith(">")
        drawn.add_column(
            column.removesuffix(">"),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    for i, row in enumerate(table.rows):
        drawn.add_row(*row, end_section=table.total in (i, i + 1))
    return drawn
