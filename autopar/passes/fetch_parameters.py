"""Parameters whose place between steps is the host are fetched to the device where they are first
used; their gradients are stored on the host.

A fetch is an operator like the gather of a sharded parameter: a schedule keeps its result, or
fetches again, and starts it ahead of its use.
"""

from __future__ import annotations

from collections.abc import Collection

import torch.fx as fx

from autopar.comm.host_copies import fetched


def fetch_parameters(
    gm: fx.GraphModule, *, parameters: Collection[int], device_type: str
) -> fx.GraphModule:
    """Fetch the arguments at these positions.

    Args:
        device_type: of the device that computes.
    """
    graph = gm.graph
    placeholders = graph.find_nodes(op="placeholder")
    order = {node: k for k, node in enumerate(graph.nodes)}
    for k in sorted(parameters):
        node = placeholders[k]
        users = [user for user in node.users if user.op != "output"]
        if not users or any(user.target is fetched for user in users):
            continue
        with graph.inserting_before(min(users, key=order.__getitem__)):
            new = graph.call_function(fetched, (node, device_type))
        new.meta = {key: value for key, value in node.meta.items() if key in ("val", "local_shape")}
        node.replace_all_uses_with(new, lambda user, new=new: user is not new)
    return gm
