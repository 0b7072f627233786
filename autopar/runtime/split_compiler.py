"""Compiles a call of a model as a step that runs in microbatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from autopar.compile import apply_plan
from autopar.compiled_stages import CompiledSlice, compile_stages
from autopar.compiled_step import Arguments, CompiledStep, Place, StepOptions, StepPlan
from autopar.errors import EngineError
from autopar.ir.graph import ModelGraph, shape_of
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import LocalProgram
from autopar.passes.microbatches import (
    Microbatches,
    exact_microbatches,
    independent_microbatches,
)
from autopar.plan import ShardingPlan
from autopar.planner.decisions import FixedLayouts
from autopar.runtime.batch import BatchDim, BatchLayout
from autopar.runtime.bound_step import WholeResult
from autopar.runtime.call import Call
from autopar.runtime.result_gradients import ResultGradients
from autopar.runtime.slicing import Slicing, batch_dims, even_sizes
from autopar.runtime.split_step import SplitStep, bind_stages


@dataclass(frozen=True)
class SplitCompiler:
    """
    Args:
        count: of microbatches.
        independent: each is a batch of its own.
        batch_dim: of the inputs, where all ranks pass the same batch.
        decide: the plan of a microbatch, with layouts that are fixed, and a step whose plan serves
            if it can; on rank 0.
        example: tensors that a program of a microbatch is called with.
        trace: captures the model for a call.
    """

    count: int
    independent: bool
    batch_dim: BatchDim
    place: Place
    mesh: DeviceMesh
    device: torch.device
    options: StepOptions
    decide: Callable[[ModelGraph, FixedLayouts, CompiledStep | None], StepPlan]
    example: Callable[[ShardingPlan, ModelGraph, LocalProgram], Arguments]
    trace: Callable[[Call], ModelGraph]

    def compile(
        self,
        call: Call,
        layout: BatchLayout,
        graph: ModelGraph,
        trainable: frozenset[str],
        parameters: Mapping[str, ShardingSpec],
    ) -> tuple[CompiledStep, SplitStep, dict[int, WholeResult]]:
        """Compile the step of a call.

        Args:
            graph: of the call.
            trainable: placeholder names of the parameters that require grad.
            parameters: layouts that are fixed, by name.

        Raises:
            NotSeparableError: the batch cannot be split exactly.
            EngineError: there are fewer samples than microbatches.
        """
        samples, dims = self._dims(layout)
        if samples < self.count:
            raise EngineError(
                f"{self.count} microbatches of a batch of {samples} samples"
                f"{' on each rank' if layout.local else ''}: some would be empty; pass "
                "microbatches= of at most that, or larger batches"
            )
        if any(x.requires_grad for x in call.tensors):
            raise EngineError(
                "an input of the model requires grad, and its gradient does not come out of "
                "microbatches; detach the input, or pass microbatches=1"
            )
        ranks = layout.cluster.world_size if layout.local else 1
        sizes = even_sizes(samples, self.count)
        split = self._split(call, graph, trainable, dims, samples * ranks, sizes, ranks)
        compiled: dict[int, CompiledSlice] = {}
        first: CompiledStep | None = None
        for size in sorted(set(sizes), reverse=True):
            slice_ = split.graphs[size * ranks]
            fixed = self._fixed(layout, slice_, split, parameters)
            plan, local = apply_plan(
                slice_, partial(self.decide, slice_, fixed, first), self.place, self.options,
                trainable=trainable, output_specs=fixed.outputs,
            )  # fmt: skip
            called_with = self.example(plan, slice_, local)
            stages = compile_stages(slice_, plan, local, called_with, self.place, self.options)
            compiled[size] = stages
            if first is None:
                stage = stages.stages[0]
                first = CompiledStep(graph, plan, local, stage.body, stage.memory)
        assert first is not None
        step = self._step(graph, layout, split, compiled, sizes, dims, trainable, ranks)
        return first, step, self._whole_results(graph, split, compiled, sizes, ranks)

    def _dims(self, layout: BatchLayout) -> tuple[int, dict[int, int]]:
        """Samples on this rank, and by number of the tensor input the dim that holds them."""
        if layout.local:
            dims = {k: x.dim for k, x in enumerate(layout.inputs) if x.dim is not None}
            return layout.samples or 0, dims
        names = [x.name for x in layout.inputs]
        return batch_dims(names, [x.shape for x in layout.inputs], self.batch_dim)

    def _split(
        self, call: Call, graph: ModelGraph, trainable: frozenset[str], dims: Mapping[int, int],
        samples: int, sizes: Sequence[int], ranks: int,
    ) -> Microbatches:  # fmt: skip
        names = [n for n in graph.inputs if n is not None]
        of_all = [size * ranks for size in sizes]
        if not self.independent:
            of_inputs = {names[k]: dim for k, dim in dims.items()}
            return self.place.ranks.together(
                lambda: exact_microbatches(graph, of_inputs, samples, of_all, trainable)
            )

        def trace(size: int) -> ModelGraph:
            tensors = iter(enumerate(call.tensors))

            def part(x: torch.Tensor) -> torch.Tensor:
                k, _ = next(tensors)
                return x.narrow(dims[k], 0, size // ranks) if k in dims else x

            args, kwargs = pytree.tree_map_only(torch.Tensor, part, call.inputs)
            return self.trace(Call.of(args, kwargs))

        return independent_microbatches(graph, of_all, trace)

    def _fixed(
        self, layout: BatchLayout, graph: ModelGraph, split: Microbatches,
        parameters: Mapping[str, ShardingSpec],
    ) -> FixedLayouts:  # fmt: skip
        """Layouts of a microbatch: with batches of each rank's own, slices stay with their rank."""
        own = layout.fixed_inputs()
        if own is None:
            return FixedLayouts(parameters=parameters)
        shapes = [shape_of(graph.placeholders[n].meta["val"]) for n in graph.inputs if n]
        whole = zip(shapes[len(own) :], split.whole_states, strict=True)
        inputs = (*own, *(layout.split_by_state(shape, state) for shape, state in whole))
        pairs = zip(graph.output.args[0], split.results, strict=True)  # type: ignore[arg-type]
        outputs = [
            layout.split_by_state(shape_of(value.meta["val"]), state)
            for value, state in list(pairs)[len(graph.mutations) :]
            if state is not None
        ]
        return FixedLayouts(parameters=parameters, inputs=inputs, outputs=tuple(outputs))

    def _step(
        self, graph: ModelGraph, layout: BatchLayout, split: Microbatches,
        compiled: Mapping[int, CompiledSlice], sizes: Sequence[int], dims: Mapping[int, int],
        trainable: frozenset[str], ranks: int,
    ) -> SplitStep:  # fmt: skip
        coords = self.place.coords

        def take(size: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            specs = compiled[size].local.input_specs
            return layout.take(tensors, specs, self.mesh, coords, self.device)

        def gather(k: int, x: torch.Tensor) -> torch.Tensor:
            return layout.gather(layout.inputs[k].position, x)

        slicing = Slicing(
            tuple(sizes),
            tuple(dims.get(k) for k in range(len(layout.inputs))),
            split.whole,
            split.whole_states,
            split.results,
            gather if layout.local else None,
            self.place.number(layout.cluster.mesh) if layout.local else 0,
            ranks,
        )
        parameters, buffers = list(graph.parameters), list(graph.buffers)
        carried = {
            len(parameters) + buffers.index(name): k
            for k, name in enumerate(graph.mutated_in_order)
            if split.results[k] == "C"
        }
        step = SplitStep(
            slicing,
            {size: bind_stages(slice_) for size, slice_ in compiled.items()},
            take,
            fixed=len(parameters) + len(buffers) + len(graph.constants),
            parameters=len(parameters),
            takes_seed=any(slice_.local.takes_seed for slice_ in compiled.values()),
            draws=graph.random,
            result_gradients=ResultGradients.of(graph, trainable),
            carried=carried,
        )
        return replace(step, expected=_loss(graph, step))

    def _whole_results(
        self, graph: ModelGraph, split: Microbatches, compiled: Mapping[int, CompiledSlice],
        sizes: Sequence[int], ranks: int,
    ) -> dict[int, WholeResult]:  # fmt: skip
        """Results that the caller gathers: each microbatch's part by itself."""
        outputs = graph.output.args[0]
        results = {}
        for k, spec in next(iter(compiled.values())).local.deferred.items():
            fake = outputs[k].meta["val"]  # type: ignore[index, union-attr]
            state = split.results[k]
            if not any(spec.dims) or state is None:
                continue
            dim, rows = None, ()
            if state[0] == "S":
                dim = int(state[1:])
                each = fake.shape[dim] // (sum(sizes) * ranks)
                rows = tuple(each * size * ranks for size in sizes)
            results[k] = WholeResult(spec, shape_of(fake), fake.stride(), dim, rows)
        return results


def _loss(graph: ModelGraph, step: SplitStep) -> dict[int, torch.Tensor] | None:
    """The gradients that `backward()` brings most likely: 1 for the first result that is a number.
    With half precision the loss will be scaled, and gradients for 1 could vanish."""
    values = [n.meta["val"] for n in graph.placeholders.values() if "val" in n.meta]
    if any(isinstance(v, torch.Tensor) and v.dtype is torch.float16 for v in values):
        return None
    outputs = graph.output.args[0]
    for k, differentiable in enumerate(step.differentiable()):
        if differentiable and k >= len(graph.mutations):
            fake = outputs[k].meta["val"]  # type: ignore[index, union-attr]
            if fake.ndim == 0:
                return {k: torch.ones((), dtype=fake.dtype, device=fake.device)}
    return None
