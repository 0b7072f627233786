"""A step that runs in slices of the batch: what it consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autopar.compiled_stages import CompiledSlice, CompiledStage
from autopar.passes.accumulate import adding_backward
from autopar.passes.cut import Crossing, StageProgram
from autopar.progress import SILENT, Progress
from autopar.runtime.pipeline_runtime import Pipeline
from autopar.runtime.program import Boxed, Program, bind, boxed
from autopar.runtime.result_gradients import ResultGradients
from autopar.runtime.slicing import Slicing
from autopar.runtime.stage_parameters import StageParameters


@dataclass(frozen=True)
class Adding:
    """What computes gradients of parameters from the second slice on.

    Args:
        run: takes totals behind its other arguments, and adds to them.
        totals: positions of these among the gradients.
    """

    run: Boxed
    totals: tuple[int, ...]


@dataclass(frozen=True)
class BoundStage:
    """A compiled stage that can be called."""

    program: StageProgram
    enter: Program | None
    body: Program
    adding: Adding | None = None


def bind_stages(compiled: CompiledSlice, progress: Progress = SILENT) -> dict[int, BoundStage]:
    """Make the stages of a rank callable."""
    return {
        number: BoundStage(
            stage.program,
            None if stage.enter is None else bind(stage.enter, progress=progress),
            bind(stage.body, progress=progress),
            _adding(stage),
        )
        for number, stage in compiled.stages.items()
    }


def _adding(stage: CompiledStage) -> Adding | None:
    program, body = stage.program, stage.body
    last = body.backward if body.weights is None else body.weights
    if last is None or body.compile:
        return None
    taken = len(program.body.graph.find_nodes(op="placeholder"))
    added = adding_backward(last, taken - len(program.others) - len(program.received))
    return None if added is None else Adding(boxed(added[0]), added[1])


# Gradients of results, by their positions.
Tangents = Mapping[int, torch.Tensor]


@dataclass
class SplitStep:
    """A step that runs in slices. `split_function.py` calls it.

    Args:
        slicing: of the batch.
        stages: those of this rank, by the size of a slice and by number.
        programs: of all stages, by the size of a slice.
        take: this rank's part of the inputs of a slice.
        fixed: how many of the flat tensors are no inputs: parameters, buffers, constants.
        parameters: how many of them are parameters.
        takes_seed: the last flat tensor is a seed.
        draws: the graph draws random numbers of torch's generators.
        result_gradients: which results have a part in which gradients.
        differentiable: whether each result carries a gradient.
        device: of this rank.
        carried: by position of a result that each slice hands to the next, that of the buffer.
        plain: by position, results that are no tensors.
        pipeline: of whose ranks this is one; None if this rank runs all stages.
        parameters_of_stages: where parameters are.
        stage_of_result: by position.
        results_like: by position, tensors of the results that another rank computes.
        late: positions of results that the caller fetches from their stage when it reads them.
        expected: gradients of results with which slices run backward at once; None to wait.
    """

    slicing: Slicing
    stages: Mapping[int, Mapping[int, BoundStage]]
    programs: Mapping[int, Sequence[StageProgram]]
    take: Callable[[int, Sequence[torch.Tensor]], list[torch.Tensor]]
    fixed: int
    parameters: int
    takes_seed: bool
    draws: bool
    result_gradients: ResultGradients
    differentiable: Sequence[bool]
    device: torch.device
    carried: Mapping[int, int] = field(default_factory=dict)
    plain: Mapping[int, Any] = field(default_factory=dict)
    pipeline: Pipeline | None = None
    parameters_of_stages: StageParameters = field(default_factory=StageParameters)
    stage_of_result: Mapping[int, int] = field(default_factory=dict)
    results_like: Mapping[int, Crossing] = field(default_factory=dict)
    late: frozenset[int] = frozenset()
    expected: Tangents | None = None

    def crossing(self, stage: int, number: int) -> Mapping[str, Crossing]:
        """What a stage receives for a slice."""
        return self.programs[self.slicing.sizes[number]][stage - 1].sent
