"""Which operator calls draw random numbers, and how unused draws survive dead-code elimination."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

_ASSERT = torch.ops.aten._assert_tensor_metadata.default


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers: its operator is tagged so, and it is no disabled
    dropout."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    names = [a.name for a in op._schema.arguments]
    arguments = defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if "dropout" in op._opname or "dropout_p" in arguments:
        off = arguments.get("dropout_p", arguments.get("p")) == 0
        return not off and arguments.get("train", arguments.get("training", True)) is not False
    return True


def keep_draws(gm: fx.GraphModule) -> None:
    """Keep draws that no result depends on.

    Export would drop them as dead code, and all later draws would differ from eager PyTorch's. An
    empty assertion uses each of them.
    """
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        used: set[fx.Node] = set()
        for node in reversed(module.graph.nodes):
            if node.op == "output" or node in used:
                used |= {*node.all_input_nodes}
            elif draws(node):
                used |= {*node.all_input_nodes}
                drawn = node
                if not isinstance(node.meta["val"], torch.Tensor):
                    with module.graph.inserting_after(node):
                        drawn = module.graph.call_function(operator.getitem, (node, 0))
                with module.graph.inserting_after(drawn):
                    module.graph.call_function(_ASSERT, (drawn, None, None, None))
        module.recompile()
