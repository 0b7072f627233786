"""Value ranges: bounds of a captured scalar for all inputs.

Intervals are propagated through the few operators that predicates consist of; the results of others
are unbounded. Booleans are intervals within [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

Interval = tuple[float, float]

_ANY: Interval = (-math.inf, math.inf)
_BOOL: Interval = (0.0, 1.0)
# uniform draws are at least 0 and below 1
_UNIT: Interval = (0.0, math.nextafter(1.0, 0.0))


def _compare(test: Callable[[Interval, Interval], tuple[bool, bool]]) -> Callable[..., Interval]:
    def rule(a: Interval, b: Interval, *_: Any) -> Interval:
        always, never = test(a, b)
        return (1.0, 1.0) if always else (0.0, 0.0) if never else _BOOL

    return rule


def _not(a: Interval, *_: Any) -> Interval:
    low, high = _truth(a)
    return 1.0 - high, 1.0 - low


def _truth(a: Interval) -> Interval:
    return (1.0, 1.0) if a[0] > 0 or a[1] < 0 else (0.0, 0.0) if a == (0.0, 0.0) else _BOOL


def _or(a: Interval, b: Interval) -> Interval:
    x, y = _truth(a), _truth(b)
    return max(x[0], y[0]), max(x[1], y[1])


def _and(a: Interval, b: Interval) -> Interval:
    x, y = _truth(a), _truth(b)
    return min(x[0], y[0]), min(x[1], y[1])


def _times(a: Interval, b: Interval, *_: Any) -> Interval:
    ends = [x * y for x in a for y in b]
    return _ANY if any(math.isnan(e) for e in ends) else (min(ends), max(ends))


_lt = _compare(lambda a, b: (a[1] < b[0], a[0] >= b[1]))
_le = _compare(lambda a, b: (a[1] <= b[0], a[0] > b[1]))
_eq = _compare(lambda a, b: (a[0] == a[1] == b[0] == b[1], a[1] < b[0] or a[0] > b[1]))

# operator name to interval rule; element-wise ones also hold for tensors
_RULES: dict[str, Callable[..., Interval]] = {
    "rand": lambda *_: _UNIT,
    "rand_like": lambda *_: _UNIT,
    "lt": _lt,
    "le": _le,
    "gt": lambda a, b, *_: _lt(b, a),
    "ge": lambda a, b, *_: _le(b, a),
    "eq": _eq,
    "ne": lambda a, b, *_: _not(_eq(a, b)),
    "add": lambda a, b, *_: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b, *_: (a[0] - b[1], a[1] - b[0]),
    "rsub": lambda a, b, *_: (b[0] - a[1], b[1] - a[0]),
    "mul": _times,
    "neg": lambda a, *_: (-a[1], -a[0]),
    "abs": lambda a, *_: (max(0.0, a[0], -a[1]), max(-a[0], a[1])),
    "logical_not": _not,
    "logical_or": _or,
    "logical_and": _and,
    **dict.fromkeys(("__or__", "bitwise_or"), _or),
    **dict.fromkeys(("__and__", "bitwise_and"), _and),
    **dict.fromkeys(("any", "all"), lambda a, *_: _truth(a)),
    **dict.fromkeys(
        ("max", "min", "amax", "amin", "mean", "clone", "detach", "squeeze", "view", "reshape",
         "_to_copy", "item", "select", "_local_scalar_dense", "alias", "expand"),
        lambda a, *_: a,
    ),
}  # fmt: skip
_FINITE = {"isfinite": 1.0, "isinf": 0.0, "isnan": 0.0}


def only_value(node: fx.Node, *, finite: bool = False) -> float | None:
    """The only value that a node can have, by its operators alone; None if there are several.

    Args:
        finite: assume that what `isfinite`, `isinf` and `isnan` test is finite.
    """
    memo: dict[fx.Node, Interval] = {}

    def visit(arg: Any) -> Interval:
        if isinstance(arg, bool | int | float):
            return float(arg), float(arg)
        if not isinstance(arg, fx.Node):
            return _ANY
        if arg in memo:
            return memo[arg]
        memo[arg] = _ANY
        name = arg.target._opname if isinstance(arg.target, torch._ops.OpOverload) else ""
        if finite and name in _FINITE:
            memo[arg] = (_FINITE[name],) * 2
        elif name in _RULES:
            memo[arg] = _RULES[name](*(visit(a) for a in arg.args))
        elif name == "bitwise_not" and arg.meta["val"].dtype == torch.bool:
            memo[arg] = _not(visit(arg.args[0]))
        return memo[arg]

    low, high = visit(node)
    return low if low == high else None
