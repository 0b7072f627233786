"""Batch norm by the vendor's library, as eager PyTorch runs it."""

from __future__ import annotations

from operator import getitem

import torch
import torch.fx as fx

_OURS = torch.ops.aten._native_batch_norm_legit_functional.default
_THEIRS = torch.ops.aten._batch_norm_with_update_functional.default

# where a result of the one stands among those of the other, which has a workspace for its backward
_RESULTS = (0, 1, 2, 4, 5)


def use_library(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace batch norm in training by the operator that takes cuDNN's where that can be.

    What capturing makes of batch norm runs ATen's own kernels, which are slower. To be done before
    differentiating.
    """
    for node in gm.graph.find_nodes(op="call_function", target=_OURS):
        *given, training, momentum, eps = node.args
        parts = list(node.users)
        if node.kwargs or not training or any(n.target is not getitem for n in parts):
            continue
        with gm.graph.inserting_before(node):
            taken = gm.graph.call_function(_THEIRS, (*given, momentum, eps))
        taken.meta = {k: v for k, v in node.meta.items() if k != "val"}
        for part in parts:
            part.args = (taken, _RESULTS[part.args[1]])
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return gm
