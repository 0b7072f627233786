"""Copies the part of a value that outlives the rest of it.

A slice is a view, and keeps the memory of all that it was cut from: the embedding of a whole
sequence, of which a rank keeps its own positions for the backward, or a gradient that every rank
computes whole and of which it updates a shard. Where such a part is saved for the backward or is
returned, and the whole is not, it is copied, and the whole is freed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.fx as fx

from autopar.comm import collectives  # noqa: F401  (defines the operators)
from autopar.ir.aliasing import Storage, last_writers, storages

aten = torch.ops.aten

# Of the whole. A copy takes time in proportion to the part, and frees the rest.
_LARGEST_PART = 2 / 3
# Gathered parameters are gathered again for the backward, or kept as they are.
_GATHERED: set[Any] = {torch.ops.autopar.all_gather.default}


def copy_parts(gm: fx.GraphModule, *, forward: Collection[fx.Node]) -> fx.GraphModule:
    """Copy the parts that outlive a value which they are small parts of.

    Args:
        forward: nodes that the forward computes.
    """
    where = storages(gm.graph)
    outliving: dict[Storage, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if where[node] is not None and _outlives(node, forward):
            outliving.setdefault(where[node], []).append(node)
    written = last_writers(gm.graph, where)
    parts: list[fx.Node] = []
    for storage, nodes in outliving.items():
        root = _shown(nodes[0], where)[-1]
        # the memory of arguments is not the program's, and a part of what is written later is not
        # there when it is cut
        if storage not in written and root.op == "call_function" and root.target not in _GATHERED:
            parts += _parts(nodes, where)
    if parts:
        _update_views(gm.graph, [_copied(part) for part in parts])
    return gm


def _outlives(node: fx.Node, forward: Collection[fx.Node]) -> bool:
    """Whether a value is returned, or saved for the backward."""
    in_forward = node in forward
    return isinstance(node.meta.get("val"), torch.Tensor) and any(
        user.op == "output" or (in_forward and user not in forward) for user in node.users
    )


def _parts(nodes: list[fx.Node], where: dict[fx.Node, Storage]) -> list[fx.Node]:
    """What to copy so that these views of one storage do not keep it; nothing if they are most of
    it."""
    parts = dict.fromkeys(_cut(node, where) for node in nodes)
    largest = _LARGEST_PART * nodes[0].meta["val"].untyped_storage().nbytes()
    if sum(_nbytes(part) for part in parts) > largest:
        return []
    return [part for part in parts if not any(n in parts for n in _shown(part, where)[1:])]


def _cut(node: fx.Node, where: dict[fx.Node, Storage]) -> fx.Node:
    """The first of the smallest views between a storage and a view of it."""
    return min(reversed(_shown(node, where)), key=_nbytes)


def _shown(node: fx.Node, where: dict[fx.Node, Storage]) -> list[fx.Node]:
    """A view and what it is a view of, up to its storage; lists of views left out."""
    chain = [node]
    while True:
        of = next((n for n in chain[-1].all_input_nodes if where[n] == where[node]), None)
        if of is None:
            return [n for n in chain if isinstance(n.meta.get("val"), torch.Tensor)]
        chain.append(of)


def _nbytes(node: fx.Node) -> int:
    value: torch.Tensor = node.meta["val"]
    return value.numel() * value.element_size()


def _copied(part: fx.Node) -> fx.Node:
    """A copy, which is read in the place of the part."""
    with part.graph.inserting_after(part):
        copy = part.graph.call_function(aten.clone.default, (part,))
    copy.meta = {**part.meta, "val": part.meta["val"].clone()}
    part.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
    return copy


def _update_views(graph: fx.Graph, copies: Collection[fx.Node]) -> None:
    """Let the views of copies know their strides and memory."""
    shown = {(copy, 0) for copy in copies}
    for node, storage in storages(graph).items():
        if storage in shown and node not in copies:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
