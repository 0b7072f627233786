"""The timeline of a step as a piece of an HTML page: live bytes over time, and what is kept and
computed again by module. The page brings plotly's script along, once."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go
import plotly.io

from autopar.memory.timeline import Timeline
from autopar.units import format_bytes

_KEPT, _AGAIN, _OTHER = "#3b6ea5", "#d9822b", "#b0aba3"
_ROW_HEIGHT = 22
_FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#24292f"}
_MARGIN = {"l": 10, "r": 10, "t": 10, "b": 10}


def timeline_html(timeline: Timeline) -> str:
    """Both charts, with a line that says where the peak is."""
    at = timeline.moments[timeline.peak_at] if timeline.moments else None
    where = "" if at is None else f" at {at.name}" + (f" of {at.module}" if at.module else "")
    peak = f"The peak of {format_bytes(timeline.peak_bytes)} is reached{where}."
    return "\n".join(
        (
            f'<p class="note">{escape(peak)}</p>',
            _fragment(live_figure(timeline)),
            _fragment(modules_figure(timeline)),
        )
    )


def live_figure(timeline: Timeline) -> go.Figure:
    """Bytes alive over time, by origin; the backward starts at the dashed line."""
    moments = timeline.moments
    times = [m.issued_us * 1e-3 for m in moments]
    words = [
        (f"{m.name} · {m.module}" + (" (again)" if m.again else ""), format_bytes(m.live_bytes))
        for m in moments
    ]
    figure = go.Figure()
    for name, color, values in (
        ("kept from the forward", _KEPT, [m.kept_bytes for m in moments]),
        ("computed again", _AGAIN, [m.again_bytes for m in moments]),
        ("gradients and passing values", _OTHER, [m.other_bytes for m in moments]),
    ):
        figure.add_scatter(
            name=name, x=times, y=[v / 2**20 for v in values], stackgroup="live",
            line={"shape": "hv", "width": 0}, fillcolor=color, customdata=words,
            hovertemplate="%{customdata[0]}<br>%{y:.2f} of %{customdata[1]} " + name
            + "<extra></extra>",
        )  # fmt: skip
    if 0 < timeline.forward < len(moments):
        figure.add_vline(x=times[timeline.forward], line={"dash": "dash", "width": 1})
    figure.update_layout(
        template="plotly_white", height=320, margin=_MARGIN, font=_FONT,
        xaxis={"title": "ms, predicted; the backward starts at the dashed line"},
        yaxis={"title": "MiB alive", "rangemode": "tozero", "automargin": True},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    )  # fmt: skip
    return figure


def modules_figure(timeline: Timeline) -> go.Figure:
    """Per block, the bytes that its forward hands to the backward, and the time that computing
    the rest again takes."""
    rows = timeline.by_module()
    names = [r.module or "(no module)" for r in rows]
    figure = go.Figure()
    for axis, name, color, values, texts in (
        ("x", "kept, MiB", _KEPT, [r.kept_bytes / 2**20 for r in rows],
         [format_bytes(r.kept_bytes) for r in rows]),
        ("x2", "computed again, ms", _AGAIN, [r.again_us * 1e-3 for r in rows],
         [f"{r.again_us * 1e-3:.3g} ms, {r.again_flops:.3g} FLOPs" for r in rows]),
    ):  # fmt: skip
        figure.add_bar(
            name=name, x=values, y=names, xaxis=axis, orientation="h", marker_color=color,
            customdata=texts, hovertemplate="%{y}: %{customdata}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white", height=90 + _ROW_HEIGHT * len(rows), margin=_MARGIN, font=_FONT,
        xaxis={"title": "kept, MiB", "domain": [0, 0.48]},
        xaxis2={"title": "computed again, ms", "domain": [0.52, 1], "anchor": "y"},
        yaxis={"autorange": "reversed", "automargin": True}, showlegend=False, bargap=0.35,
        barmode="overlay",
    )  # fmt: skip
    return figure


def _fragment(figure: go.Figure) -> str:
    found: str = plotly.io.to_html(
        figure, full_html=False, include_plotlyjs=False,
        config={"displaylogo": False, "displayModeBar": False, "responsive": True},
    )  # fmt: skip
    return found
