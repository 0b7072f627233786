"""A compiled step with what it needs to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.comm.stored_layout import pipe_axis
from autopar.compiled_step import CompiledStep
from autopar.ir.graph import shape_of
from autopar.ir.spec import ShardingSpec, local_range
from autopar.runtime.assumptions import Assumptions
from autopar.runtime.batch import BatchLayout


@dataclass(frozen=True)
class WholeResult:
    """A result that the caller gathers when it reads it, as it is then.

    Args:
        spec: layout in which the program gives it.
        dim: along which it is in parts, one per microbatch; None if it is one.
        parts: global extents of these.
        owner: the coordinate on the pipe axis whose ranks have it; None if all have.
    """

    spec: ShardingSpec
    shape: Sequence[int]
    stride: Sequence[int]
    dim: int | None = None
    parts: Sequence[int] = ()
    owner: int | None = None

    def gather(self, local: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        """The whole of it, from what this rank has."""
        if self.owner is not None:
            shared = _FromOwner.apply(local, self.owner, mesh)
            return replace(self, owner=None).gather(shared, mesh)
        if self.dim is None:
            return self.sharded(local, mesh).full_tensor()
        sizes, coords = tuple(mesh.shape), mesh.get_coordinate()
        assert coords is not None, "the mesh is over all processes"
        axes = self.spec.dims[self.dim]
        own = [local_range(extent, axes, sizes, coords)[1] for extent in self.parts]
        whole = []
        for extent, part in zip(self.parts, local.split(own, self.dim), strict=True):
            shape = [extent if d == self.dim else n for d, n in enumerate(self.shape)]
            stride = torch.empty(shape, device="meta").stride()
            one = replace(self, shape=shape, stride=stride, dim=None)
            whole.append(one.gather(part.contiguous(), mesh))
        return torch.cat(whole, self.dim)

    def local_shape(self, mesh: Sequence[int], coords: Sequence[int]) -> list[int]:
        """Of what a rank has."""
        return [
            sum(local_range(extent, axes, mesh, coords)[1] for extent in parts)
            for parts, axes in zip(
                (self.parts if d == self.dim else (n,) for d, n in enumerate(self.shape)),
                self.spec.dims,
                strict=True,
            )
        ]

    def sharded(self, local: torch.Tensor, mesh: DeviceMesh) -> DTensor:
        """What this rank has, as a DTensor."""
        return DTensor.from_local(
            local, mesh, self.spec.to_placements(mesh.ndim), run_check=False,
            shape=torch.Size(self.shape), stride=tuple(self.stride),
        )  # fmt: skip


class _FromOwner(torch.autograd.Function):
    """What the ranks of one coordinate on the pipe axis have, on all of them.

    Ranks compute the same loss of it, so each has the gradient already.
    """

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, owner: int, mesh: DeviceMesh) -> torch.Tensor:
        axis = pipe_axis(mesh)
        assert axis is not None, "only stages own results"
        shared = local.contiguous()
        if mesh.get_local_rank(axis) != owner:
            shared = torch.empty_like(shared)
        if shared.numel():
            dist.broadcast(shared, group=mesh.get_group(axis), group_src=owner)
        return shared

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad, None, None


@dataclass(frozen=True)
class BoundStep:
    """
    Args:
        number: of steps compiled before it.
        compiled: for one shape of inputs, one mode, and the values that its guards allow.
        train: runs it, with gradients.
        evaluate: runs its forward without gradients.
        layout: of its batches.
        parameters: in the order of the program, as their modules hold them.
        assumptions: about the model, under which it may run.
        reads_hold: whether what the forward read of the model is as it was.
        feeding: positions of results from which others are computed.
        whole_results: those that are gathered when they are read, by position.
        split: it runs in microbatches, and takes its parts of the whole batch itself.
    """

    number: int
    compiled: CompiledStep
    train: Callable[..., Any]
    evaluate: Callable[..., Any]
    layout: BatchLayout
    parameters: Sequence[tuple[torch.nn.Module, str]]
    assumptions: Assumptions
    reads_hold: Callable[[], bool]
    feeding: frozenset[int]
    whole_results: Mapping[int, WholeResult]
    split: bool = False

    @property
    def compiles(self) -> bool:
        """Whether Inductor runs it."""
        lowered = self.compiled.lowered
        return lowered is not None and bool(lowered.compile)

    @property
    def offloads_parameters(self) -> bool:
        memory = self.compiled.memory
        return memory is not None and bool(memory.parameters_on_host)

    @property
    def offloads_state(self) -> bool:
        memory = self.compiled.memory
        return memory is not None and memory.state_on_host


def whole_results(compiled: CompiledStep) -> dict[int, WholeResult]:
    """Of a compiled step; those that are whole already are left out."""
    outputs: Any = compiled.graph.output.args[0]
    fakes = {k: outputs[k].meta["val"] for k in compiled.local.deferred}
    return {
        k: WholeResult(spec, shape_of(fakes[k]), fakes[k].stride())
        for k, spec in compiled.local.deferred.items()
        if any(spec.dims)
    }
