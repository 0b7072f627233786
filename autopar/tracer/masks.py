"""Masks that a graph computes, as bands of positions and booleans of other nodes (`positions.py`).

Each operator has a row that says how its result follows from those of its operands. Where no row
applies, a tensor of booleans stands for itself, and any other is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from autopar.ir.graph import bound_arguments
from autopar.tracer.levels import combined
from autopar.tracer.positions import (
    Conjunction,
    DimMap,
    Given,
    Levels,
    Positions,
    Shape,
    Within,
    compared,
)

aten = torch.ops.aten

Value = Positions | Levels
_Row = Callable[["Masks", fx.Node], Value | None]

_INTEGERS = (torch.int32, torch.int64)
_INVERSE = {"ne": "eq"}
_SWAPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


class Masks:
    """What is known of the values of a graph's nodes; sizes are numbers."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Value | None] = {}

    def of(self, node: Any) -> Value | None:
        """A tensor's value; None if it is not known."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._known:
            self._known[node] = self._value(node)
        return self._known[node]

    def _value(self, node: fx.Node) -> Value | None:
        tensor = node.meta.get("val")
        if not isinstance(tensor, torch.Tensor):
            return None
        if not all(isinstance(n, int) and n > 0 for n in tensor.shape):
            return None
        row = _ROWS.get(node.target) if node.op == "call_function" else None
        value = row(self, node) if row is not None else None
        if value is None and tensor.dtype == torch.bool:
            dims = tuple(d if n > 1 else None for d, n in enumerate(tensor.shape))
            return Levels.mask(tuple(tensor.shape), Conjunction(given=(Given(node, dims),)))
        return value


def broadcast(value: Value, shape: Shape) -> Value | None:
    """A value expanded to a shape; None if that is not known."""
    missing = len(shape) - len(value.shape)
    dims = [
        d - missing if d >= missing and value.shape[d - missing] == n else None
        for d, n in enumerate(shape)
    ]
    return _viewed(value, dims, shape)


def _viewed(value: Value, dims: DimMap, shape: Shape) -> Value | None:
    if isinstance(value, Positions):
        return value.viewed(dims, shape)
    where = value.where.viewed(dims)
    return None if where is None else Levels(shape, where, value.inside, value.outside)


def _shape(node: fx.Node) -> Shape:
    return tuple(node.meta["val"].shape)


# -- creation -------------------------------------------------------------------------------------


def _constant(node: fx.Node, number: Any) -> Value | None:
    if isinstance(number, fx.Node):
        return None
    dtype = node.meta["val"].dtype
    if dtype in _INTEGERS:
        return Positions.of(_shape(node), int(number), {})
    return Levels.constant(_shape(node), torch.tensor(number, dtype=dtype, device="cpu"))


def _filled(masks: Masks, node: fx.Node) -> Value | None:
    arguments = bound_arguments(node)
    return _constant(node, arguments["s" if "s" in arguments else "fill_value"])


def _ones(masks: Masks, node: fx.Node) -> Value | None:
    return _constant(node, 1)


def _zeros(masks: Masks, node: fx.Node) -> Value | None:
    return _constant(node, 0)


def _arange(masks: Masks, node: fx.Node) -> Value | None:
    arguments = bound_arguments(node)
    numbers = [arguments.get("start", 0), arguments["end"], arguments.get("step", 1)]
    if node.meta["val"].dtype not in _INTEGERS or not all(isinstance(n, int) for n in numbers):
        return None
    vector = torch.arange(*numbers, dtype=torch.int64, device="cpu")
    return Positions.of(_shape(node), 0, {0: vector})


# -- views ----------------------------------------------------------------------------------------


def _expanded(masks: Masks, node: fx.Node) -> Value | None:
    value = masks.of(node.args[0])
    return None if value is None else broadcast(value, _shape(node))


def _same_elements(masks: Masks, node: fx.Node) -> Value | None:
    """A view that adds and removes dims of one element."""
    value = masks.of(node.args[0])
    if value is None:
        return None
    shape = _shape(node)
    old = [d for d, n in enumerate(value.shape) if n > 1]
    new = [d for d, n in enumerate(shape) if n > 1]
    if [value.shape[d] for d in old] != [shape[d] for d in new]:
        return None
    shown = dict(zip(new, old, strict=True))
    return _viewed(value, [shown.get(d) for d in range(len(shape))], shape)


def _permuted(masks: Masks, node: fx.Node) -> Value | None:
    value = masks.of(node.args[0])
    if value is None:
        return None
    order = list(range(len(value.shape)))
    arguments = bound_arguments(node)
    if "dims" in arguments:
        order = [d % len(order) for d in arguments["dims"]]
    elif len(order) > 1:
        a, b = (arguments.get(name, i) % len(order) for i, name in enumerate(("dim0", "dim1")))
        order[a], order[b] = order[b], order[a]
    return _viewed(value, order, _shape(node))


def _sliced(masks: Masks, node: fx.Node) -> Value | None:
    value = masks.of(node.args[0])
    arguments = bound_arguments(node)
    start = arguments.get("start") or 0
    if value is None or arguments.get("step", 1) != 1 or not isinstance(start, int):
        return None
    shape = _shape(node)
    dim = arguments.get("dim", 0) % len(shape)
    start = max(0, start + value.shape[dim]) if start < 0 else start
    if isinstance(value, Positions):
        return value.narrowed(dim, start, shape)
    if value.shape == shape:
        return value
    where = value.where.narrowed(dim, start)
    return None if where is None else Levels(shape, where, value.inside, value.outside)


# -- pointwise ------------------------------------------------------------------------------------

# Arguments that place or lay out a tensor.
_NOT_VALUES = {"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"}


def _operands(masks: Masks, node: fx.Node) -> dict[str, Levels] | None:
    """The tensors among a pointwise operator's arguments, each in the shape of the result."""
    operands: dict[str, Levels] = {}
    for name, argument in bound_arguments(node).items():
        if not isinstance(argument, fx.Node):
            continue
        value = masks.of(argument)
        if isinstance(value, Positions):
            if value.vectors:
                return None
            number = torch.tensor(value.constant, dtype=argument.meta["val"].dtype, device="cpu")
            value = Levels.constant(value.shape, number)
        value = None if value is None else broadcast(value, _shape(node))
        if not isinstance(value, Levels):
            return None
        operands[name] = value
    return operands


def _pointwise(masks: Masks, node: fx.Node) -> Value | None:
    operands = _operands(masks, node)
    return None if operands is None else _combined(node, operands)


def _combined(node: fx.Node, operands: dict[str, Levels]) -> Value | None:
    arguments = {k: v for k, v in bound_arguments(node).items() if k not in _NOT_VALUES}
    for name in operands:
        # tensors of no dims take part in type promotion in another way
        arguments[name] = [1] * arguments[name].meta["val"].ndim

    def result(*values: torch.Tensor) -> torch.Tensor:
        named = zip(operands, values, strict=True)
        own = {**arguments, **{name: v.reshape(arguments[name]) for name, v in named}}
        positional = [own.pop(a.name) for a in _positional(node) if a.name in own]
        return node.target(*positional, **own).reshape([])  # type: ignore[operator]

    return _checked(node, combined(result, list(operands.values()), _shape(node)))


def _checked(node: fx.Node, value: Levels | None) -> Value | None:
    """A result if it has the dtype of the node's."""
    if value is None or value.inside.dtype != node.meta["val"].dtype:
        return None
    return _constant(node, value.value.item()) if value.is_constant else value


def _positional(node: fx.Node) -> list[Any]:
    return [a for a in node.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]


def _unchanged(masks: Masks, node: fx.Node) -> Value | None:
    """Also a conversion of integers to wide ones."""
    value = masks.of(node.args[0])
    if not isinstance(value, Positions):
        return _pointwise(masks, node)
    return value if node.meta["val"].dtype in _INTEGERS else None


def _diagonals(lower: bool) -> _Row:
    """The part of a value below a diagonal or above it, with zeros elsewhere."""

    def row(masks: Masks, node: fx.Node) -> Value | None:
        value = masks.of(node.args[0])
        by = bound_arguments(node).get("diagonal", 0)
        if isinstance(value, Positions) and not value.vectors:
            dtype = node.meta["val"].dtype
            number = torch.tensor(value.constant, dtype=dtype, device="cpu")
            value = Levels.constant(value.shape, number)
        if not isinstance(value, Levels) or not isinstance(by, int):
            return None
        rows, columns = len(value.shape) - 2, len(value.shape) - 1
        band = Within(rows, columns, None, by) if lower else Within(rows, columns, by, None)
        part = Levels.mask(value.shape, Conjunction((band,)))

        def result(x: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
            return torch.where(shown, x, torch.zeros_like(x))

        return _checked(node, combined(result, [value, part], _shape(node)))

    return row


# -- integers -------------------------------------------------------------------------------------


def _integers(masks: Masks, node: fx.Node, name: str) -> Positions | None:
    """An operand in the shape of the result."""
    argument = bound_arguments(node).get(name)
    if isinstance(argument, int) and not isinstance(argument, bool):
        return Positions.of(_shape(node), argument, {})
    value = masks.of(argument)
    value = None if value is None else broadcast(value, _shape(node))
    return value if isinstance(value, Positions) else None


def _sum(sign: int) -> _Row:
    """Sum or difference."""

    def row(masks: Masks, node: fx.Node) -> Value | None:
        a, b = (_integers(masks, node, name) for name in ("self", "other"))
        factor = bound_arguments(node).get("alpha", 1)
        if a is None or b is None or not isinstance(factor, int):
            return _pointwise(masks, node)
        if "rsub" in str(node.target):
            a, b = b, a
        return a.plus(b, sign * factor) if node.meta["val"].dtype in _INTEGERS else None

    return row


def _product(masks: Masks, node: fx.Node) -> Value | None:
    a, b = (_integers(masks, node, name) for name in ("self", "other"))
    if a is None or b is None or node.meta["val"].dtype not in _INTEGERS:
        return _pointwise(masks, node)
    if a.vectors and b.vectors:
        return None
    return a.times(b.constant) if a.vectors else b.times(a.constant)


def _negative(masks: Masks, node: fx.Node) -> Value | None:
    value = masks.of(node.args[0])
    return value.times(-1) if isinstance(value, Positions) else _pointwise(masks, node)


def _comparison(kind: str) -> _Row:
    def row(masks: Masks, node: fx.Node) -> Value | None:
        a, b = (bound_arguments(node).get(name) for name in ("self", "other"))
        where = _distance(masks, node, kind, a, "other")
        if where is None:
            where = _distance(masks, node, _SWAPPED[kind], b, "self")
        if where is not None:
            return where
        x, y = (_integers(masks, node, name) for name in ("self", "other"))
        if x is None or y is None:
            return _pointwise(masks, node)
        difference = x.plus(y, -1)
        if difference is None:
            return None
        mask = compared(_INVERSE.get(kind, kind), difference)
        return None if mask is None else _levels(node, mask, kind in _INVERSE)

    return row


def _levels(node: fx.Node, where: Conjunction, inverse: bool) -> Levels:
    mask = Levels.mask(_shape(node), where)
    return Levels(mask.shape, where, mask.outside, mask.inside) if inverse else mask


def _distance(masks: Masks, node: fx.Node, kind: str, of: Any, other: str) -> Levels | None:
    """`|x| <= bound` as `-bound <= x <= bound`; its inverses `>` and `>=` likewise."""
    bound = _integers(masks, node, other)
    if not isinstance(of, fx.Node) or of.target is not aten.abs.default or bound is None:
        return None
    if bound.vectors or kind not in ("lt", "le", "gt", "ge"):
        return None
    x = masks.of(of.args[0])
    x = None if x is None else broadcast(x, _shape(node))
    if not isinstance(x, Positions):
        return None
    upper, lower = x.plus(bound, -1), x.plus(bound)
    if upper is None or lower is None:
        return None
    strict = kind in ("lt", "ge")
    below = compared("lt" if strict else "le", upper)
    over = compared("gt" if strict else "ge", lower)
    if below is None or over is None:
        return None
    return _levels(node, below.and_(over), kind in ("gt", "ge"))


def _rows(row: _Row, *names: str) -> dict[Any, _Row]:
    """Of operators with these names, those that there are."""
    found = {}
    for name in names:
        packet, _, overload = name.partition(".")
        found[getattr(getattr(aten, packet), overload or "default")] = row
    return found


_ROWS: dict[Any, _Row] = {
    **_rows(_filled, "full", "full_like", "new_full", "scalar_tensor"),
    **_rows(_ones, "ones", "ones_like", "new_ones"),
    **_rows(_zeros, "zeros", "zeros_like", "new_zeros"),
    **_rows(_arange, "arange", "arange.start", "arange.start_step"),
    **_rows(_expanded, "expand"),
    **_rows(_same_elements, "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "reshape",
            "view"),
    **_rows(_permuted, "permute", "transpose.int", "t"),
    **_rows(_sliced, "slice.Tensor"),
    **_rows(_unchanged, "_to_copy", "to.dtype", "clone", "contiguous", "detach", "alias"),
    **_rows(_diagonals(lower=True), "tril"),
    **_rows(_diagonals(lower=False), "triu"),
    **_rows(_sum(1), "add.Tensor", "add.Scalar"),
    **_rows(_sum(-1), "sub.Tensor", "sub.Scalar", "rsub.Scalar"),
    **_rows(_product, "mul.Tensor", "mul.Scalar"),
    **_rows(_negative, "neg"),
    **_rows(_pointwise, "where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar",
            "masked_fill.Scalar", "masked_fill.Tensor", "logical_not", "logical_and", "logical_or",
            "bitwise_not", "bitwise_and.Tensor", "bitwise_or.Tensor", "__and__.Tensor",
            "__or__.Tensor", "minimum", "maximum"),
    **{op: row for kind in _SWAPPED
       for op, row in _rows(_comparison(kind), f"{kind}.Tensor", f"{kind}.Scalar").items()},
}  # fmt: skip
