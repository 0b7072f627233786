"""Gradients of parameters are summed over ranks in the dtype that the precision policy says.

A parameter that is cast before its gather has a gradient that is summed in the dtype of compute and
cast afterwards. This pass of the joint graph casts first: sums of bfloat16 over many ranks lose
digits, and a gather in the short dtype shall not cost them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from autopar.comm import collectives  # noqa: F401  (defines the operators)
from autopar.ir.aliasing import is_view

aten = torch.ops.aten
_OPS = torch.ops.autopar
_TO = aten._to_copy.default

_SUMS = {_OPS.all_reduce.default, _OPS.reduce_scatter.default}
# What may stand between sums; views do, too.
_MOVES = {_OPS.all_gather.default, aten.clone.default, aten.add.Tensor}


def sum_gradients_in(
    gm: fx.GraphModule, *, results: int, dtypes: Mapping[int, torch.dtype]
) -> fx.GraphModule:
    """Sum the gradients of arguments in dtypes by position; outputs are the model's `results`, then
    the gradients of all arguments, in the dtypes of these."""
    output = gm.graph.output_node()
    outputs: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    widened: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for position, dtype in dtypes.items():
        gradient = outputs[results + position]
        if not isinstance(gradient, fx.Node):
            continue
        total = gradient.args[0] if _is_cast(gradient) else gradient
        if not isinstance(total, fx.Node) or not _sums(total) or _dtype(total) == dtype:
            continue
        new = _in(total, dtype, widened)
        if dtype != _dtype(gradient):
            with gm.graph.inserting_before(output):
                new = _cast(new, _dtype(gradient))
        new.meta = {**gradient.meta, "val": new.meta["val"]}
        outputs[results + position] = new
    output.args = (tuple(outputs),)
    gm.graph.eliminate_dead_code()
    return gm


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _is_cast(node: fx.Node) -> bool:
    """Autograd's casts name the layout and the device of their operand, too."""
    return node.target is _TO and set(node.kwargs) <= {"dtype", "layout", "device"}


def _moves(node: fx.Node) -> bool:
    return node.target in _MOVES or (node.op == "call_function" and is_view(node))


def _sums(node: fx.Node) -> bool:
    """Whether a value is a sum over ranks, or a rearrangement of such sums."""
    if node.target in _SUMS or _is_cast(node):
        return node.target in _SUMS or _sums(node.args[0])  # type: ignore[arg-type]
    return _moves(node) and any(map(_sums, node.all_input_nodes))


def _in(
    node: fx.Node, dtype: torch.dtype, known: dict[tuple[fx.Node, torch.dtype], fx.Node]
) -> fx.Node:
    """The same value, summed in another dtype."""
    if _dtype(node) == dtype:
        return node
    if _is_cast(node) and _dtype(node.args[0]) == dtype:  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    if (node, dtype) not in known:
        if _sums(node) and not _is_cast(node):
            inputs = {n: _in(n, dtype, known) for n in node.all_input_nodes}
            with node.graph.inserting_before(node):
                new = node.graph.node_copy(node, inputs.__getitem__)
            new.meta = {**node.meta, "val": node.meta["val"].to(dtype)}
        else:
            with node.graph.inserting_after(node):
                new = _cast(node, dtype)
        known[node, dtype] = new
    return known[node, dtype]


def _cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A cast at the graph's insertion point."""
    cast = node.graph.call_function(_TO, (node,), {"dtype": dtype})
    cast.meta = {**node.meta, "val": node.meta["val"].to(dtype)}
    return cast
