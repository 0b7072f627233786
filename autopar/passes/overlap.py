"""Overlaps gradient reductions with the rest of the backward: start at once, wait at the end."""

from __future__ import annotations

import torch
import torch.fx as fx

from autopar.runtime.groups import DirectGroup, ProcessGroup, find_group


def overlap_reductions(gm: fx.GraphModule) -> fx.GraphModule:
    """Split every all-reduce into its start, where it stands, and a wait before the first use.

    Uses torch's functional collectives, which keep the pending work; groups without a process group
    (simulation, planning) keep the synchronous operator.
    """
    graph = gm.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is not torch.ops.autopar.all_reduce.default:
            continue
        x, op, name = node.args
        group = find_group(name)
        if not isinstance(group, ProcessGroup) or isinstance(group, DirectGroup):
            continue
        first_use = min(node.users, key=order.__getitem__, default=None)
        if first_use is None or order[first_use] == order[node] + 1:
            continue
        functional = torch.ops._c10d_functional
        with graph.inserting_before(node):
            start = graph.call_function(
                functional.all_reduce.default, (x, op, group.group.group_name)
            )
        with graph.inserting_before(first_use):
            wait = graph.call_function(functional.wait_tensor.default, (start,))
        start.meta = dict(node.meta)
        wait.meta = dict(node.meta)
        order[start], order[wait] = order[node], order[first_use]
        node.replace_all_uses_with(wait)
        graph.erase_node(node)
    graph.lint()
    gm.recompile()
    return gm
