"""Writes results over operands that die: a pointwise operator needs no memory of its own then.

Numbers stay the same to the bit, as the kernels read an element before they write it.
"""

from __future__ import annotations

import torch.fx as fx

from autopar.ir.aliasing import lifetimes, overwritable, variant


def overwrite(gm: fx.GraphModule) -> fx.GraphModule:
    """Write results over operands that die with them.

    Neither inputs are overwritten, which the caller may still hold (a backward may run twice), nor
    what is returned.
    """
    graph = gm.graph
    where, last, held = lifetimes(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or where[node] != (node, 0):
            continue
        for operand in overwritable(node):
            source = where[operand]
            shared = [n for n in node.all_input_nodes if where[n] == source]
            own = source is not None and source[0].op == "call_function" and source not in held
            if own and last[source] is node and len(shared) == 1:
                _write_over(node, operand)
                break
    return gm


def _write_over(node: fx.Node, operand: fx.Node) -> None:
    overload = variant(node.target, node.args.index(operand), node.meta["val"].device.type)
    assert overload is not None
    node.target, result = overload
    if result is not None:
        node.kwargs = {**node.kwargs, result: operand}
