"""What a forward writes in place besides buffers: its parameters and its inputs.

A parameter that is clamped in the forward (`self.weight.data.clamp_(-1, 1)`) changes before it is
used, and its gradient is that of the changed value. Functionalized, the change would cut the
parameter off from its gradient; it is therefore taken out of the graph, as an update to make before
the program runs. That is right if the change is element by element and made before any other use;
anything else is refused. Writes into inputs are dropped: the caller's tensors stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.fx as fx
from torch.export.graph_signature import OutputKind, OutputSpec

from autopar.errors import CaptureError
from autopar.ir.guards import Guard


def take_out_writes(
    gm: fx.GraphModule, specs: Sequence[OutputSpec], placeholders: Mapping[str, fx.Node]
) -> tuple[dict[str, fx.GraphModule], tuple[Guard, ...]]:
    """Leave buffer writes, then results, among the outputs of a program.

    Args:
        specs: what each output is.
        placeholders: by qualified parameter name.

    Returns:
        updates of parameters to make first, by name, and what was dropped.

    Raises:
        CaptureError: a parameter is written in another way.
    """
    output = gm.graph.output_node()
    values = output.args[0]
    assert isinstance(values, tuple | list)
    by_kind: dict[OutputKind, list[fx.Node]] = {}
    updates: dict[str, fx.GraphModule] = {}
    dropped: list[Guard] = []
    written: list[tuple[str, fx.Node]] = []
    for spec, value in zip(specs, values, strict=True):
        if spec.kind is OutputKind.PARAMETER_MUTATION:
            assert isinstance(value, fx.Node)
            written.append((str(spec.target), value))
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            note = "the caller's tensor stays as it is"
            dropped.append(Guard("setting", str(spec.target), "write into an input", None, note))
        else:
            by_kind.setdefault(spec.kind, []).append(value)
    kept = by_kind.pop(OutputKind.BUFFER_MUTATION, [])
    kept += by_kind.pop(OutputKind.USER_OUTPUT, [])
    assert not by_kind, f"outputs of kind {[*by_kind]}"
    output.args = (tuple(kept),)
    for name, value in written:
        updates[name] = _update(gm, name, placeholders[name], value)
        value.replace_all_uses_with(placeholders[name])
    return updates, tuple(dropped)


def _update(gm: fx.GraphModule, name: str, parameter: fx.Node, value: fx.Node) -> fx.GraphModule:
    """The change of a parameter as a program of its own."""
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
