"""Buckets: many small collectives of one group become one message."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx

from autopar.comm import collectives  # noqa: F401  (defines the operators)
from autopar.comm.cost import BUCKET_MEMBER_BYTES
from autopar.ir.aliasing import is_view
from autopar.ir.fx_calls import add_call

BUCKET_BYTES = 4 * 2**20
_BUDGET_SHARE = 1 / 64  # of a budget, at most, in a bucket: its members wait for each other

_OPS = torch.ops.autopar
_CAST = torch.ops.aten._to_copy.default
_SPLIT, _VIEW = torch.ops.aten.split_with_sizes.default, torch.ops.aten.view.default

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
    """Merge gathers of arguments (weights), at the first of them, and reductions whose results are
    only returned (gradients), at the last; on every axis of a mesh.

    Values of one group and dtype share a buffer of at most `bucket_bytes`; the sum of every element
    is over the same ranks as before.

    Args:
        apart: nodes to leave as they are (of a joint graph, those of the forward: gathers that are
            merged can only be repeated together).
    """
    graph = gm.graph
    _bucket_gathers(graph, bucket_bytes, apart)
    _bucket_reductions(graph, bucket_bytes, apart)
    return gm


def bucket_bytes_within(budget_bytes: float) -> int:
    """The size of buckets for a budget of memory; a power of two, so that budgets that are nearly
    equal have the same programs."""
    share = max(1.0, _BUDGET_SHARE * budget_bytes)
    return BUCKET_BYTES if share >= BUCKET_BYTES else 2 ** math.floor(math.log2(share))


def _bucket_gathers(graph: fx.Graph, bucket_bytes: int, apart: Collection[fx.Node]) -> None:
    """Those of weights; then those of what these have gathered over one axis, over the next."""
    ((one, many, common),) = _GATHERS
    arguments = argument_views(graph)
    done: set[fx.Node] = set(apart)
    while level := [n for n in _calls(graph, one) if n not in done and n.args[0] in arguments]:
        gathered = set(level)
        for members in list(_filled(level, common, bucket_bytes)):
            gathered -= set(members)
            gathered |= set(_gather_together(graph, members, many, common).users)
        done |= gathered
        arguments = argument_views(graph, arguments | gathered)


def _bucket_reductions(graph: fx.Graph, bucket_bytes: int, apart: Collection[fx.Node]) -> None:
    """Those whose results are returned; then those over one axis whose sums these sum over the
    next."""
    last = {graph.output_node()}
    done: set[fx.Node] = set(apart)
    level: list[fx.Node] = [graph.output_node()]
    while level:
        level = []
        for one, many, common in _REDUCTIONS:
            here = [n for n in _calls(graph, one) if n not in done and _is_for(n, last)]
            level += here
            for members in list(_filled(here, common, bucket_bytes)):
                level = [n for n in level if n not in members]
                level.append(_reduce_together(graph, members, many, common))
        done |= set(level)
        last |= set(level)


def _is_for(node: fx.Node, users: set[fx.Node]) -> bool:
    return bool(node.users) and users.issuperset(node.users)


def _calls(graph: fx.Graph, target: Any) -> Iterator[fx.Node]:
    return (n for n in graph.nodes if n.target is target)


def argument_views(graph: fx.Graph, more: Collection[fx.Node] = frozenset()) -> set[fx.Node]:
    """The arguments of the program, and more values, with views and casts of them."""
    views: set[fx.Node] = set(more)
    for node in graph.nodes:
        moved = node.target is _CAST or is_view(node)
        if node.op == "placeholder" or (moved and views.issuperset(node.all_input_nodes)):
            views.add(node)
    return views


def _filled(
    nodes: Sequence[fx.Node], common: Sequence[int], bucket_bytes: int
) -> Iterator[list[fx.Node]]:
    """Buckets of two and more."""
    open_: dict[Any, list[fx.Node]] = defaultdict(list)
    filled: dict[Any, int] = defaultdict(int)
    closed = []
    for node in nodes:
        nbytes = max(_bytes(node), _bytes(node.args[0]))
        if nbytes > BUCKET_MEMBER_BYTES:
            continue
        key = (node.meta["val"].dtype, *(node.args[i] for i in common))
        if filled[key] and filled[key] + nbytes > bucket_bytes:
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


def _gather_together(
    graph: fx.Graph, members: Sequence[fx.Node], many: Any, common: Sequence[int]
) -> fx.Node:
    """One gather in the place of the first of its members."""
    place = members[0]
    bring_forward(place, [n.args[0] for n in members])
    with graph.inserting_before(place):
        merged = add_call(graph, many, _arguments(members, common))
        for i, node in enumerate(members):
            item = graph.call_function(operator.getitem, (merged, i))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
    for node in members:
        graph.erase_node(node)
    return merged


def _reduce_together(
    graph: fx.Graph, members: Sequence[fx.Node], many: Any, common: Sequence[int]
) -> fx.Node:
    """One reduction in the place of the last of its members, whose results are views of its row;
    what they are for comes after it."""
    values = [n.meta["val"] for n in members]
    views = []
    with graph.inserting_before(members[-1]):
        row = add_call(graph, many, _arguments(members, common))
        parts = add_call(graph, _SPLIT, (row, [v.numel() for v in values]))
        for i, node in enumerate(members):
            part = graph.call_function(operator.getitem, (parts, i))
            part.meta["val"] = parts.meta["val"][i]
            view = add_call(graph, _VIEW, (part, list(values[i].shape)))
            view.meta = {**node.meta, "val": view.meta["val"]}
            node.replace_all_uses_with(view)
            views.append(view)
    for node in members:
        graph.erase_node(node)
    _put_off(views)
    return row


def _arguments(members: Sequence[fx.Node], common: Sequence[int]) -> list[Any]:
    """Lists of what is each member's own, and then what they have in common."""
    own = [i for i in range(1, len(members[0].args)) if i not in common]
    lists = [[n.args[i] for n in members] for i in (0, *own)]
    return [*lists, *(members[0].args[i] for i in common)]


def _put_off(results: Sequence[fx.Node]) -> None:
    """What reads results, and stands before them, moves to behind the last of them."""
    position = {node: i for i, node in enumerate(results[0].graph.nodes)}
    place = results[-1]
    early: set[fx.Node] = set()
    stack = [user for node in results for user in node.users]
    while stack:
        node = stack.pop()
        if position[node] < position[place] and node not in early:
            early.add(node)
            stack += node.users
    for node in sorted(early, key=position.__getitem__, reverse=True):
        place.append(node)


def bring_forward(place: fx.Node, needed: Sequence[Any]) -> None:
    """Views and casts that a merged gather reads move to before it."""
    position = {node: i for i, node in enumerate(place.graph.nodes)}
    later: set[fx.Node] = set()
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node.op != "placeholder" and position[node] > position[place] and node not in later:
            later.add(node)
            stack += node.all_input_nodes
    for node in sorted(later, key=position.__getitem__):
        place.prepend(node)
