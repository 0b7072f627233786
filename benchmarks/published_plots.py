"""Scatter plots of predicted against measured steps, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

SIZE, LEFT, BOTTOM, TOP, RIGHT = 560, 70, 56, 20, 20
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#4a5568")

Points = Sequence[tuple[float, float]]  # measured and predicted seconds


def scatter(points: Mapping[str, Points]) -> str:
    """Predicted over measured seconds on logarithmic scales, one colour per data set, with the
    diagonal and the band of 10% around it."""
    values = [v for of in points.values() for pair in of for v in pair]
    low, high = _below(min(values)), _above(max(values))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIZE}" height="{SIZE}" '
        f'viewBox="0 0 {SIZE} {SIZE}" font-family="sans-serif" font-size="13">',
        f'<rect width="{SIZE}" height="{SIZE}" fill="white"/>',
    ]

    def x(seconds: float) -> float:
        return LEFT + (SIZE - LEFT - RIGHT) * _share(seconds, low, high)

    def y(seconds: float) -> float:
        return SIZE - BOTTOM - (SIZE - BOTTOM - TOP) * _share(seconds, low, high)

    band = [(low, low / 1.1), (high, high / 1.1), (high, high * 1.1), (low, low * 1.1)]
    corners = " ".join(f"{x(a):.1f},{min(max(y(b), TOP), SIZE - BOTTOM):.1f}" for a, b in band)
    parts.append(f'<polygon points="{corners}" fill="#edf2f7"/>')
    parts.append(
        f'<line x1="{x(low)}" y1="{y(low)}" x2="{x(high)}" y2="{y(high)}" stroke="#718096"/>'
    )
    for tick in _ticks(low, high):
        text = f"{tick:g}"
        parts.append(
            f'<text x="{x(tick):.1f}" y="{SIZE - BOTTOM + 18}" text-anchor="middle">{text}</text>'
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>'
            f'<line x1="{x(tick):.1f}" y1="{SIZE - BOTTOM}" x2="{x(tick):.1f}" y2="{TOP}" '
            'stroke="#e2e8f0"/>'
            f'<line x1="{LEFT}" y1="{y(tick):.1f}" x2="{SIZE - RIGHT}" y2="{y(tick):.1f}" '
            'stroke="#e2e8f0"/>'
        )
    for number, (name, of) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts += [
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}" fill-opacity="0.55"/>'
            for a, b in of
        ]
        at = TOP + 18 + 20 * number
        parts.append(
            f'<circle cx="{LEFT + 16}" cy="{at - 4}" r="5" fill="{colour}"/>'
            f'<text x="{LEFT + 28}" y="{at}">{name} ({len(of)})</text>'
        )
    middle = (LEFT + SIZE - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{SIZE - 14}" text-anchor="middle">measured step, s</text>'
        f'<text transform="translate(20 {SIZE / 2}) rotate(-90)" text-anchor="middle">'
        "predicted step, s</text></svg>"
    )
    return "\n".join(parts) + "\n"


def write(points: Mapping[str, Points], path: Path) -> None:
    """Write a plot."""
    from autopar.files import write_atomically

    write_atomically(path, scatter(points))


def _share(seconds: float, low: float, high: float) -> float:
    return math.log(seconds / low) / math.log(high / low)


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1.0, 2.0, 5.0)
    return [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]


def _below(seconds: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is not larger."""
    decade = 10.0 ** math.floor(math.log10(seconds))
    return max(s * decade for s in (1.0, 2.0, 5.0) if s * decade <= seconds)


def _above(seconds: float) -> float:
    decade = 10.0 ** math.floor(math.log10(seconds))
    return min(s * decade for s in (1.0, 2.0, 5.0, 10.0) if s * decade >= seconds)
