"""Writes results over operands that die: a pointwise operator needs no memory of its own then.

Numbers stay the same to the bit, as the kernels read an element before they write it. What is
written into rows that an index names needs a copy of the rest else: an argument that the caller
donates (a cache of keys and values) is written in place.
"""

from __future__ import annotations

from collections.abc import Collection

import torch.fx as fx

from autopar.ir.aliasing import lifetimes, overwritable, variant, writes_by_rows
from autopar.passes.any_strides import contiguous


def overwrite(gm: fx.GraphModule, *, donated: Collection[int] = ()) -> fx.GraphModule:
    """Write results over operands that die with them.

    Neither inputs are overwritten, which the caller may still hold (a backward may run twice), nor
    what is returned.

    Args:
        donated: positions of the inputs that the caller gives away.
    """
    graph = gm.graph
    given = {n for k, n in enumerate(graph.find_nodes(op="placeholder")) if k in donated}
    where, last, held = lifetimes(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or where[node] != (node, 0):
            continue
        for operand in overwritable(node):
            source = where[operand]
            shared = [n for n in node.all_input_nodes if where[n] == source]
            own = source is not None and (source[0].op == "call_function" or source[0] in given)
            if own and source not in held and last[source] is node and len(shared) == 1:
                _write_over(node, operand)
                break
    return gm


def _write_over(node: fx.Node, operand: fx.Node) -> None:
    """What takes memory for contiguous gets such, which is the operand itself but where a kernel
    has laid it out unlike its fake."""
    overload = variant(node.target, node.args.index(operand), node.meta["val"].device.type)
    assert overload is not None
    if writes_by_rows(node.target):
        dense = contiguous(node, operand)
        node.replace_input_with(operand, dense)
        operand = dense
    node.target, result = overload
    if result is not None:
        node.kwargs = {**node.kwargs, result: operand}
