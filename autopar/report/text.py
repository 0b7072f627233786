"""The plan as text."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from autopar.plan import ShardingPlan
from autopar.report.content import tables
from autopar.report.headline import headline
from autopar.report.table import Table

WIDTH = 120


def terminal_width(otherwise: int = WIDTH) -> int:
    """Columns of the terminal that stdout is; `otherwise` if it is none."""
    if not sys.stdout.isatty():
        return otherwise
    return max(80, shutil.get_terminal_size((WIDTH, 24)).columns)


def render(plan: ShardingPlan, *, file: str = "", color: bool = False, width: int = WIDTH) -> str:
    """The report as text. Only with `color` does it have terminal colours.

    Args:
        file: that the plan is in, if it is in one.
    """
    head = RichTable(box=None, show_header=False, padding=(0, 2, 0, 0))
    head.add_column(style="dim")
    head.add_column()
    for key, value in headline(plan, file):
        head.add_row(key, value)
    return render_tables(tables(plan, fold=True), head, color=color, width=width)


def render_tables(
    shown: Sequence[Table],
    head: RichTable | None = None,
    *,
    color: bool = False,
    width: int = WIDTH,
) -> str:
    """Tables as text, below each other."""
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=width, force_terminal=color, color_system="auto" if color else None,
        highlight=False,
    )  # fmt: skip
    if head is not None:
        console.print(head)
    for table in shown:
        console.print()
        console.print(_rich_table(table))
        if table.note:
            console.print(table.note, style="dim")
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _rich_table(table: Table) -> RichTable:
    rich_table = RichTable(
        title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False, header_style="dim",
    )  # fmt: skip
    for column in table.columns:
        number = column.endswith(">")
        rich_table.add_column(
            column.removesuffix(">"),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    for i, row in enumerate(table.rows):
        rich_table.add_row(*row, end_section=table.total in (i, i + 1))
    return rich_table
