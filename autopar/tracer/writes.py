"""In-place writes of a forward into parameters and inputs.

A forward may clamp a parameter (`self.weight.data.clamp_(-1, 1)`) before it uses it; the gradient
is that of the clamped value. Functionalization would disconnect the parameter from its gradient. So
the change leaves the graph and becomes an update that runs before the program. This is correct if
the change is pointwise and comes before any other use; other writes are refused. Writes into inputs
are effects (`arguments.py`), and leave the graph here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.fx as fx
from torch.export.graph_signature import OutputKind, OutputSpec

from autopar.errors import CaptureError


def take_out_writes(
    gm: fx.GraphModule, specs: Sequence[OutputSpec], placeholders: Mapping[str, fx.Node]
) -> dict[str, fx.GraphModule]:
    """Remove all outputs of a program except buffer writes and results, in this order.

    Args:
        specs: of the outputs.
        placeholders: by qualified parameter name.

    Returns:
        updates of parameters by name.

    Raises:
        CaptureError: the forward writes into a parameter in another way.
    """
    output = gm.graph.output_node()
    values = output.args[0]
    assert isinstance(values, tuple | list)
    by_kind: dict[OutputKind, list[fx.Node]] = {}
    updates: dict[str, fx.GraphModule] = {}
    written: list[tuple[str, fx.Node]] = []
    for spec, value in zip(specs, values, strict=True):
        if spec.kind is OutputKind.PARAMETER_MUTATION:
            assert isinstance(value, fx.Node)
            written.append((str(spec.target), value))
        elif spec.kind is not OutputKind.USER_INPUT_MUTATION:
            by_kind.setdefault(spec.kind, []).append(value)
    remaining = by_kind.pop(OutputKind.BUFFER_MUTATION, [])
    remaining += by_kind.pop(OutputKind.USER_OUTPUT, [])
    assert not by_kind, f"outputs of kind {[*by_kind]}"
    output.args = (tuple(remaining),)
    for name, value in written:
        updates[name] = _update(gm, name, placeholders[name], value)
        value.replace_all_uses_with(placeholders[name])
    return updates


def _update(gm: fx.GraphModule, name: str, parameter: fx.Node, value: fx.Node) -> fx.GraphModule:
    """The change of a parameter as a separate program."""
    frontier = [value]
    chain: set[fx.Node] = set()
    while frontier:
        node = frontier.pop()
        if node is parameter or node in chain:
            continue
        op = node.target
        plain = isinstance(op, torch._ops.OpOverload) and (
            torch.Tag.pointwise in op.tags or op._opname in ("detach", "clone", "alias")
        )
        if not plain:
            raise CaptureError(
                f"the forward writes into its parameter {name} what depends on more than that "
                f"parameter ({node.target}); write it outside of the forward, under torch.no_grad()"
            )
        chain.add(node)
        frontier += node.all_input_nodes
    if not set(parameter.users) <= chain:
        raise CaptureError(
            f"the forward uses its parameter {name} and then writes into it; write before the "
            "first use, or outside of the forward"
        )
    graph = fx.Graph()
    copies = {parameter: graph.placeholder("parameter")}
    for node in gm.graph.nodes:
        if node in chain:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
    graph.output(copies[value])
    return fx.GraphModule(torch.nn.Module(), graph)
