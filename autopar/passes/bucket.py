"""Buckets gradient reductions: many small all-reduces of one group become one."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Collection

import torch
import torch.fx as fx

BUCKET_BYTES = 4 * 2**20


def bucket_reductions(
    gm: fx.GraphModule,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    apart: Collection[fx.Node] = frozenset(),
) -> fx.GraphModule:
    """Merge all-reduces whose results are only returned (gradients of replicated parameters).

    Values of one group and dtype are flattened into a buffer of at most `bucket_bytes`, reduced
    once, and taken apart again; the sum of every element is over the same ranks as before.

    Args:
        apart: nodes that stay as they are (of a joint graph, the forward's).
    """
    graph = gm.graph
    output = graph.output_node()
    buckets: dict[tuple[str, torch.dtype], list[list[fx.Node]]] = defaultdict(lambda: [[]])
    filled: dict[tuple[str, torch.dtype], int] = defaultdict(int)
    for node in graph.nodes:
        if node.target is not torch.ops.autopar.all_reduce.default or node in apart:
            continue
        if set(node.users) != {output}:
            continue
        value = node.meta["val"]
        nbytes = value.numel() * value.element_size()
        if node.args[1] != "sum" or nbytes > bucket_bytes:
            continue
        key = (node.args[2], value.dtype)
        if filled[key] + nbytes > bucket_bytes:
            buckets[key].append([])
            filled[key] = 0
        buckets[key][-1].append(node)
        filled[key] += nbytes
    for (group, _), lists in buckets.items():
        for members in lists:
            if len(members) > 1:
                _merge(graph, members, group)
    graph.lint()
    gm.recompile()
    return gm


def _merge(graph: fx.Graph, members: list[fx.Node], group: str) -> None:
    """One reduction after the last member's input is known."""
    aten = torch.ops.aten
    shapes = [list(n.meta["val"].shape) for n in members]
    sizes = [math.prod(shape) for shape in shapes]
    with graph.inserting_after(members[-1]):
        anchor = graph.call_function(aten.cat.default, ([],))
    with graph.inserting_before(anchor):
        flat = [
            graph.call_function(aten.reshape.default, (n.args[0], [size]))
            for n, size in zip(members, sizes, strict=True)
        ]
    anchor.args = (flat,)
    with graph.inserting_after(anchor):
        reduced = graph.call_function(torch.ops.autopar.all_reduce.default, (anchor, "sum", group))
    total = members[0].meta["val"].new_empty([sum(sizes)])
    anchor.meta["val"] = reduced.meta["val"] = total
    with graph.inserting_after(reduced):
        parts = graph.call_function(aten.split_with_sizes.default, (reduced, sizes))
    point = parts
    for i, (node, shape) in enumerate(zip(members, shapes, strict=True)):
        with graph.inserting_after(point):
            item = graph.call_function(operator.getitem, (parts, i))
        with graph.inserting_after(item):
            # copied, so that no gradient keeps the whole bucket alive or is a view of another
            view = graph.call_function(aten.view.default, (item, shape))
        with graph.inserting_after(view):
            point = graph.call_function(aten.clone.default, (view,))
        point.meta = dict(node.meta)
        node.replace_all_uses_with(point)
        graph.erase_node(node)
