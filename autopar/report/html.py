"""The plan as one HTML page that reads no other file or address."""

from __future__ import annotations

import jinja2
import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from autopar.plan import ShardingPlan
from autopar.report.charts import figures
from autopar.report.content import decisions_table, tables
from autopar.report.headline import headline


def render_html(plan: ShardingPlan, file: str = "") -> str:
    """The report as a page, with charts of time and memory of the plan and its baselines.

    Args:
        file: that the plan is in, if it is in one.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autopar", "report"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.jinja").render(
        plan=plan, headline=headline(plan, file),
        figures={title: list(map(_chart, charts)) for title, charts in figures(plan).items()},
        tables=tables(plan, fold=False), decisions=decisions_table(plan), plotly=get_plotlyjs(),
    )  # fmt: skip


def _chart(figure: go.Figure) -> str:
    return plotly.io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        config={"displaylogo": False, "displayModeBar": False, "responsive": True},
    )
