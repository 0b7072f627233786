"""Reading and writing where indices say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from autopar.sharding.lowerings.rows import copy_own_rows
from autopar.sharding.rule import OpRule, Row, Shape
from autopar.sharding.rules.call import Call


def _index_names(call: Call) -> tuple[list[str], list[str], list[str]] | None:
    """Names of the indexed tensor's dims, of the indices, and of the result.

    Indexed dims are not split. In the result, the dims of the indices (i...) replace the first
    indexed dim, or lead if the indexed dims are not adjacent. None for masks, because the shape of
    their result depends on values.
    """
    source = call.operand(0)
    indices = call.arguments["indices"]
    indexed = [d for d, index in enumerate(indices) if index is not None]
    shapes = [indices[d] for d in indexed]
    if not indexed or any(call.masks[1 : 1 + len(indices)]):
        return None
    rank = max(map(len, shapes))
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    read = [f"[x{d}]" if d in indexed else f"d{d}" for d in range(len(source))]
    index_dims = [f"i{k}" for k in range(rank)]
    rest = [f"d{d}" for d in range(len(source)) if d not in indexed]
    before = indexed[0] if adjacent else 0
    result = [*rest[:before], *index_dims, *rest[before:]]
    # broadcasting aligns from the right
    patterns = [" ".join(index_dims[rank - len(s) :]) for s in shapes]
    return read, patterns, result


def _operands(call: Call, patterns: Sequence[str]) -> list[str]:
    """Patterns of all index operands, including the absent ones."""
    queue = iter(patterns)
    return [next(queue) if i is not None else "" for i in call.arguments["indices"]]


def _index(call: Call) -> OpRule | None:
    names = _index_names(call)
    if names is None:
        return None
    read, patterns, result = names
    operand_patterns = [" ".join(read), *_operands(call, patterns)]
    return call.bind(f"{', '.join(operand_patterns)} -> {' '.join(result)}", linear=((0,),))


def _index_put(call: Call) -> OpRule | None:
    """Values that are added may be split over the indices. Values that are written may not, because
    the last one stays."""
    names, values = _index_names(call), call.inputs[-1]
    if names is None and values is not None:
        return _fill(call, values)
    if names is None or values is None:
        return None
    read, patterns, result = names
    if len(values) > len(result):
        return None
    # values broadcast to the shape that reading would give
    written = " ".join(result[len(result) - len(values) :])
    base = " ".join(read)
    if call.arguments.get("accumulate"):
        notation = f"+ {', '.join([base, *_operands(call, patterns), written])} -> {base}"
    else:
        unsplit = [re.sub(r"\bi\d+", "[\\g<0>]", p) for p in (*_operands(call, patterns), written)]
        notation = f"{', '.join([base, *unsplit])} -> {base}"
    return call.bind(notation, linear=((0, len(call.inputs) - 1),))


def _fill(call: Call, values: Shape) -> OpRule | None:
    """One value written where a mask over the leading dims is true: pointwise."""
    mask = call.inputs[1]
    if math.prod(values) != 1 or mask is None or not call.masks[1] or len(call.inputs) != 3:
        return None
    dims = [f"d{d}" for d in range(len(call.outputs[0]))]
    ones = " ".join(f"[v{d}]" for d in range(len(values)))
    masked, filled = " ".join(dims[: len(mask)]), " ".join(dims)
    return call.bind(f"{filled}, {masked}, {ones} -> {filled}", linear=((0, 2),))


def _dim(call: Call) -> int:
    return call.arguments["dim"] % max(len(call.outputs[0]), 1)


def _dim_names(call: Call) -> tuple[list[str], int]:
    source, dim = call.operand(0), _dim(call)
    return [f"[x{d}]" if d == dim else f"d{d}" for d in range(len(source))], dim


def _index_select(call: Call) -> OpRule:
    names, dim = _dim_names(call)
    result = [*names[:dim], "i", *names[dim + 1 :]]
    return call.bind(f"{' '.join(names)}, i -> {' '.join(result)}", linear=((0,),))


def _gather(call: Call) -> OpRule:
    """A dim is not split if the index has fewer elements there."""
    dim, source, index = _dim(call), call.operand(0), call.operand(1)
    same = [d != dim and source[d] == index[d] for d in range(len(source))]
    left = [f"d{d}" if ok else f"[x{d}]" for d, ok in enumerate(same)]
    right = [f"d{d}" if ok else (f"i{d}" if d == dim else f"[y{d}]") for d, ok in enumerate(same)]
    return call.bind(f"{' '.join(left)}, {' '.join(right)} -> {' '.join(right)}", linear=((0,),))


def _scatter(call: Call) -> OpRule:
    """Index and source are split like the tensor where extents agree; a sum also along `dim`."""
    dim = _dim(call)
    source = call.operand(0)
    others = [s for s in call.inputs[1:] if s is not None]
    same = [
        d != dim and all(s[d] == source[d] for s in others if len(s) == len(source))
        for d in range(len(source))
    ]
    left = " ".join(f"d{d}" if ok else f"[x{d}]" for d, ok in enumerate(same))
    how = call.arguments.get("reduce", "add" if "scatter_add" in str(call.op) else "")
    adds = how in ("add", "sum") and call.arguments.get("include_self", True)
    along = "i" if adds and len({s[dim] for s in others if s}) == 1 else "[i]"
    right = " ".join(
        f"d{d}" if ok else along if d == dim else f"[y{d}]" for d, ok in enumerate(same)
    )
    patterns = [left, *(right if len(s) == len(source) else "" for s in others)]
    linear = ((0, 2),) if len(others) == 2 and how in ("", "add", "sum") else ()
    return call.bind(f"{'+ ' if adds else ''}{', '.join(patterns)} -> {left}", linear=linear)


def _write(call: Call) -> OpRule:
    """`slice_scatter`, `select_scatter`: they write along `dim`."""
    names, dim = _dim_names(call)
    source, written = call.operand(0), call.operand(1)
    src = [n for d, n in enumerate(names) if d != dim or len(written) == len(source)]
    if len(written) == len(source):
        src[dim] = "[y]"
    return call.bind(f"{' '.join(names)}, {' '.join(src)} -> {' '.join(names)}", linear=((0, 1),))


def _index_add(call: Call) -> OpRule:
    """Rows of the second tensor are added where the index says."""
    names, dim = _dim_names(call)
    target, added = " ".join(names), " ".join([*names[:dim], "i", *names[dim + 1 :]])
    return call.bind(f"+ {target}, i, {added} -> {target}", linear=((0, 2),))


def _index_copy(call: Call) -> OpRule:
    """Rows of the second tensor replace those that the index says; a rank that has a part of the
    rows takes those that are its own."""
    names, dim = _dim_names(call)
    copied = " ".join([*names[:dim], "[i]", *names[dim + 1 :]])
    rows = [*names[:dim], "rows:lowered", *names[dim + 1 :]]
    given = " ".join(n.removesuffix(":lowered") for n in rows)
    notation = f"{' '.join(rows)}, [i], {copied} -> {given}"
    return call.bind(notation, linear=((0, 2),), lowering=copy_own_rows)


ROWS: dict[str, Row | tuple[Row, ...]] = {
    # values are consumed in order, across all dims
    "aten.masked_scatter.default": Row("..., ..., ... -> ...", linear=((0, 2),))
}

DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    "aten.index.Tensor": _index,
    "aten.index_put.default": _index_put,
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.index_add.default": _index_add,
    "aten.index_copy.default": _index_copy,
    "aten.slice_scatter.default": _write,
    "aten.select_scatter.default": _write,
    **{
        f"aten.{name}": _scatter
        for name in (
            "scatter.src scatter.value scatter_add.default scatter_reduce.two scatter.reduce"
        ).split()
    },
}
