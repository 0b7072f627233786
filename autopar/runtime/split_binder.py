"""Binds compiled microbatches as a step that can be called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx
from torch.distributed.device_mesh import DeviceMesh

from autopar.compiled_stages import CompiledSlice
from autopar.compiled_step import Place
from autopar.errors import PlanError
from autopar.ir.graph import ModelGraph, shape_of
from autopar.passes.cut import Crossing
from autopar.passes.microbatches import Microbatches
from autopar.progress import SILENT, Progress
from autopar.runtime.batch import BatchLayout
from autopar.runtime.bound_step import WholeResult
from autopar.runtime.pipeline_runtime import Pipeline
from autopar.runtime.result_gradients import ResultGradients
from autopar.runtime.slicing import Slicing
from autopar.runtime.split_step import SplitStep, bind_stages
from autopar.runtime.stage_parameters import StageParameters


@dataclass(frozen=True)
class SplitBinder:
    """
    Args:
        graph: of the whole batch.
        split: how it separates.
        compiled: microbatches, by samples on this rank; larger ones first.
        sizes: samples of each microbatch, on this rank.
        dims: by number of the tensor input, the dim that holds samples.
        layout: of the batch.
        trainable: placeholder names of the parameters that require grad.
        pipeline: of whose ranks this is one; None if it runs all stages.
        owners: by name of a parameter, the rank of the pipeline that has it; None if all have.
        place: of this rank, on the mesh of its stage.
        progress: is told what is compiled.
    """

    graph: ModelGraph
    split: Microbatches
    compiled: Mapping[int, CompiledSlice]
    sizes: Sequence[int]
    dims: Mapping[int, int]
    layout: BatchLayout
    trainable: frozenset[str]
    pipeline: Pipeline | None
    owners: Mapping[str, int | None]
    place: Place
    mesh: DeviceMesh
    device: torch.device
    progress: Progress = SILENT

    @property
    def _ranks(self) -> int:
        """That pass samples of their own."""
        return self.layout.cluster.world_size if self.layout.local else 1

    @property
    def _first(self) -> CompiledSlice:
        return next(iter(self.compiled.values()))

    @property
    def _outputs(self) -> Sequence[Any]:
        outputs: Any = self.graph.output.args[0]
        return outputs

    def step(self) -> SplitStep:
        """The step.

        Raises:
            PlanError: a stage reads a buffer that another one updates.
        """
        graph = self.graph
        return SplitStep(
            self._slicing(),
            {size: bind_stages(slice_, self.progress) for size, slice_ in self.compiled.items()},
            {size: slice_.programs for size, slice_ in self.compiled.items()},
            self._take,
            fixed=len(graph.parameters) + len(graph.buffers) + len(graph.constants),
            parameters=len(graph.parameters),
            takes_seed=any(slice_.local.takes_seed for slice_ in self.compiled.values()),
            draws=graph.random,
            result_gradients=ResultGradients.of(graph, self.trainable),
            differentiable=self.differentiable,
            device=self.device,
            carried=self._carried(),
            plain={k: x for k, x in enumerate(self._outputs) if not isinstance(x, fx.Node)},
            pipeline=self.pipeline,
            parameters_of_stages=self._parameters(),
            stage_of_result=self._first.stage_of_result,
            results_like=self._results_like(),
            late=frozenset(self.whole_results),
            expected=self._loss_gradient(),
        )

    def _slicing(self) -> Slicing:
        layout = self.layout

        def gather(k: int, x: torch.Tensor) -> torch.Tensor:
            return layout.gather(layout.inputs[k].position, x)

        return Slicing(
            tuple(self.sizes),
            tuple(self.dims.get(k) for k in range(len(layout.inputs))),
            self.split.whole,
            self.split.whole_states,
            self.split.results,
            gather if layout.local else None,
            self.place.number(layout.cluster.mesh) if layout.local else 0,
            self._ranks,
        )

    def _take(self, size: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's part of the inputs of a microbatch."""
        specs = self.compiled[size].local.input_specs
        return self.layout.take(tensors, specs, self.mesh, self.place.coords, self.device)

    def _carried(self) -> dict[int, int]:
        """By position of a result that each microbatch hands to the next, that of the buffer among
        the arguments."""
        parameters, buffers = len(self.graph.parameters), list(self.graph.buffers)
        carried = {}
        for k, name in enumerate(self.graph.mutated_in_order):
            if self.split.results[k] == "C":
                carried[k] = parameters + buffers.index(name)
                self._check_readers(k, carried[k])
        return carried

    def _check_readers(self, result: int, position: int) -> None:
        for stage, program in enumerate(self._first.programs):
            if position in program.others and result not in program.results:
                raise PlanError(
                    f"stage {stage} reads buffer {self.graph.mutations[result]}, which another "
                    "stage updates in every microbatch; begin stages elsewhere (stages=), so that "
                    "one has all that uses it, or use fewer stages"
                )

    @cached_property
    def differentiable(self) -> list[bool]:
        """Whether each result carries a gradient, on any rank."""
        flags = [False] * len(self.split.results)
        for stage in self._first.stages.values():
            for k, result in zip(stage.program.results, stage.body.results, strict=False):
                flags[k] = result.differentiable
        return self.place.ranks.united(flags)

    @cached_property
    def whole_results(self) -> dict[int, WholeResult]:
        """Results that the caller gathers: each microbatch's part by itself."""
        results = {}
        for k, spec in self._first.local.deferred.items():
            fake, state, owner = self._outputs[k].meta["val"], self.split.results[k], None
            if self.pipeline is not None:
                owner = self.pipeline.schedule.rank_of_stage[self._first.stage_of_result[k]]
            if state is None or (owner is None and not any(spec.dims)):
                continue
            dim, rows = None, ()
            if state[0] == "S":
                dim = int(state[1:])
                each = fake.shape[dim] // (sum(self.sizes) * self._ranks)
                rows = tuple(each * size * self._ranks for size in self.sizes)
            results[k] = WholeResult(spec, shape_of(fake), fake.stride(), dim, rows, owner)
        return results

    def _results_like(self) -> dict[int, Crossing]:
        """By position, results of the batch, as a rank has them; without those that are no
        tensors."""
        likes = {}
        for k, value in enumerate(self._outputs):
            if isinstance(value, fx.Node):
                fake, shape = value.meta["val"], tuple(shape_of(value.meta["val"]))
                if k in self.whole_results:
                    mesh = self.layout.cluster.of_a_stage().mesh
                    shape = tuple(self.whole_results[k].local_shape(mesh, self.place.coords))
                likes[k] = Crossing(shape, fake.dtype, self.device, False)
        return likes

    def _parameters(self) -> StageParameters:
        """Where they are."""
        if self.pipeline is None:
            return StageParameters()
        nodes = self._first.local.gm.graph.find_nodes(op="placeholder")
        rank_of = self.pipeline.schedule.rank_of_stage
        names = self.graph.parameters
        return StageParameters(
            {k: self.owners.get(name) for k, name in enumerate(names.values())},
            {k: frozenset(rank_of[s] for s in stages) for k, stages in self._first.users.items()},
            {
                k: Crossing(
                    tuple(node.meta["local_shape"]), self.graph.storage_dtype(name), self.device,
                    name in self.trainable,
                )
                for k, (name, node) in enumerate(zip(names, nodes, strict=False))
            },
        )  # fmt: skip

    def _loss_gradient(self) -> dict[int, torch.Tensor] | None:
        """The gradients that `backward()` brings most likely: 1 for the first result that is a
        number. With half precision the loss will be scaled, and gradients for 1 could vanish."""
        values = [n.meta["val"] for n in self.graph.placeholders.values() if "val" in n.meta]
        if any(isinstance(v, torch.Tensor) and v.dtype is torch.float16 for v in values):
            return None
        for k, differentiable in enumerate(self.differentiable):
            if differentiable and k >= len(self.graph.mutations):
                fake = self._outputs[k].meta["val"]
                if fake.ndim == 0:
                    return {k: torch.ones((), dtype=fake.dtype, device=fake.device)}
        return None
