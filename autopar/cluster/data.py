"""Checks of a cluster's numbers, and its dataclasses as plain data for YAML and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from numbers import Real
from typing import Any

from autopar.cluster.curve import Curve


def check_number(key: str, value: Any, *, zero: bool = False) -> None:
    """Check a cost.

    Args:
        key: what the error calls it.
        zero: 0 is allowed.

    Raises:
        ValueError: not a number, not positive, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = "; YAML reads 6e-6 as text, write 6.0e-6" if isinstance(value, str) else ""
        raise ValueError(f"{key} must be a number, got {value!r}{hint}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        legal = "zero or positive" if zero else "positive"
        raise ValueError(f"{key} must be {legal} and finite, got {value}")


def curves_from(key: str, data: Mapping[str, Any]) -> dict[str, Curve]:
    """Curves by name, from lists of [size, rate].

    Raises:
        ValueError: one is not a curve; the message names it as `key[name]`.
    """
    curves = {}
    for name, points in data.items():
        try:
            curves[name] = Curve.of(points)
        except ValueError as error:
            raise ValueError(f"{key}[{name}]: {error}") from error
    return curves


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries without the fields that have their default, curves as pairs of
    size and rate, tuples as lists."""
    if isinstance(value, Curve):
        return value.to_list()
    if is_dataclass(value):
        items = {f.name: (getattr(value, f.name), f) for f in fields(value)}
        return {
            name: plain(item)
            for name, (item, f) in items.items()
            if item != (f.default if f.default_factory is MISSING else f.default_factory())
        }
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value
