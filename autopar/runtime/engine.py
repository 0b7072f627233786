"""The engine, which takes the model's place: an instance of the model's class whose forward is the
compiled step (`step_runner.py`)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar.errors import EngineError
from autopar.plan import ShardingPlan
from autopar.runtime import generation
from autopar.runtime.bound_step import BoundStep
from autopar.runtime.call import Call
from autopar.runtime.full_state import distribute_state, gather_state
from autopar.runtime.generation import generates
from autopar.runtime.step_runner import StepRunner
from autopar.schedule.budget import MemoryPlan


class _Added:
    """A method or attribute that the engine adds, unless the model has one of this name.

    Args:
        function: of the engine.
        attribute: it is read without a call.
    """

    def __init__(self, function: Callable[..., Any], *, attribute: bool = False) -> None:
        functools.update_wrapper(self, function)  # type: ignore[arg-type]
        self._function, self._attribute = function, attribute

    def __get__(self, engine: Engine | None, owner: type) -> Any:
        if engine is None:
            return self
        name = self._function.__name__
        for held in ("_parameters", "_buffers", "_modules"):  # `__dict__` comes before, anyway
            if name in engine.__dict__[held]:
                return engine.__dict__[held][name]
        if self._attribute:
            return self._function(engine)
        return functools.partial(self._function, engine)


def _attribute(function: Callable[..., Any]) -> Any:
    return _Added(function, attribute=True)


def _method(function: Callable[..., Any]) -> Any:
    return _Added(function)


class Engine(torch.nn.Module):
    """What the engine adds to the class of the model.

    An engine and its model are two objects with one `__dict__`: submodules, parameters, modes and
    attributes are the same, whichever of the two they are set on. Calling the engine runs the
    program; calling the model runs its own forward. Where the model has a method, attribute or
    submodule of the name of one below, the engine has the model's.
    """

    __slots__ = ()
    _autopar_runner: StepRunner  # a slot of the class that `_engine_class` makes

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the model's, which might register the class or want arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)  # hooks of the model are in the program

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        # where a __call__ of the model's own ends
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._autopar_runner(*args, **kwargs)

    @_attribute
    def plan(self) -> ShardingPlan:
        """The plan in force: of the step that was compiled first.

        Raises:
            EngineError: no batch was seen yet.
        """
        steps = self._autopar_runner.steps
        if not steps:
            raise EngineError(
                "no plan yet: it is made at the first batch, or pass example_inputs= to auto_engine"
            )
        return steps[0].compiled.plan

    @_attribute
    def memory_plan(self) -> MemoryPlan | None:
        """What the step that was compiled last keeps, recomputes and offloads; None without a
        budget."""
        steps = self._autopar_runner.steps
        return steps[-1].compiled.memory if steps else None

    @_attribute
    def steps(self) -> list[BoundStep]:
        """The steps compiled so far, in their order."""
        return self._autopar_runner.steps

    @_attribute
    def stored_steps(self) -> int:
        """Steps of the optimizer in the last complete version of its states on a drive: of a run
        that was resumed, those that it has done. 0 if they are on no drive."""
        return self._autopar_runner.stored_steps

    @_attribute
    def _programs(self) -> list[BoundStep]:
        return self._autopar_runner.steps  # under the name that scripts have counted captures by

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name != "generate":
                raise
            raise AttributeError(
                f"{error}: only models of transformers that generate text (GenerationMixin) have "
                "it; call the engine for each token"
            ) from None

    @_method
    def run_within(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Run every later call within a context, such as an autocast.

        Args:
            context: makes it, for each call.
        """
        self._autopar_runner.context = context

    @_method
    def plan_for(self, *args: Any, **kwargs: Any) -> None:
        """Plan and distribute for inputs of these shapes, without running them."""
        self._autopar_runner.step_for(Call.of(args, kwargs))

    @_method
    def full_state_dict(
        self, *, rank0_only: bool = True, offload_to_cpu: bool = True
    ) -> dict[str, Any]:
        """The state dict of the model with whole, plain tensors, as one process would save it.

        All ranks must call it. Tensors are gathered one after the other, and are copies: later
        steps do not change them.

        Args:
            rank0_only: ranks other than 0 get an empty dict, as with FSDP; False gives it to all.
            offload_to_cpu: tensors are on the CPU; False leaves them on the device.
        """
        self._autopar_runner.check_values()
        state = super().state_dict(keep_vars=True)
        return gather_state(state, rank0_only=rank0_only, offload_to_cpu=offload_to_cpu)

    @_method
    def load_full_state_dict(self, state: Mapping[str, Any] | None, strict: bool = True) -> Any:
        """Load whole, plain tensors; each rank keeps its shards.

        All ranks must call it.

        Args:
            state: of `full_state_dict`, or of one process; on rank 0, and None or {} on the others,
                to which its tensors are sent one after the other, or on all ranks alike.
            strict: refuse a state that lacks names of the model or has others.

        Returns:
            the names that are missing and those that are unexpected, as `load_state_dict` does.

        Raises:
            EngineError: neither rank 0 alone nor all ranks passed a state.
            RuntimeError: names or shapes are not those of the model.
        """
        runner = self._autopar_runner
        entries = super().state_dict(keep_vars=True)
        distributed = distribute_state(state, entries, runner.device)
        return self.load_state_dict(distributed, strict=strict)

    @_method
    def get_random_state(self) -> torch.Tensor:
        """The state of the random numbers that programs draw (dropout), for a checkpoint: [3],
        int64, the same on all ranks."""
        return self._autopar_runner.random_state

    @_method
    def set_random_state(self, state: torch.Tensor) -> None:
        """Draw from a state on, so that a resumed run goes on as if it had not stopped; on all
        ranks alike."""
        self._autopar_runner.random_state = state

    @_method
    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """For loops written for DDP that accumulate gradients. It changes nothing: gradients are
        right after each backward, within it and outside, so sums of them are as well."""
        yield

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, with DTensors for `torch.distributed.checkpoint`; whole tensors within the
        model's own methods (`save_pretrained`)."""
        self._autopar_runner.check_values()
        state = super().state_dict(*args, **kwargs)
        for name, value in state.items():
            if isinstance(value, DTensor):
                state[name] = self._autopar_runner.saved(value)
        return state

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for p in self.parameters():
            probe = fn(torch.empty(0, dtype=p.dtype, device=p.device))
            if probe.dtype != p.dtype or probe.device.type != p.device.type:
                raise EngineError(
                    f"the engine's parameters are {p.dtype} on {p.device.type}, and its plan is "
                    f"for that; convert the model to {probe.dtype} on {probe.device.type} before "
                    "auto_engine"
                )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """An engine of its own, without an optimizer, by the same plan."""
        self._autopar_runner.check_values()
        model = copy.deepcopy(self._autopar_runner.model, memo)
        memo[id(self)] = twin = engine_of(self._autopar_runner.for_copy(model))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineError(
            f"an engine of {type(self).__name__} cannot be pickled: this rank has shards of the "
            "parameters only. Save its state_dict() with torch.distributed.checkpoint, or the "
            "whole tensors of engine.full_state_dict(), which all ranks must call, with torch.save "
            "on rank 0"
        )


def engine_of(runner: StepRunner) -> Engine:
    """The engine that shares everything with a runner's model."""
    cls = _engine_class(type(runner.model))  # type: ignore[arg-type]
    engine: Engine = object.__new__(cls)
    object.__setattr__(engine, "__dict__", runner.model.__dict__)
    object.__setattr__(engine, "_autopar_runner", runner)
    return engine


@functools.cache
def _engine_class(model_class: type[torch.nn.Module]) -> type[Engine]:
    """A subclass of the model's class under the same name, whose forward is the engine's.

    Raises:
        EngineError: Python does not allow it.
    """

    @torch.compiler.disable  # it runs compiled programs
    @functools.wraps(model_class.forward)
    def forward(self: Engine, *args: Any, **kwargs: Any) -> Any:
        return self._autopar_runner(*args, **kwargs)

    members = _members_of(model_class)
    if generates(model_class):
        members |= generation.members(model_class)
    members |= {"__slots__": ("_autopar_runner",), "forward": forward}
    members |= {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    name, bases = model_class.__name__, (Engine, model_class)
    metaclass: Any = type(model_class)
    try:
        return metaclass(name, bases, members)
    except Exception:  # of a metaclass that wants arguments, or allows no subclass
        try:
            return type.__new__(metaclass, name, bases, members)
        except TypeError as error:
            raise EngineError(
                f"the engine is of a subclass of the model's class, {model_class.__qualname__}, "
                f"and Python allows none: {error}. Wrap the model in a module of yours that calls "
                "it, and pass that to auto_engine"
            ) from error


def _members_of(model_class: type[torch.nn.Module]) -> dict[str, Any]:
    """What the class of an engine takes over from the model's class: public methods, which find
    whole parameters, and names that `Engine` would shadow."""
    members: dict[str, Any] = {}
    for klass in model_class.__mro__:
        if klass in torch.nn.Module.__mro__:
            continue
        for name, member in vars(klass).items():
            if name in members:
                continue
            if isinstance(member, FunctionType) and not name.startswith("_"):
                members[name] = _with_whole_parameters(name, member)
            elif name == "__call__" or isinstance(vars(Engine).get(name), _Added):
                members[name] = member
    return members


def _with_whole_parameters(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the model that the engine's caller calls: it finds whole parameters."""

    @functools.wraps(method)
    def call(self: Engine, *args: Any, **kwargs: Any) -> Any:
        with self._autopar_runner.whole_parameters():
            return method(self, *args, **kwargs)

    return call
