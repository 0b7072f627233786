"""Runs the calls of a model as compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar.comm import dtensor_rules, world
from autopar.errors import EngineError
from autopar.ir.numbers import Values
from autopar.ir.precision import without_autocast
from autopar.runtime import gathered_part
from autopar.runtime.agreement import Agreement
from autopar.runtime.autograd_state import in_backward
from autopar.runtime.bound_step import BoundStep, WholeResult
from autopar.runtime.buffers import copies_of, copy_all
from autopar.runtime.cache_classes import ARGUMENT as CACHE
from autopar.runtime.call import Call
from autopar.runtime.decoder_cache import CacheLayouts, CacheTensors, call_with, sharded
from autopar.runtime.deferred_result import DeferredResult
from autopar.runtime.distribute import shards
from autopar.runtime.donated_inputs import take_back
from autopar.runtime.encoder_inputs import ARGUMENT as ENCODER
from autopar.runtime.encoder_inputs import EncoderInputs, without_cache
from autopar.runtime.initial_values import InitialValues
from autopar.runtime.result_gradients import refuse_hooks
from autopar.runtime.sharded_values import SavedShard, view, views
from autopar.runtime.state_on_host import StateOnHost
from autopar.runtime.step_choice import StepChoice
from autopar.runtime.step_compiler import StepCompiler
from autopar.runtime.step_on_shards import stored_steps
from autopar.runtime.whole_parameters import stored_parameters, whole_parameters

_NOTHING: AbstractContextManager[None] = nullcontext()


class StepRunner:
    """Runs a model's calls as compiled steps.

    Args:
        compiler: of the model.
        seed: of random numbers, the same on all ranks; that of rank 0's process if None.
    """

    def __init__(self, compiler: StepCompiler, seed: int | None = None) -> None:
        self.model = compiler.model
        self._compiler = compiler
        self._whole = self._autocasts = False  # within a method of the model
        self.context: Callable[[], AbstractContextManager[Any]] = nullcontext  # of every call
        optimizer = compiler.optimizer
        self._offloaded_state = None if optimizer is None else StateOnHost(optimizer)
        self._seeds_used = self._draws = 0
        ranks, same_batches = compiler.place.ranks, compiler.options.batch == "global"
        if seed is None:
            seed = int(ranks.from_rank_zero(lambda: torch.initial_seed() % 2**62))
        self._seed = seed
        self._agreement = Agreement(compiler.device, same_batches=same_batches)
        self._choice = StepChoice(compiler, self._agreement)
        self._caches = CacheLayouts(compiler.options.precision)
        if same_batches:  # what the caller computes with parameters is replicated
            dtensor_rules.replicate_plain_tensors()
        dtensor_rules.install(compiler.device.type)
        dtensor_rules.install_for(views(), view)

    def for_copy(self, model: torch.nn.Module) -> StepRunner:
        """A runner of a copy of the model, whose parameters stay laid out as they are. One rank
        alone may make one."""
        compiler = self._compiler
        options = replace(compiler.options, weights=None)  # the copy has values
        twin = StepRunner(
            StepCompiler(model, None, options, laid_out=compiler.laid_out, initial=InitialValues()),
            self._seed,
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
        return self._choice.steps

    @property
    def stored_steps(self) -> int:
        optimizer = self._compiler.optimizer
        if not self.steps:  # the first plan reads the states
            return self._compiler.resumed_steps
        return 0 if optimizer is None else stored_steps(optimizer)

    def check_values(self) -> None:
        """
        Raises:
            EngineError: the run goes on from stored states, which the first plan reads.
        """
        self._compiler.refuse_unread_states()

    def step_for(self, call: Call) -> BoundStep:
        """The step that serves a call, compiled if there is none."""
        return self._choice.step_for(call)

    def check_generates(self) -> None:
        """
        Raises:
            EngineError: the mesh has stages.
        """
        cluster = self._compiler.options.step.cluster
        if cluster.pipe_axis is not None:
            raise EngineError(
                f"generate() does not run on the stages of mesh {cluster.mesh_text}: they are of "
                "training; load the weights into an engine on a mesh without the axis 'pipe'"
            )

    def new_cache(self, length: int) -> CacheTensors:
        """The tensors of a cache of keys and values, for this many tokens."""
        if self._compiler.options.batch == "local":
            raise EngineError(
                "generate() runs on the same batch on all ranks, and batch='local' was asked for; "
                "leave that out of auto_engine"
            )
        return CacheTensors(self._caches, length, self._compiler.mesh)

    def plan_with_cache(self, **kwargs: Any) -> None:
        """Plan the program of a call with a cache, without running it."""
        tensors = sharded(kwargs[CACHE])
        assert tensors is not None
        self.step_for(self._call_with(tensors, (), kwargs))
        tensors.written(0)

    def _call_with(
        self, cache: CacheTensors, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        if ENCODER in kwargs:
            if not cache.tokens:
                cache.encodes = EncoderInputs.of(kwargs[ENCODER])
            kwargs = {k: v for k, v in kwargs.items() if k != ENCODER}
        return call_with(cache.argument(self.model, _tokens(args, kwargs)), args, kwargs)

    def forget_programs(self) -> None:
        """Compile anew what is called next: layers were replaced, whose memory programs hold."""
        self._choice = StepChoice(self._compiler, self._agreement)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """The model's modules find whole parameters, gathered as they are read. Without gradients
        the model's own forward runs."""
        if self._whole:
            yield
            return
        self._whole, policy = True, self._compiler.options.precision
        own = nullcontext() if policy is None else policy.methods(self.device.type)
        before = torch.is_autocast_enabled(self.device.type)
        try:
            with whole_parameters(self.model), own:
                self._autocasts = torch.is_autocast_enabled(self.device.type) and not before
                yield
        finally:
            self._whole = False

    def _caller_autocast(self) -> AbstractContextManager[None]:
        """The autocast outside of a method of the model."""
        return without_autocast() if self._autocasts else nullcontext()

    def saved(self, value: DTensor) -> torch.Tensor:
        """A parameter as an entry of a state dict."""
        return value.full_tensor() if self._whole else SavedShard.of_handle(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gathered_part.steps.count += 1
        with self.context():
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._whole:
            cache = sharded(kwargs.get(CACHE))
            if cache is None:
                return self._run(Call.of(args, without_cache(kwargs)))
            if torch.is_grad_enabled():
                raise EngineError(
                    "a cache of generate() is for calls without gradients; make the call within "
                    "torch.no_grad()"
                )
            results = self._run(self._call_with(cache, args, kwargs))
            cache.written(_tokens(args, kwargs).shape[1])
            results[CACHE] = kwargs[CACHE]
            return results
        if not torch.is_grad_enabled():
            # not the class's own __call__, which has called the engine
            return torch.nn.Module.__call__(self.model, *args, **kwargs)
        self._whole = False
        try:
            # the program has the policy within
            with stored_parameters(self.model), self._caller_autocast():
                return self._run(Call.of(args, kwargs))
        finally:
            self._whole = True

    def _run(self, call: Call) -> Any:
        trains = torch.is_grad_enabled()
        with world.explained_failures():
            step = self.step_for(call)
        graph = step.compiled.graph
        if graph.random and in_backward():
            raise EngineError(
                f"{type(self.model).__name__} draws random numbers (dropout), and is called within "
                "a backward, as torch.utils.checkpoint does around an engine: it would draw others "
                "than in the forward. Call the engine without checkpoint; memory= makes the plan "
                "recompute what has to be"
            )
        values = graph.numbers.values(self.model, call.leaves)
        if step.offloads_state and trains and self._offloaded_state is not None:
            self._offloaded_state.leave()
        flat, mutated = self._flat(step, call, values)
        with self._common_draws() if graph.random else _NOTHING:
            results = list(step.train(*flat) if trains else step.evaluate(*shards(flat)))
        count = len(mutated)
        if mutated:
            with torch.no_grad():
                copy_all(mutated, results[:count])
        for position, whole in step.whole_results.items():
            results[position] = self._deferred(results[position], position - count, whole)
        if graph.donated:
            results = take_back(graph, call.leaves, results)
        given = step.layout.give(results[count:])
        if step.compiled.lowered is not None and trains:
            for position in step.feeding:
                if position >= count:
                    refuse_hooks(given[position - count])
        return graph.carry_out(self.model, given, call.leaves, values)

    def _deferred(self, local: torch.Tensor, number: int, whole: WholeResult) -> torch.Tensor:
        """A result that is gathered when the caller reads it."""
        mesh = self._compiler.mesh

        def gather() -> torch.Tensor:
            self._agreement.meet(f"reads result {number} of the model")
            return whole.gather(local, mesh)

        return DeferredResult.of(whole.sharded(local, mesh), gather)

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
        if step.split:
            flat += [x.to(device) for x in call.tensors]
        else:
            flat += step.layout.take(call.tensors, program.input_specs, mesh, coords, device)
        if program.takes_seed:
            self._seeds_used += 1
            flat.append(torch.tensor((self._seed + self._seeds_used) % 2**62))
        return flat, mutated

    @contextmanager
    def _common_draws(self) -> Iterator[None]:
        """Random operators that run replicated draw the same on every rank, anew at each step."""
        self._draws += 1
        device = self._compiler.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((self._seed + self._draws) % 2**62)
            yield


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The tokens of a call, or their embeddings: [batch, tokens, ...]."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    given = (*map(kwargs.get, names), *args)
    tokens: torch.Tensor | None = next((x for x in given if x is not None), None)
    if tokens is None:
        raise EngineError("a call with a cache needs input_ids or inputs_embeds")
    return tokens
