"""Inputs that a program takes over and gives back changed, such as a cache of keys and values.

An input that is donated (JAX's word) stays on its ranks as the plan lays it out. The program writes
its result into the same memory, so that a step of generation copies no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autopar.errors import EngineError
from autopar.ir.graph import ModelGraph
from autopar.ir.spec import ShardingSpec, local_shape


class DonatedInput(torch.Tensor):
    """A tensor of which each rank holds a shard; as a tensor it is on the meta device, and has the
    global shape.

    Attributes:
        spec: its layout; None until the first program that takes it is planned.
        local: this rank's shard; None until that program runs, which finds zeros.
    """

    spec: ShardingSpec | None
    local: torch.Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, spec: ShardingSpec | None) -> DonatedInput:
        """
        Args:
            shape: global.
            spec: if it is known already.
        """
        meta = torch.empty(shape, dtype=dtype, device="meta")
        x: DonatedInput = meta.as_subclass(DonatedInput)
        x.spec, x.local = spec, None
        return x

    def held(
        self, spec: ShardingSpec, mesh: Sequence[int], coords: Sequence[int], device: torch.device
    ) -> torch.Tensor:
        """This rank's shard, as a program takes it.

        Raises:
            EngineError: the program takes another layout.
        """
        if self.local is None:
            shape = local_shape(tuple(self.shape), spec, mesh, coords)
            self.spec = spec
            self.local = torch.zeros(shape, dtype=self.dtype, device=device)
        if spec != self.spec:
            raise EngineError(
                f"a cache of shape {list(self.shape)} is laid out as {self.spec}, and the program "
                f"takes it as {spec}; begin with a new cache"
            )
        return self.local


def donated_inputs(leaves: Sequence[Any]) -> list[DonatedInput]:
    """Those among the flattened inputs of a call."""
    return [x for x in leaves if isinstance(x, DonatedInput)]


def as_examples(inputs: Any) -> Any:
    """Inputs to trace with: plain tensors, without values, in the place of donated ones."""
    return pytree.tree_map_only(DonatedInput, lambda x: x.as_subclass(torch.Tensor), inputs)


def held_layouts(tensors: Sequence[torch.Tensor]) -> tuple[ShardingSpec | None, ...] | None:
    """Layouts that inputs have already; None if none has one."""
    specs = [x.spec if isinstance(x, DonatedInput) else None for x in tensors]
    return tuple(specs) if any(spec is not None for spec in specs) else None


def lay_out_donated(tensors: Sequence[torch.Tensor], specs: Sequence[ShardingSpec]) -> None:
    """Note the layouts that a plan has for donated inputs without one.

    Args:
        specs: of all tensors of the call.
    """
    for x, spec in zip(tensors, specs, strict=True):
        if isinstance(x, DonatedInput) and x.spec is None:
            x.spec = spec


def with_donations(graph: ModelGraph, leaves: Sequence[Any]) -> ModelGraph:
    """A graph whose results `(results, [tensor, ...])` are the results alone; the tensors behind
    them take the memory of the donated inputs, in their order. `()` in the place of a tensor leaves
    an input as it is.

    Args:
        leaves: the flattened inputs.
    """
    names = [
        name
        for name, x in zip(graph.inputs, leaves, strict=True)
        if name is not None and isinstance(x, DonatedInput)
    ]
    if not names:
        return graph
    results, tensors = graph.out_spec.children()
    written = zip(names, tensors.children(), strict=True)
    names = [name for name, spec in written if spec.num_leaves]
    end = len(graph.mutations) + graph.out_spec.num_leaves
    donated = dict(zip(names, range(end - len(names), end), strict=True))
    return replace(graph, donated=donated, out_spec=results)


def take_back(
    graph: ModelGraph, leaves: Sequence[Any], results: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Let donated inputs hold the results that a run has written to them; the other results.

    Args:
        results: of the program.
    """
    for name, x in zip(graph.inputs, leaves, strict=True):
        if isinstance(x, DonatedInput) and name is not None and name in graph.donated:
            # a policy may have another dtype for results
            x.local = results[graph.donated[name]].to(x.dtype).contiguous()
    taken = set(graph.donated.values())
    return [x for k, x in enumerate(results) if k not in taken]
