"""Accelerate: an `Accelerator` whose models are autopar's engines.

    accelerator = Accelerator(autopar_plugin=AutoparPlugin("2x2"))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Accelerate gives every rank samples of its own, as with DDP. So the engine takes local batches. The
loss of a step is that of the samples of all ranks, on every rank.

Tested with accelerate 1.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import MutableSequence, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import MODEL_NAME, SAFE_MODEL_NAME, convert_to_fp32
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from autopar.cluster.local import as_cluster
from autopar.errors import EngineError
from autopar.integrations.plugin import (
    AutoparPlugin,
    load_random_states,
    save_random_states,
    whole_tensors,
)
from autopar.runtime.engine import Engine


class _Optimizer(AcceleratedOptimizer):
    """Its state dict has whole tensors, as one process would save them."""

    def state_dict(self) -> Any:
        return whole_tensors(super().state_dict())


class Accelerator(accelerate.Accelerator):
    """`accelerate.Accelerator`, with engines in the place of DistributedDataParallel.

    Args:
        autopar_plugin: how models are distributed.
        args, kwargs: those of `accelerate.Accelerator`.

    Raises:
        EngineError: mixed precision other than bf16, or other plugins for distributed models.
    """

    def __init__(self, *args: Any, autopar_plugin: AutoparPlugin, **kwargs: Any) -> None:
        if as_cluster(autopar_plugin.cluster).device.kind == "cpu":
            kwargs["cpu"] = True  # or Accelerate takes several CPU ranks for one process
        super().__init__(*args, **kwargs)
        self.autopar_plugin = autopar_plugin
        autopar_plugin.check_processes(self.num_processes)
        if self.mixed_precision not in ("no", "bf16"):
            raise EngineError(
                f"mixed_precision={self.mixed_precision!r} is not supported; use 'bf16'"
            )
        kinds = (accelerate.DistributedType.DEEPSPEED, accelerate.DistributedType.FSDP)
        if self.distributed_type in (*kinds, accelerate.DistributedType.MEGATRON_LM):
            raise EngineError(
                f"Accelerate is configured for {self.distributed_type.value}, and autopar "
                "distributes the model instead; run the script by torchrun, or configure "
                "Accelerate for plain multi-GPU or multi-CPU training"
            )
        self.register_save_state_pre_hook(
            lambda models, _, folder: save_random_states(models, folder)
        )
        self.register_load_state_pre_hook(_load_models)

    def prepare(self, *args: Any, device_placement: Any = None) -> Any:
        """Models become engines. An optimizer is prepared beside its model, or after it."""
        optimizers = [x for x in args if isinstance(x, torch.optim.Optimizer)]
        for model in (x for x in args if isinstance(x, torch.nn.Module)):
            self._distribute(model, _optimizer_of(model, optimizers))
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(
        self, model: torch.nn.Module, device_placement: Any = None, evaluation_mode: bool = False
    ) -> torch.nn.Module:
        return self._distribute(model, None)

    def _distribute(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> torch.nn.Module:
        for known in self._models:
            if known is model or vars(known) is vars(model):  # an engine shares it with its model
                return known
        engine = model if isinstance(model, Engine) else self._engine_of(model, optimizer)
        self._models.append(engine)
        return engine

    def _engine_of(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Engine:
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        engine = self.autopar_plugin.engine(model, optimizer)
        if self.mixed_precision == "bf16":
            engine.run_within(partial(torch.autocast, self.device.type, torch.bfloat16))
            engine.register_forward_hook(lambda module, args, result: convert_to_fp32(result))
        return engine

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: Any = None
    ) -> AcceleratedOptimizer:
        if getattr(optimizer, "_is_accelerate_prepared", False):
            return optimizer
        prepared = _Optimizer(optimizer, device_placement=False, scaler=self.scaler)
        self._optimizers.append(prepared)
        return prepared

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """The norm over all parameters, whole on every rank."""
        norm = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextlib.contextmanager
    def no_sync(self, model: torch.nn.Module) -> Any:
        """Gradients are those of all ranks at every backward; accumulation adds them up."""
        yield

    def get_state_dict(self, model: torch.nn.Module, unwrap: bool = True) -> Any:
        """Whole tensors, on all ranks. All ranks call this."""
        return whole_tensors(model.state_dict())


def _optimizer_of(
    model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> torch.optim.Optimizer | None:
    """The one among optimizers that trains a model's parameters, and no other model's."""
    parameters = {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if trained and all(id(p) in parameters for p in trained):
            return optimizer
    return None  # optimizers of several models take the parameters in place when they step


def _load_models(models: MutableSequence[torch.nn.Module], folder: str) -> None:
    """Load whole tensors into engines, where Accelerate would compare the addresses of shards."""
    load_random_states(models, folder)
    for k, model in enumerate(models):
        suffix = f"_{k}" if k else ""
        safe = Path(folder) / f"{SAFE_MODEL_NAME}{suffix}.safetensors"
        plain = Path(folder) / f"{MODEL_NAME}{suffix}.bin"
        if not safe.exists() and not plain.exists():
            raise EngineError(
                f"{folder} has no weights of a model: neither {safe.name} nor {plain.name}"
            )
        state = load_file(safe) if safe.exists() else torch.load(plain, weights_only=True)
        missing, unexpected = model.load_state_dict(state, strict=False)
        loaded = {id(p) for name, p in _named_values(model) if name in state}
        missing = [n for n, p in _named_values(model) if n in missing and id(p) not in loaded]
        if missing or unexpected:
            raise EngineError(
                f"the weights in {folder} are not those of {type(model).__name__}: missing "
                f"{missing[:4]}, unexpected {unexpected[:4]}"
            )
    models.clear()


def _named_values(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, tied ones by each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return [*parameters, *model.named_buffers(remove_duplicate=False)]
