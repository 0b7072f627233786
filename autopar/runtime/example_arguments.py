"""Arguments like those that a rank's program will be called with."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.ir.graph import ModelGraph
from autopar.passes.apply_sharding import LocalProgram
from autopar.runtime.batch import BatchLayout


def example_arguments(
    model: torch.nn.Module,
    graph: ModelGraph,
    program: LocalProgram,
    layout: BatchLayout,
    coords: tuple[int, ...],
    device: torch.device,
    differentiated: frozenset[str] = frozenset(),
    trains: bool = True,
) -> list[torch.Tensor]:
    """Parameters' shards, buffers, constants and parts of the batch, as a program takes them.

    Args:
        coords: of the rank in the mesh.
        differentiated: names of inputs that take a gradient.
        trains: parameters do.
    """
    parameters: dict[str, Any] = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    nodes = program.gm.graph.find_nodes(op="placeholder")
    example = [
        _like(parameters[n], node, trains)
        for n, node in zip(graph.parameters.values(), nodes, strict=False)
    ]
    example += [buffers[n] for n in graph.buffers.values()]
    example += [t.to(device) for t in graph.constants.values()]
    inputs = layout.example_shards(graph, program.input_specs, coords, device)
    names = (n for n in graph.inputs if n is not None)
    example += [
        x.requires_grad_(name in differentiated) for name, x in zip(names, inputs, strict=True)
    ]
    if program.takes_seed:
        example.append(torch.zeros((), dtype=torch.int64))
    return example


def _like(p: Any, node: fx.Node, trains: bool) -> torch.Tensor:
    """A tensor like a parameter's shard, also where another rank of the pipeline has it. It has no
    memory: whoever keeps it would keep that of the shard."""
    local = p._local_tensor
    with FakeTensorMode():
        if tuple(local.shape) == tuple(node.meta["local_shape"]):
            like = torch.empty_strided(
                local.size(), local.stride(), dtype=local.dtype, device=local.device
            )
        else:
            like = torch.empty(node.meta["local_shape"], dtype=local.dtype, device=local.device)
    return like.requires_grad_(trains and p.requires_grad)
