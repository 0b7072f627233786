"""Which compiled step serves a call.

A batch of new shapes, a switch between train and eval, and whatever else a program depends on and
finds changed compile another step, with the parameters' layouts fixed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from autopar.comm.offloaded_parameters import reload_all
from autopar.errors import CaptureError, MeshError
from autopar.ir.graph import ModelGraph
from autopar.ir.guards import Guard
from autopar.ir.numbers import Condition, Origin, is_number
from autopar.ir.reads import first_change
from autopar.runtime.agreement import Agreement, described
from autopar.runtime.assumptions import precision_modes
from autopar.runtime.autograd_state import without_saved_tensors_hooks
from autopar.runtime.batch import BatchLayout
from autopar.runtime.bound_step import BoundStep
from autopar.runtime.call import Call
from autopar.runtime.sized_steps import SizedSteps
from autopar.runtime.step_compiler import StepCompiler
from autopar.runtime.varying_numbers import VaryingNumbers

log = logging.getLogger(__name__)

# numbers of captures for the same shapes at which the engine warns, how many programs it keeps for
# them, and in all
_WARN_AT = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_KEPT, _KEPT_IN_ALL = 32, 256

# why a step does not serve a call, or how to find out
_Failure = Guard | Condition | str | Callable[[], Any] | None


class StepChoice:
    """The steps of a model, and which of them a call runs.

    Args:
        compiler: of the model; it compiles a step for what no other one serves.
        agreement: of the ranks, which choose alike.
    """

    def __init__(self, compiler: StepCompiler, agreement: Agreement) -> None:
        self.model = compiler.model
        self._compiler, self._agreement = compiler, agreement
        self._programs: dict[Any, list[BoundStep]] = {}
        self._captures: Counter[Any] = Counter()
        self._last: BoundStep | None = None
        self._sized = SizedSteps(self._trace_sizes, compiler.place.ranks)
        self._numbers = VaryingNumbers()

    @property
    def steps(self) -> list[BoundStep]:
        """In the order in which they were compiled."""
        steps = (step for same_shape in self._programs.values() for step in same_shape)
        return sorted(steps, key=lambda step: step.number)

    def step_for(self, call: Call) -> BoundStep:
        """The step for inputs of these shapes, and for what its guards and assumptions allow.

        Raises:
            EngineError: ranks disagree, or some of them do not call the engine.
        """
        try:
            return self._step_for(call)
        except (CaptureError, MeshError) as error:
            if not self._numbers.of(call):
                raise
            log.info("numbers that vary stay constants of the program: %s", error)
        # the numbers may be the reason
        with self._numbers.kept_constant(call):
            return self._step_for(call)

    def _step_for(self, call: Call) -> BoundStep:
        if any(s.offloads_parameters for steps in self._programs.values() for s in steps):
            self._reload_parameters()
        varying = self._numbers.of(call)
        key = self._key(call, varying)
        self._agreement.check_call(key, [*call.tensors, *self._as_tensors(call, varying)])
        steps = self._programs.setdefault(key, [])
        failed: _Failure = None
        known = (*steps, *self._sized.known(key))
        for step in sorted(known, key=lambda step: step is not self._last):
            failed = self._failure(step, call)
            if failed is None:
                self._agreement.check_program(step.number)
                self._last = step
                return step
        alike = self._of_other_sizes(key, call) if failed is None else []
        if (sized := self._sized_step(key, call, alike)) is not None:
            self._agreement.check_program(sized.number)
            self._last = sized
            return sized
        self._numbers.compare(self.model, (s.compiled.graph.reads for s in self.steps))
        if failed is not None and self._captures[key] in _WARN_AT:
            log.warning(
                "capturing the model again: %s\nIt was captured %d times for these shapes; each "
                "capture costs seconds.", _reason(failed), self._captures[key],
            )  # fmt: skip
        self._captures[key] += 1
        self._agreement.check_program(None)
        # fake tensors have no values to look for NaNs in, and are not what a caller's hooks are for
        with (
            self._told_in_one_line(key, failed), torch.autograd.set_detect_anomaly(False),
            without_saved_tensors_hooks(),
        ):  # fmt: skip
            step = self._compiler.compile(
                call, self._numbers.of(call), alike[-1] if alike else None
            )
        for condition in step.compiled.graph.numbers.conditions:
            log.info("%s", condition)
        steps.append(step)
        if len(steps) > _KEPT:
            del steps[1]  # the first has the plan in force
        self._forget_the_oldest()
        if step.offloads_parameters:
            self._reload_parameters()
        return step

    @contextmanager
    def _told_in_one_line(self, key: Any, failed: _Failure) -> Iterator[None]:
        """Captures after the first take one line, which says why."""
        if not self.steps:
            yield
            return
        why = f"called with {described(key)}"
        if failed is not None:
            why = _reason(failed).splitlines()[0]
        with self._compiler.options.step.progress.as_one(f"captured again: {why}"):
            yield

    def _forget_the_oldest(self) -> None:
        """Keep to the number of programs; the first has the plan in force."""
        too_many = max(0, len(self.steps) - _KEPT_IN_ALL)
        for oldest in self.steps[1 : 1 + too_many]:
            for key, steps in list(self._programs.items()):
                self._programs[key] = [step for step in steps if step is not oldest]
                if not self._programs[key]:
                    del self._programs[key]

    def _of_other_sizes(self, key: Any, call: Call) -> list[BoundStep]:
        """Steps that serve the model as it is, for inputs that differ in sizes alone; in order."""
        kind = _without_sizes(key)
        alike = [
            step
            for other, steps in self._programs.items()
            if _without_sizes(other) == kind
            for step in steps
            if self._model_changed(step, call) is None
        ]
        return sorted(alike, key=lambda step: step.number)

    def _sized_step(self, key: Any, call: Call, alike: Sequence[BoundStep]) -> BoundStep | None:
        """A step for a call of new sizes, without compiling it, where that can be."""
        if len(alike) < 2 or any(step.split for step in alike):
            return None
        layout = self._compiler.layout_of(call)
        step = self._sized.find(key, _without_sizes(key), call, layout, alike)
        return None if step is None or self._failed_guard(step, call) else step

    def _trace_sizes(
        self, call: Call, layout: BatchLayout, dynamic: Mapping[int, Collection[int]]
    ) -> ModelGraph:
        with self._compiler.options.step.progress.as_one("captured for other sizes of inputs"):
            return self._compiler.trace_sizes(call, layout, dynamic, self._numbers.of(call))

    def _key(self, call: Call, varying: Collection[Origin]) -> Any:
        precision = precision_modes(self._compiler.device.type)
        forward = self._compiler.runs_forward(call)
        return forward, self.model.training, precision, call.structure, call.described(varying)

    def _as_tensors(self, call: Call, varying: Collection[Origin]) -> list[torch.Tensor]:
        """The numbers that vary, to compare with those of other ranks."""
        origins = sorted(varying, key=str)
        values = (origin.value(self.model, call.leaves) for origin in origins)
        return [torch.tensor(x, dtype=torch.float64) for x in values if is_number(x)]

    def _failure(self, step: BoundStep, call: Call) -> _Failure:
        """Why a step does not serve a call, with what the model has now; None if it does."""
        return self._model_changed(step, call) or self._failed_guard(step, call)

    def _model_changed(self, step: BoundStep, call: Call) -> _Failure:
        """The same, whatever the values of tensors."""
        graph = step.compiled.graph
        changed = step.assumptions.changed()
        if changed:
            return changed
        if not step.reads_hold():  # the reason takes long to find
            return partial(first_change, self.model, graph.reads)
        values = graph.numbers.values(self.model, call.leaves)
        return graph.numbers.failed(values)

    def _failed_guard(self, step: BoundStep, call: Call) -> Guard | None:
        """The first guard of a step that a batch violates; the same on every rank."""
        guards = [g for g in step.compiled.graph.guards if g.program is not None]
        if not guards:
            return None
        used = {k for g in guards for source, k in g.sources if source == "input"}
        inputs = {k: step.layout.gather(k, call.leaves[k]) for k in used}
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        return next((g for g in guards if not g.holds(inputs, buffers)), None)

    def _reload_parameters(self) -> None:
        reload_all(dict(self.model.named_parameters()), self.model.buffers())


def _without_sizes(key: Any) -> Any:
    """The key of a program, with numbers of dims for shapes."""
    *rest, leaves = key
    return (*rest, tuple((len(x[0]), *x[1:]) if isinstance(x, tuple) else x for x in leaves))


def _reason(failed: _Failure) -> str:
    """Why a step does not apply."""
    if isinstance(failed, Condition):
        return (
            f"{failed}\nOf a number that meets nothing but tensors, one program serves all values."
        )
    if not isinstance(failed, Guard):
        return str(failed() if callable(failed) else failed)
    return f"{failed}\nMove the decision out of the model, or make all batches agree in it."
