"""Views, and which of them change nothing: autograd's own, around every product and parameter."""

from __future__ import annotations

import torch
import torch.fx as fx

_ATEN = torch.ops.aten
_VIEWS = {_ATEN.view.default, _ATEN.detach.default, _ATEN.t.default}


def drop_views(gm: fx.GraphModule) -> fx.GraphModule:
    """Read the operand in the place of a view that has its shape and strides, and of a transpose of
    a transpose. What is returned stays the tensor that it was, as callers know what it is a view
    of.
    """
    graph = gm.graph
    for node in graph.nodes:
        source = _same(node)
        if source is not None:
            node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output")
    for node in reversed(graph.nodes):
        if node.target in _VIEWS and not node.users:
            graph.erase_node(node)
    return gm


def _same(node: fx.Node) -> fx.Node | None:
    """What a node shows as it is."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is _ATEN.t.default and source.target is _ATEN.t.default:
        return source.args[0]  # type: ignore[return-value]
    if node.target not in _VIEWS:
        return None
    value, of = node.meta["val"], source.meta["val"]
    same = value.shape == of.shape and value.stride() == of.stride()
    return source if same else None
