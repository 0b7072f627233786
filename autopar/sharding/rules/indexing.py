"""Reading and writing where indices say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from autopar.sharding.rule import OpRule, Row, Shape
from autopar.sharding.rules.call import Call


def _broadcast(shapes: Sequence[Shape]) -> int:
    return max(len(s) for s in shapes)


def _index_names(call: Call) -> tuple[list[str], list[str], list[str]] | None:
    """Names of the indexed tensor's dims, of the indices, and of the result.

    Indexed dims are whole; the indices' dims (i...) stand in the result where the first of them
    was, or in front if the indexed dims are not neighbours. None for masks, whose result has a
    shape that depends on values.
    """
    source = call.inputs[0]
    assert source is not None
    indices = call.arguments["indices"]
    given = [d for d, index in enumerate(indices) if index is not None]
    shapes = [indices[d] for d in given]
    if not given or any(call.masks[1 : 1 + len(indices)]):
        return None
    rank = _broadcast(shapes)
    adjacent = given == list(range(given[0], given[-1] + 1))
    read = [f"[x{d}]" if d in given else f"d{d}" for d in range(len(source))]
    wanted = [f"i{k}" for k in range(rank)]
    rest = [f"d{d}" for d in range(len(source)) if d not in given]
    before = given[0] if adjacent else 0
    result = [*rest[:before], *wanted, *rest[before:]]
    # broadcasting aligns from the right
    spelled = [" ".join(wanted[rank - len(s) :]) for s in shapes]
    return read, spelled, result


def _operands(call: Call, spelled: Sequence[str]) -> list[str]:
    """Patterns of the index operands: the absent ones among them are operands too."""
    queue = iter(spelled)
    return [next(queue) if i is not None else "" for i in call.arguments["indices"]]


def _index(call: Call) -> OpRule | None:
    names = _index_names(call)
    if names is None:
        return None
    read, spelled, result = names
    patterns = [" ".join(read), *_operands(call, spelled)]
    row = Row(f"{', '.join(patterns)} -> {' '.join(result)}", linear=((0,),))
    return row.bind(call.inputs, call.outputs)


def _index_put(call: Call) -> OpRule | None:
    """What is added may be split over the indices, not what is written: the last one stays."""
    names, values = _index_names(call), call.inputs[-1]
    if names is None and values is not None:
        return _fill(call, values)
    if names is None or values is None:
        return None
    read, spelled, result = names
    if len(values) > len(result):
        return None
    # values broadcast to the shape that reading would give
    written = " ".join(result[len(result) - len(values) :])
    base = " ".join(read)
    if call.arguments.get("accumulate"):
        notation = f"+ {', '.join([base, *_operands(call, spelled), written])} -> {base}"
    else:
        whole = [re.sub(r"\bi\d+", "[\\g<0>]", p) for p in (*_operands(call, spelled), written)]
        notation = f"{', '.join([base, *whole])} -> {base}"
    row = Row(notation, linear=((0, len(call.inputs) - 1),))
    return row.bind(call.inputs, call.outputs)


def _fill(call: Call, values: Shape) -> OpRule | None:
    """One value wherever a mask over the leading dims says so: element by element."""
    mask = call.inputs[1]
    if math.prod(values) != 1 or mask is None or not call.masks[1] or len(call.inputs) != 3:
        return None
    dims = [f"d{d}" for d in range(len(call.outputs[0]))]
    ones = " ".join(f"[v{d}]" for d in range(len(values)))
    filled = " ".join(dims)
    row = Row(f"{filled}, {' '.join(dims[: len(mask)])}, {ones} -> {filled}", linear=((0, 2),))
    return row.bind(call.inputs, call.outputs)


def _dim(call: Call) -> int:
    return call.arguments["dim"] % max(len(call.outputs[0]), 1)


def _dim_names(call: Call) -> tuple[list[str], int]:
    source, dim = call.inputs[0], _dim(call)
    assert source is not None
    return [f"[x{d}]" if d == dim else f"d{d}" for d in range(len(source))], dim


def _index_select(call: Call) -> OpRule:
    names, dim = _dim_names(call)
    result = [*names[:dim], "i", *names[dim + 1 :]]
    row = Row(f"{' '.join(names)}, i -> {' '.join(result)}", linear=((0,),))
    return row.bind(call.inputs, call.outputs)


def _gather(call: Call) -> OpRule:
    """Indices may be fewer than there are elements: such dims are whole."""
    dim = _dim(call)
    source, index = call.inputs[0], call.inputs[1]
    assert source is not None
    assert index is not None
    same = [d != dim and source[d] == index[d] for d in range(len(source))]
    left = [f"d{d}" if ok else f"[x{d}]" for d, ok in enumerate(same)]
    right = [f"d{d}" if ok else (f"i{d}" if d == dim else f"[y{d}]") for d, ok in enumerate(same)]
    row = Row(f"{' '.join(left)}, {' '.join(right)} -> {' '.join(right)}", linear=((0,),))
    return row.bind(call.inputs, call.outputs)


def _scatter(call: Call) -> OpRule:
    """Index and source, split as the tensor where they are as large; what is added, also along
    `dim`."""
    dim = _dim(call)
    source = call.inputs[0]
    assert source is not None
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
    row = Row(f"{'+ ' if adds else ''}{', '.join(patterns)} -> {left}", linear=linear)
    return row.bind(call.inputs, call.outputs)


def _write(call: Call) -> OpRule:
    """`slice_scatter`, `select_scatter`: what is written lies along `dim`."""
    names, dim = _dim_names(call)
    source, written = call.inputs[:2]
    assert source is not None
    assert written is not None
    src = [n for d, n in enumerate(names) if d != dim or len(written) == len(source)]
    if len(written) == len(source):
        src[dim] = "[y]"
    row = Row(f"{' '.join(names)}, {' '.join(src)} -> {' '.join(names)}", linear=((0, 1),))
    return row.bind(call.inputs, call.outputs)


def _index_add(call: Call) -> OpRule:
    """Rows of the second tensor are added where the index says."""
    names, dim = _dim_names(call)
    added = [*names[:dim], "i", *names[dim + 1 :]]
    row = Row(f"+ {' '.join(names)}, i, {' '.join(added)} -> {' '.join(names)}", linear=((0, 2),))
    return row.bind(call.inputs, call.outputs)


ROWS: dict[str, Row | tuple[Row, ...]] = {
    # the values are taken one after the other, across all dims
    "aten.masked_scatter.default": Row("..., ..., ... -> ...", linear=((0, 2),)),
}

DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    "aten.index.Tensor": _index,
    "aten.index_put.default": _index_put,
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.index_add.default": _index_add,
    "aten.slice_scatter.default": _write,
    "aten.select_scatter.default": _write,
    **{
        f"aten.{name}": _scatter
        for name in (
            "scatter.src scatter.value scatter_add.default scatter_reduce.two scatter.reduce"
        ).split()
    },
}
