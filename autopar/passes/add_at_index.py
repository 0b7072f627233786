"""Adds to the elements that an index names, without a tensor of zeros for all others.

The derivative of a gather is zeros with the gradient scattered into them. Where another gradient
of the same value is added to that, as in a loss over a split vocabulary, the gradient is scattered
into the other one instead: one tensor of logits' size where there were three, the same numbers.
"""

from __future__ import annotations

import torch
import torch.fx as fx

aten = torch.ops.aten

_ZEROS = {aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default}


def add_at_index(gm: fx.GraphModule) -> fx.GraphModule:
    """Scatter into the other term of a sum where one term is scattered into zeros."""
    graph = gm.graph
    for node in graph.find_nodes(op="call_function", target=aten.scatter_add.default):
        zeros, dim, index, source = node.args
        if zeros.target not in _ZEROS or len(zeros.users) != 1 or len(node.users) != 1:
            continue
        (total,) = node.users
        other = _other_term(total, node)
        if other is None:
            continue
        with graph.inserting_before(total):
            scattered = graph.call_function(node.target, (other, dim, index, source))
        scattered.meta = dict(total.meta)
        total.replace_all_uses_with(scattered)
        for unused in (total, node, zeros):
            graph.erase_node(unused)
    return gm


def _other_term(total: fx.Node, term: fx.Node) -> fx.Node | None:
    """What is added to a term, if it has the term's shape and dtype and the sum has its layout."""
    if total.target is not aten.add.Tensor or total.kwargs:
        return None
    others = [x for x in total.args if x is not term]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    value, of, out = (n.meta["val"] for n in (others[0], term, total))
    alike = value.shape == of.shape and value.dtype == of.dtype
    return others[0] if alike and value.stride() == out.stride() else None
