"""Buffers that a model has under several names: those of a module that is used under two names, and
a tensor that is registered twice. A graph has each of them once, by its first name."""

from __future__ import annotations

from collections import Counter

import torch
from torch.export.graph_signature import InputKind, OutputKind

from autopar.errors import CaptureError


def merge_shared_buffers(program: torch.export.ExportedProgram, model: torch.nn.Module) -> None:
    """Merge the placeholders of each buffer of an exported program, which has one per name."""
    first = {id(b): n for n, b in model.named_buffers()}
    names = {n: first[id(b)] for n, b in model.named_buffers(remove_duplicate=False)}
    graph, signature = program.graph_module.graph, program.graph_signature
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    of_buffers = {
        str(spec.target): placeholders[spec.arg.name]
        for spec in signature.input_specs
        if spec.kind is InputKind.BUFFER
    }
    merged = {n for n in of_buffers if names.get(n, n) != n and names[n] in of_buffers}
    for name in merged:
        of_buffers[name].replace_all_uses_with(of_buffers[names[name]])
        graph.erase_node(of_buffers[name])
    signature.input_specs[:] = [s for s in signature.input_specs if s.target not in merged]


def refuse_changes(program: torch.export.ExportedProgram, model: torch.nn.Module) -> None:
    """Refuse a forward that changes a buffer which is registered twice: whether it writes to the
    tensor or gives one name another tensor, a graph does not say.

    Raises:
        CaptureError: naming the buffer.
    """
    counts = Counter(id(b) for m in model.modules() for b in m._buffers.values() if b is not None)
    twice = {n for n, b in model.named_buffers() if counts[id(b)] > 1}
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION and spec.target in twice:
            tensor = dict(model.named_buffers())[str(spec.target)]
            found = model.named_buffers(remove_duplicate=False)
            names = ", ".join(n for n, b in found if b is tensor)
            raise CaptureError(
                f"the forward of {type(model).__name__} changes a buffer that is registered more "
                f"than once ({names}); register it once, and refer to it by that name"
            )
