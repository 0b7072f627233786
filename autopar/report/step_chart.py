"""A scheduled step as a piece of an HTML page: live bytes over time, and what is kept, moved,
computed and gathered again by module. The page brings plotly's script along, once."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go
import plotly.io

from autopar.plan import StepSummary
from autopar.units import bytes_text

_PARAMETERS = "#a9bcd0"
_KEPT, _HOST, _AGAIN, _GATHERED, _OTHER = "#3b6ea5", "#7fa8d1", "#d9822b", "#efc08a", "#b0aba3"
_ROW_HEIGHT = 22
_FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#24292f"}
_MARGIN = {"l": 10, "r": 10, "t": 10, "b": 10}


def step_html(step: StepSummary) -> str:
    """Both charts, with a line that says where the peak is."""
    peak = (
        f"What the step makes peaks at {bytes_text(step.peak_bytes)}, at {step.peak_at}; "
        f"if everything were kept, at {bytes_text(step.eager_bytes)}. "
        f"{bytes_text(step.resident_bytes)} are there before the step."
    )
    return "\n".join(
        (
            f'<p class="note">{escape(peak)}</p>',
            _fragment(live_figure(step)),
            _fragment(modules_figure(step)),
        )
    )


def live_figure(step: StepSummary) -> go.Figure:
    """Bytes alive over time, by origin, and those of parameters that are missing meanwhile; the
    backward starts at the dashed line."""
    us, kept, again, other, away = zip(*step.live, strict=True) if step.live else ((),) * 5
    times = [t * 1e-3 for t in us]
    words = [bytes_text(sum(parts)) for parts in zip(kept, again, other, strict=True)]
    figure = go.Figure()
    for name, color, values in (
        ("kept from the forward", _KEPT, kept),
        ("computed or gathered again, or fetched", _AGAIN, again),
        ("gradients and passing values", _OTHER, other),
    ):
        figure.add_scatter(
            name=name, x=times, y=[v / 2**20 for v in values], stackgroup="live",
            line={"shape": "hv", "width": 0}, fillcolor=color, customdata=words,
            hovertemplate="%{y:.2f} MiB of %{customdata} " + name + "<extra></extra>",
        )  # fmt: skip
    if any(away):
        figure.add_scatter(
            name="parameters on the host", x=times, y=[-v / 2**20 for v in away],
            line={"shape": "hv", "width": 0}, fill="tozeroy", fillcolor=_PARAMETERS,
            hovertemplate="%{y:.2f} MiB of parameters on the host<extra></extra>",
        )  # fmt: skip
    if 0 < step.backward_us < step.us:
        figure.add_vline(x=step.backward_us * 1e-3, line={"dash": "dash", "width": 1})
    figure.update_layout(
        template="plotly_white", height=320, margin=_MARGIN, font=_FONT,
        xaxis={"title": "ms, predicted; the backward starts at the dashed line"},
        yaxis={"title": "MiB that the step makes", "rangemode": "tozero", "automargin": True},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    )  # fmt: skip
    return figure


def modules_figure(step: StepSummary) -> go.Figure:
    """Per block, what becomes of the values of its forward: bytes on the device and on the host,
    and the time that computing and gathering again takes."""
    names = [m.module or "(no module)" for m in step.modules]
    figure = go.Figure()
    for axis, name, color, values in (
        ("x", "kept", _KEPT, [m.kept_bytes / 2**20 for m in step.modules]),
        ("x", "on the host", _HOST, [m.offloaded_bytes / 2**20 for m in step.modules]),
        (
            "x",
            "parameters on the host",
            _PARAMETERS,
            [m.parameters_bytes / 2**20 for m in step.modules],
        ),
        ("x2", "computed again", _AGAIN, [m.recompute_us * 1e-3 for m in step.modules]),
        ("x2", "gathered again", _GATHERED, [m.regather_us * 1e-3 for m in step.modules]),
    ):
        unit = "MiB" if axis == "x" else "ms"
        figure.add_bar(
            name=name, x=values, y=names, xaxis=axis, orientation="h", marker_color=color,
            hovertemplate="%{y}: %{x:.3g} " + f"{unit} {name}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white", height=110 + _ROW_HEIGHT * len(names), margin=_MARGIN, font=_FONT,
        xaxis={"title": "MiB", "domain": [0, 0.48]},
        xaxis2={"title": "ms", "domain": [0.52, 1], "anchor": "y"},
        yaxis={"autorange": "reversed", "automargin": True}, bargap=0.35, barmode="stack",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    )  # fmt: skip
    return figure


def _fragment(figure: go.Figure) -> str:
    found: str = plotly.io.to_html(
        figure, full_html=False, include_plotlyjs=False,
        config={"displaylogo": False, "displayModeBar": False, "responsive": True},
    )  # fmt: skip
    return found
