"""Finds the step of a call, or has it compiled, and runs it.

A batch of new shapes, a switch between train and eval, and whatever else a program depends on and
finds changed compile another step, with the parameters' layouts fixed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar.comm import dtensor_rules, world
from autopar.comm.offloaded_parameters import reload_all
from autopar.errors import CaptureError, MeshError
from autopar.ir.graph import ModelGraph
from autopar.ir.guards import Guard
from autopar.ir.numbers import Condition, Origin, Values, is_number
from autopar.ir.reads import first_change
from autopar.runtime import gathered_part
from autopar.runtime.agreement import Agreement, described
from autopar.runtime.assumptions import precision_modes
from autopar.runtime.batch import BatchLayout
from autopar.runtime.bound_step import BoundStep, WholeResult
from autopar.runtime.buffers import copies_of, copy_all
from autopar.runtime.call import Call
from autopar.runtime.deferred_result import DeferredResult
from autopar.runtime.distribute import shards
from autopar.runtime.initial_values import InitialValues
from autopar.runtime.result_gradients import refuse_hooks
from autopar.runtime.sharded_values import SavedShard, view, views
from autopar.runtime.sized_steps import SizedSteps
from autopar.runtime.state_on_host import StateOnHost
from autopar.runtime.step_compiler import StepCompiler
from autopar.runtime.varying_numbers import VaryingNumbers
from autopar.runtime.whole_parameters import stored_parameters, whole_parameters

log = logging.getLogger(__name__)

# numbers of captures for the same shapes at which the engine warns, how many programs it keeps for
# them, and in all
_WARN_AT = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_KEPT, _KEPT_IN_ALL = 32, 256

# why a step does not serve a call, or how to find out
_Failure = Guard | Condition | str | Callable[[], Any] | None


class StepRunner:
    """Runs a model's calls as compiled steps.

    Args:
        compiler: of the model.
    """

    def __init__(self, compiler: StepCompiler) -> None:
        self.model = compiler.model
        self._compiler = compiler
        self._programs: dict[Any, list[BoundStep]] = {}
        self._captures: Counter[Any] = Counter()
        self._last: BoundStep | None = None
        self._sized = SizedSteps(self._trace_sizes, compiler.place.ranks)
        self._numbers = VaryingNumbers()
        self._whole = False
        self.context: Callable[[], AbstractContextManager[Any]] = nullcontext  # of every call
        optimizer = compiler.optimizer
        self._offloaded_state = None if optimizer is None else StateOnHost(optimizer)
        self._seeds_used = self._draws = 0
        ranks, same_batches = compiler.place.ranks, compiler.options.batch == "global"
        self._seed = int(ranks.from_rank_zero(lambda: torch.initial_seed() % 2**62))
        self._agreement = Agreement(compiler.device, same_batches=same_batches)
        if same_batches:  # what the caller computes with parameters is replicated
            dtensor_rules.replicate_plain_tensors()
        dtensor_rules.install(compiler.device.type)
        dtensor_rules.install_for(views(), view)

    def for_copy(self, model: torch.nn.Module) -> StepRunner:
        """A runner of a copy of the model, whose parameters stay laid out as they are."""
        compiler = self._compiler
        options = replace(compiler.options, weights=None)  # the copy has values
        twin = StepRunner(
            StepCompiler(model, None, options, laid_out=compiler.laid_out, initial=InitialValues())
        )
        twin.context = self.context
        return twin

    @property
    def device(self) -> torch.device:
        """Of this rank's programs."""
        return self._compiler.device

    @property
    def random_state(self) -> torch.Tensor:
        """The seed, and how many programs and draws it was used for: [3], int64."""
        return torch.tensor([self._seed, self._seeds_used, self._draws])

    @random_state.setter
    def random_state(self, state: torch.Tensor) -> None:
        self._seed, self._seeds_used, self._draws = map(int, state)

    @property
    def steps(self) -> list[BoundStep]:
        """In the order in which they were compiled."""
        steps = (step for same_shape in self._programs.values() for step in same_shape)
        return sorted(steps, key=lambda step: step.number)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """The model's modules find whole parameters, gathered as they are read. Without gradients
        the model's own forward runs."""
        if self._whole:
            yield
            return
        self._whole = True
        try:
            with whole_parameters(self.model):
                yield
        finally:
            self._whole = False

    def saved(self, value: DTensor) -> torch.Tensor:
        """A parameter as an entry of a state dict."""
        return value.full_tensor() if self._whole else SavedShard.of_handle(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gathered_part.steps.count += 1
        with self.context():
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._whole:
            return self._run(Call.of(args, kwargs))
        if not torch.is_grad_enabled():
            # not the class's own __call__, which has called the engine
            return torch.nn.Module.__call__(self.model, *args, **kwargs)
        self._whole = False
        try:
            with stored_parameters(self.model):
                return self._run(Call.of(args, kwargs))
        finally:
            self._whole = True

    def _run(self, call: Call) -> Any:
        trains = torch.is_grad_enabled()
        with world.explained_failures():
            step = self.step_for(call)
        graph = step.compiled.graph
        values = graph.numbers.values(self.model, call.leaves)
        if step.offloads_state and trains and self._offloaded_state is not None:
            self._offloaded_state.leave()
        flat, mutated = self._flat(step, call, values)
        with self._common_draws(graph):
            results = list(step.train(*flat) if trains else step.evaluate(*shards(flat)))
        count = len(mutated)
        if mutated:
            with torch.no_grad():
                copy_all(mutated, results[:count])
        for position, whole in step.whole_results.items():
            results[position] = self._deferred(results[position], position - count, whole)
        given = step.layout.give(results[count:])
        if step.compiled.lowered is not None and trains:
            for position in step.feeding:
                if position >= count:
                    refuse_hooks(given[position - count])
        return graph.carry_out(self.model, given, call.leaves, values)

    def _deferred(self, local: torch.Tensor, number: int, whole: WholeResult) -> torch.Tensor:
        """A result that is gathered when the caller reads it."""
        mesh = self._compiler.mesh
        sharded = DTensor.from_local(
            local, mesh, whole.spec.to_placements(mesh.ndim), run_check=False,
            shape=torch.Size(whole.shape), stride=tuple(whole.stride),
        )  # fmt: skip

        def gather() -> torch.Tensor:
            self._agreement.meet(f"reads result {number} of the model")
            return sharded.full_tensor()

        return DeferredResult.of(sharded, gather)

    def _flat(
        self, step: BoundStep, call: Call, values: Values
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the program is called with, and the buffers that its first results are for.

        Args:
            values: of the numbers that vary.
        """
        graph, program = step.compiled.graph, step.compiled.local
        device, mesh, coords = (
            self._compiler.device, self._compiler.mesh, self._compiler.place.coords,
        )  # fmt: skip
        if graph.updates:
            parameters: dict[str, Any] = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, update in graph.updates.items():
                    shard = parameters[name].to_local()
                    shard.copy_(update(shard))
        flat: list[Any] = [owner._parameters[name] for owner, name in step.parameters]
        mutated: list[torch.Tensor] = []
        if graph.buffers:
            buffers = dict(self.model.named_buffers())
            mutated = [buffers[n] for n in graph.mutations]
            # copies: backward may keep what the step is about to overwrite
            buffers |= zip(graph.mutations, copies_of(mutated), strict=True)
            flat += [buffers[n] for n in graph.buffers.values()]
        constants = graph.numbers.fill(graph.constants, values)
        flat += [t.to(device) for t in constants.values()]
        flat += step.layout.take(call.tensors, program.input_specs, mesh, coords, device)
        if program.takes_seed:
            self._seeds_used += 1
            flat.append(torch.tensor((self._seed + self._seeds_used) % 2**62))
        return flat, mutated

    @contextmanager
    def _common_draws(self, graph: ModelGraph) -> Iterator[None]:
        """Random operators that run replicated draw the same on every rank, anew at each step."""
        if not graph.random:
            yield
            return
        self._draws += 1
        device = self._compiler.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((self._seed + self._draws) % 2**62)
            yield

    # -- the step of a call -----------------------------------------------------------------------

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
        with self._told_in_one_line(key, failed):
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
        if len(alike) < 2:
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
        return self.model.training, precision, call.structure, call.described(varying)

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
