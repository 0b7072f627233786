"""Linear layers on CPUs by oneDNN, which adds the bias inside the product.

ATen copies the bias into every row of the result and adds the product to it.

`mkldnn::_linear_pointwise`, which Inductor also calls, is private to torch (tested with 2.11 and
2.13).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten


def add_bias_within(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace `addmm(bias, x, weight.t())` in float32 on CPUs, in place; results may differ in
    rounding."""
    linear = linear_operator()
    if linear is None:
        return gm
    for node in gm.graph.find_nodes(op="call_function", target=aten.addmm.default):
        bias, x, transposed = node.args
        if node.kwargs or transposed.target is not aten.t.default:
            continue
        (weight,) = transposed.args
        if bias.meta["val"].ndim == 1 and all(map(_is_plain, (node, bias, x, weight))):
            node.target, node.args = linear, (x, weight, bias, "none", [], "")
            if not transposed.users:
                gm.graph.erase_node(transposed)
    return gm


def _is_plain(node: fx.Node) -> bool:
    """Whether the kernel takes the value without a copy."""
    value = node.meta["val"]
    return (
        value.device.type == "cpu"
        and value.dtype is torch.float32
        and value.is_contiguous()
        and value.numel() > 0
    )


@functools.cache
def linear_operator() -> Any:
    """The operator; None if torch was built without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return getattr(packet, "default", None)
