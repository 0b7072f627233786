"""Batch norm by the vendor's library, as eager PyTorch runs it."""

from __future__ import annotations

from operator import getitem

import torch
import torch.fx as fx

_CAPTURED = torch.ops.aten._native_batch_norm_legit_functional.default
_LIBRARY = torch.ops.aten._batch_norm_with_update_functional.default

# position of each captured result among the library operator's, which include a workspace
_RESULTS = (0, 1, 2, 4, 5)


def use_library(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace batch norm in training by the operator that can use cuDNN.

    The captured operator runs ATen's own kernels, which are slower. Run this pass before autograd.
    """
    for node in gm.graph.find_nodes(op="call_function", target=_CAPTURED):
        *tensors, training, momentum, eps = node.args
        parts = list(node.users)
        if node.kwargs or not training or any(n.target is not getitem for n in parts):
            continue
        with gm.graph.inserting_before(node):
            library = gm.graph.call_function(_LIBRARY, (*tensors, momentum, eps))
        library.meta = {k: v for k, v in node.meta.items() if k != "val"}
        for part in parts:
            part.args = (library, _RESULTS[part.args[1]])
        gm.graph.erase_node(node)
    return gm
