"""Which operator calls draw random numbers."""

from __future__ import annotations

import torch
import torch.fx as fx


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers: tagged so, and not a dropout that is off."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    names = [a.name for a in op._schema.arguments]
    given = defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if "dropout" in op._opname or "dropout_p" in given:
        off = given.get("dropout_p", given.get("p")) == 0
        return not off and given.get("train", given.get("training", True)) is not False
    return True
