"""Collectives in a graph: which nodes they are, and their predicted time."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from autopar.cluster.cluster import ClusterInfo
from autopar.comm import async_collectives  # noqa: F401  (defines the operators)
from autopar.comm.groups import find_group
from autopar.ir.aliasing import tensors_of


def communicates(node: fx.Node) -> bool:
    """Whether a node is a collective, or a half of one."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "autopar"
        and any(a.name == "group" for a in target._schema.arguments)
    )


# Starts of sums that compute does not wait for (`autopar/passes/async_sums.py`): only their launch
# takes time.
STARTS = {torch.ops.autopar.start_all_reduce.default}


def communication_us(node: fx.Node, operands: Any, results: Any, cluster: ClusterInfo) -> float:
    """Predicted time of a collective on the link of its group's axis, in microseconds.

    Args:
        operands, results: its tensors on this rank; the larger side is the unsplit one.
    """
    if node.target in STARTS:
        return cluster.device.launch_us
    name = next(
        value
        for value, argument in zip(node.args, node.target._schema.arguments, strict=False)  # type: ignore[union-attr]
        if argument.name == "group"
    )
    nbytes = max(
        sum(t.numel() * t.element_size() for t in tensors_of(side)) for side in (operands, results)
    )
    kind = node.target._opname.removesuffix("_many")  # type: ignore[union-attr]
    group = find_group(str(name))
    assert group.axis is not None, "only sums that nothing waits for are over all ranks"
    link = cluster.links[group.axis]
    return cluster.device.launch_us + float(link.collective_us(kind, group.size, nbytes))


# Weights, and their gradients, up to this size share messages (`passes/bucket.py`). For larger
# ones, copying into the message and out of it costs more than a message of their own.
BUCKET_MEMBER_BYTES = 2**20
# Nothing waits for sums up to this size if the program only returns them (`passes/async_sums.py`).
ASYNC_SUM_BYTES = 1024
