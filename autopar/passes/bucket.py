"""Buckets: many small collectives of one group, with the same need, become one."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx

from autopar.profiler.link import MEMBER_BYTES
from autopar.runtime import collectives  # noqa: F401  (defines the operators)

BUCKET_BYTES = 4 * 2**20

_OPS = torch.ops.autopar

# A collective, that of a bucket, and the positions of the arguments that members have in common.
_REDUCTIONS = (
    (_OPS.all_reduce.default, _OPS.all_reduce_many.default, (1, 2)),
    (_OPS.reduce_scatter.default, _OPS.reduce_scatter_many.default, (2,)),
)
_GATHERS = ((_OPS.all_gather.default, _OPS.all_gather_many.default, (3,)),)


def bucket_collectives(
    gm: fx.GraphModule,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    apart: Collection[fx.Node] = frozenset(),
) -> fx.GraphModule:
    """Merge gathers of what the program is given (weights), at the first of them; and reductions
    whose results are only returned (gradients), at the last.

    Values of one group and dtype share a buffer of at most `bucket_bytes`; the sum of every element
    is over the same ranks as before.

    Args:
        apart: nodes that stay as they are (of a joint graph, the forward's: what is gathered
            together could only be gathered again together).
    """
    graph = gm.graph
    given = given_values(graph)
    output = graph.output_node()

    def at_the_start(node: fx.Node) -> bool:
        return node.args[0] in given

    def at_the_end(node: fx.Node) -> bool:
        return set(node.users) == {output}

    for kinds, may_move in ((_GATHERS, at_the_start), (_REDUCTIONS, at_the_end)):
        for one, many, common in kinds:
            candidates = [
                n for n in graph.nodes if n.target is one and n not in apart and may_move(n)
            ]
            for members in _filled(candidates, common, bucket_bytes):
                _merge(graph, members, many, common, early=may_move is at_the_start)
    graph.lint()
    gm.recompile()
    return gm


def given_values(graph: fx.Graph) -> set[fx.Node]:
    """What the program is called with, and views of it."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
        if node.op == "placeholder" or (is_view and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _filled(
    nodes: Sequence[fx.Node], common: Sequence[int], bucket_bytes: int
) -> Iterator[list[fx.Node]]:
    """Buckets of two and more."""
    open_: dict[Any, list[fx.Node]] = defaultdict(list)
    filled: dict[Any, int] = defaultdict(int)
    closed = []
    for node in nodes:
        nbytes = max(_bytes(node), _bytes(node.args[0]))
        if nbytes > MEMBER_BYTES:
            continue
        key = (node.meta["val"].dtype, *(node.args[i] for i in common))
        if filled[key] + nbytes > bucket_bytes:
            closed.append(open_.pop(key))
            filled[key] = 0
        open_[key].append(node)
        filled[key] += nbytes
    for members in (*closed, *open_.values()):
        if len(members) > 1:
            yield members


def _bytes(node: Any) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def _merge(
    graph: fx.Graph,
    members: Sequence[fx.Node],
    many: Callable[..., Any],
    common: Sequence[int],
    *,
    early: bool,
) -> None:
    """One collective in the place of the first, or the last, of its members."""
    own = [i for i in range(1, len(members[0].args)) if i not in common]
    lists = [[n.args[i] for n in members] for i in (0, *own)]
    arguments = (*lists, *(members[0].args[i] for i in common))
    place = members[0] if early else members[-1]
    with graph.inserting_before(place):
        if early:
            bring_forward(place, [n.args[0] for n in members])
        merged = graph.call_function(many, arguments)
        merged.meta["val"] = [n.meta["val"] for n in members]
        for i, node in enumerate(members):
            item = graph.call_function(operator.getitem, (merged, i))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
    for node in members:
        graph.erase_node(node)


def bring_forward(place: fx.Node, needed: Sequence[Any]) -> None:
    """Views that a merged gather reads move to before it."""
    position = {node: i for i, node in enumerate(place.graph.nodes)}
    late: set[fx.Node] = set()
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node.op != "placeholder" and position[node] > position[place] and node not in late:
            late.add(node)
            stack += node.all_input_nodes
    for node in sorted(late, key=position.__getitem__):
        place.prepend(node)
