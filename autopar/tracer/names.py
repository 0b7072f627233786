"""Parameters and buffers with names that a graph module has for itself (`code`, `graph`, `meta`).

The second trace of a program puts them into a `GraphModule`, which refuses such names. So they get
other names for its duration.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.fx as fx

_RESERVED = frozenset(dir(fx.GraphModule(torch.nn.Module(), fx.Graph())))


def retraced(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program after functionalization by a second trace, without decompositions."""
    names = {str(spec.target) for spec in program.graph_signature.input_specs if spec.target}
    given = {n: f"autopar_{n}" for n in names if n.partition(".")[0] in _RESERVED}
    _rename(program, given)
    program = program.run_decompositions({})
    _rename(program, {new: old for old, new in given.items()})
    return program


def _rename(program: torch.export.ExportedProgram, names: Mapping[str, str]) -> None:
    """Rename tensors of a program in place."""
    for tensors in (program.state_dict, program.constants):
        for old in [n for n in tensors if n in names]:
            tensors[names[old]] = tensors.pop(old)
    signature = program.graph_signature
    for spec in (*signature.input_specs, *signature.output_specs):
        if spec.target in names:
            spec.target = names[spec.target]
