"""An optimizer that steps on this rank's shards.

Through DTensors every operator of a step works out anew what it does to layouts: 2 ms of 4 on a
model of 20 parameters. Optimizers that treat each element by itself need none of that.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar.errors import EngineError
from autopar.optim.elementwise import ELEMENTWISE
from autopar.runtime.chunk_files import ChunkFiles, Version
from autopar.runtime.chunks import counters_on_host, fuse_on_device, fused_groups, local_of
from autopar.runtime.distribute import laid_out_like, sharded_state
from autopar.runtime.sharded_values import ShardedState
from autopar.runtime.speculative_step import Chunk, SpeculativeStep
from autopar.runtime.states_on_drive import StatesOnDrive

# What a second engine of the same optimizer finds done.
_ATTACHED: weakref.WeakKeyDictionary[torch.optim.Optimizer, StepOnShards] = (
    weakref.WeakKeyDictionary()
)


class StepOnShards:
    """Puts shards in the place of DTensors while an optimizer steps, and the DTensors back.

    Optimizers of other kinds, steps with a closure (which runs the model) and differentiable ones
    stay as they are.
    """

    @classmethod
    def attach(cls, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer step on shards, if each element is on its own to it."""
        if type(optimizer) in ELEMENTWISE and optimizer not in _ATTACHED:
            _ATTACHED[optimizer] = cls(optimizer)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> StepOnShards:
        """That of an optimizer which steps on shards."""
        cls.attach(optimizer)
        return _ATTACHED[optimizer]

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._own = weakref.ref(optimizer)
        self._on_host = False
        self._drive: StatesOnDrive | None = None
        self._names: Mapping[torch.Tensor, str] = {}
        self._speculative: SpeculativeStep | None = None
        self._fused: list[dict[str, Any]] = []  # groups that are while a step runs
        # of each group, while a step runs
        self._dtensors: list[list[torch.Tensor]] | None = None
        self._shards: list[list[torch.Tensor]] = []
        self._state: defaultdict[torch.Tensor, Any] = defaultdict(
            dict
        )  # of the DTensors, meanwhile
        before = optimizer.register_step_pre_hook(self._before_step)
        after = optimizer.register_step_post_hook(lambda *_: self._back(done=True))
        _run_next_to_the_step(optimizer, before.id, after.id)
        # after a step that failed
        optimizer.register_state_dict_pre_hook(lambda _: self._load())
        optimizer.register_load_state_dict_pre_hook(lambda *_: self._load())
        optimizer.register_state_dict_post_hook(counters_on_host)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._own()
        assert optimizer is not None
        return optimizer

    def run_on_host(
        self, names: Mapping[torch.Tensor, str], files: ChunkFiles | None, resume: Version | None,
        room_bytes: float = 0.0,
    ) -> None:  # fmt: skip
        """Step on the host, where shards are.

        Args:
            names: of parameters.
            files: for the optimizer's state, if it is on a drive.
            resume: the version of them to go on from.
            room_bytes: of the host, for second versions of chunks that are stepped beside the
                backward.

        Raises:
            EngineError: that is of other parameters.
        """
        self._on_host, self._names = True, names
        if files is not None:
            self._drive = StatesOnDrive(self._optimizer, files)
        if room_bytes:
            self._speculative = SpeculativeStep(self._optimizer, room_bytes, self._drive)
        if self._drive is None or resume is None:
            return
        groups = self._optimizer.param_groups
        parameters = {local_of(p): p for group in groups for p in group["params"]}
        state = self._drive.resume({s: names[p] for s, p in parameters.items()}, resume)
        for shard, entries in state.items():
            p = parameters[shard]
            self._optimizer.state[p] = {k: _as_before(k, v, None, p) for k, v in entries.items()}
        self._drive.stand_in({shard: self._optimizer.state[parameters[shard]] for shard in state})

    def beside(
        self, parameters: Sequence[torch.Tensor | None], announced: Collection[int]
    ) -> AbstractContextManager[None]:
        """A backward runs: chunks may be stepped beside it. See `SpeculativeStep.beside`."""
        if self._speculative is None:
            return nullcontext()
        return self._speculative.beside(parameters, announced)

    def only_after_the_backward(self) -> None:
        """Step nothing beside the backward, for comparison."""
        self._speculative = None

    def _load(self) -> None:
        self._back()
        if self._drive is not None:
            self._drive.load_all()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._back()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        groups = optimizer.param_groups
        if closure is not None or any(g.get("differentiable") for g in groups):
            if self._speculative is not None:
                self._speculative.drop()
            if self._drive is not None:
                raise EngineError(
                    "the optimizer's state is on a drive, and steps with a closure or with "
                    "differentiable=True take all of it at once; call step() without them"
                )
            return
        self._dtensors = [g["params"] for g in groups]
        self._state, optimizer.state = optimizer.state, defaultdict(dict)
        for group, params in zip(groups, self._dtensors, strict=True):
            group["params"] = [self._shard(p) for p in params]
        self._shards = [group["params"] for group in groups]
        if self._on_host:
            self._begin_on_host(optimizer)
        else:
            self._fused = fuse_on_device(optimizer)

    def _begin_on_host(self, optimizer: Any) -> None:
        assert self._dtensors is not None
        chunks: list[Chunk] = []
        if self._speculative is not None:
            chunks = self._speculative.accepted(self._dtensors, self._state)
        groups, names = optimizer.param_groups, self._names
        fused = fused_groups(optimizer, optimizer.state, lambda shard: shard.grad is not None)
        self._fused = [groups[k] for k in fused]
        for group in self._fused:
            group["fused"] = True
        if self._drive is None:
            self._take_over(chunks)
            return
        parameters = [p for params in self._dtensors for p in params]
        try:
            self._drive.begin(
                {local_of(p): names.get(p, "") for p in parameters},
                partial(self._take_over, chunks),
            )
        except BaseException:
            self._back()
            raise

    def _take_over(self, chunks: Sequence[Chunk]) -> list[int]:
        """Take chunks over that were stepped beside the backward; their numbers."""
        optimizer, stepped = self._optimizer, set()
        for part in (part for chunk in chunks for part in chunk.parts if part.expects):
            part.accept(optimizer.state[part.shard])
            stepped.add(id(part.shard))
        for group, shards in zip(optimizer.param_groups, self._shards, strict=True):
            group["params"] = [shard for shard in shards if id(shard) not in stepped]
        return [chunk.number for chunk in chunks]

    def _shard(self, p: torch.Tensor) -> torch.Tensor:
        """A parameter's own shard, with its gradient's and its state's."""
        shard = local_of(p)
        if shard is not p:
            grad = p.grad
            if grad is not None and not isinstance(grad, DTensor):  # the caller's, whole
                grad = laid_out_like(grad, p)
            shard.grad = None if grad is None else local_of(grad)
        held = self._state.get(p)
        if held is not None:
            held.update({k: sharded_state(v, p) for k, v in held.items()})
            self._optimizer.state[shard] = {k: local_of(v) for k, v in held.items()}
        return shard

    @torch.no_grad()
    def _back(self, *, done: bool = False) -> None:
        """
        Args:
            done: the step has ended; else it may have failed.
        """
        if self._dtensors is None:
            return
        for group in self._fused:
            group["fused"] = None
        self._fused = []
        try:
            if self._drive is not None:
                self._drive.end() if done else self._drive.roll_back()
        finally:
            self._swap_back()
        if done and self._speculative is not None:
            self._speculative.finish()

    def _swap_back(self) -> None:
        assert self._dtensors is not None
        parameters = {}
        stepped, self._optimizer.state = self._optimizer.state, self._state
        for group, params, shards in zip(
            self._optimizer.param_groups, self._dtensors, self._shards, strict=True
        ):
            for p, shard in zip(params, shards, strict=True):
                now = stepped.get(shard)
                if now is not None:
                    self._keep(p, now)
                if shard is not p:
                    shard.grad = None
                parameters[shard] = p
            group["params"] = params
        self._dtensors, self._shards, self._state = None, [], defaultdict(dict)
        if self._drive is not None:
            state = self._optimizer.state
            self._drive.stand_in({s: state[p] for s, p in parameters.items() if p in state})

    def _keep(self, p: torch.Tensor, now: dict[str, Any]) -> None:
        """A shard's state after the step as its parameter's; it is mostly written in place."""
        held = self._state.get(p, {})
        if len(held) != len(now) or any(local_of(held.get(k)) is not v for k, v in now.items()):
            self._state[p] = {k: _as_before(k, v, held.get(k), p) for k, v in now.items()}


def _run_next_to_the_step(optimizer: torch.optim.Optimizer, before: int, after: int) -> None:
    """Let a hook be the last before the step and one the first after it, whenever the caller
    registers his: those see all parameters, as DTensors.

    Args:
        before, after: numbers of the hooks.
    """
    optimizer._optimizer_step_post_hooks.move_to_end(after, last=False)  # type: ignore[attr-defined]
    own = weakref.ref(optimizer)

    def register_step_pre_hook(hook: Any) -> Any:
        optimizer = own()
        assert optimizer is not None
        handle = type(optimizer).register_step_pre_hook(optimizer, hook)
        optimizer._optimizer_step_pre_hooks.move_to_end(before)  # type: ignore[attr-defined]
        return handle

    optimizer.register_step_pre_hook = register_step_pre_hook  # type: ignore[method-assign]


def stored_steps(optimizer: torch.optim.Optimizer) -> int:
    """Steps of an optimizer that the complete version on a drive has; 0 without one."""
    stepped = _ATTACHED.get(optimizer)
    return 0 if stepped is None or stepped._drive is None else stepped._drive.steps


def _as_before(key: str, value: Any, held: Any, p: torch.Tensor) -> Any:
    """An entry of the state, as a DTensor where it is laid out like its parameter."""
    if isinstance(held, DTensor) and held._local_tensor is value:
        return held
    if held is value or not isinstance(p, DTensor) or not isinstance(value, torch.Tensor):
        return value
    if value.shape != p._local_tensor.shape or key == "step":
        return value
    laid_out = DTensor.from_local(
        value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return ShardedState.of(value, laid_out._spec)  # the step's own tensor, not a view of it
