"""Lightning and Fabric: strategies whose modules are autopar's engines.

    trainer = Trainer(strategy=AutoparStrategy(AutoparPlugin("2x2")), devices=4)
    fabric = Fabric(strategy=FabricStrategy(AutoparPlugin("2x2")), devices=4)

A `LightningModule` logs and calls its trainer in `training_step`, which no program can. So its
submodules become engines, and what it computes with their results stays as it is: each rank has
samples of its own, as with DDP. Checkpoints have whole tensors, as those of one process.

Tested with lightning 2.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from autopar.errors import EngineError
from autopar.integrations.plugin import AutoparPlugin, whole_tensors
from autopar.runtime.engine import Engine

_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)


def distribute_submodules(module: torch.nn.Module, plugin: AutoparPlugin) -> None:
    """Put engines in the place of submodules that have parameters.

    Raises:
        EngineError: the module has parameters of its own, which no engine would train.
    """
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise EngineError(
            f"{type(module).__name__} has parameters of its own ({', '.join(own[:4])}), and only "
            "its submodules are distributed; put them into a submodule with a forward"
        )
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            distribute_submodules(child, plugin)
        elif not isinstance(child, Engine) and any(True for _ in child.parameters()):
            module._modules[name] = plugin.engine(child, None)


class AutoparStrategy(DDPStrategy):
    """Lightning's strategy for a mesh.

    Args:
        plugin: how modules are distributed.
        kwargs: those of `DDPStrategy`.
    """

    strategy_name = "autopar"

    def __init__(self, plugin: AutoparPlugin, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plugin = plugin
        self._random_states: list[torch.Tensor] = []  # of a checkpoint, from which engines draw

    def _engines(self) -> list[Engine]:
        assert self.model is not None
        return [m for m in self.model.modules() if isinstance(m, Engine)]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Beside the whole tensors, the states from which engines draw (dropout)."""
        checkpoint["autopar_random"] = [engine.get_random_state() for engine in self._engines()]
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._random_states = checkpoint.get("autopar_random", [])
        return checkpoint

    def setup(self, trainer: Any) -> None:
        """Distribute the module, also for validation alone, and make its optimizers."""
        assert self.accelerator is not None
        assert self.model is not None
        self.plugin.check_processes(self.world_size)
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        distribute_submodules(self.model, self.plugin)
        for engine, state in zip(self._engines(), self._random_states, strict=False):
            engine.set_random_state(state)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors, on all ranks."""
        return whole_tensors(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole tensors, on all ranks."""
        return whole_tensors(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=False):
            optimizer.load_state_dict(state)

    def teardown(self) -> None:
        """Leave the module distributed where it is."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


class FabricStrategy(FabricDDPStrategy):
    """Fabric's strategy for a mesh.

    Args:
        plugin: how modules are distributed.
        kwargs: those of `DDPStrategy`.
    """

    def __init__(self, plugin: AutoparPlugin, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plugin = plugin
        self._backward_sync_control = None  # gradients are those of all ranks at every backward

    def setup_module(self, module: torch.nn.Module) -> Any:
        self.plugin.check_processes(self.world_size)
        return self.plugin.engine(module, None)

    def get_module_state_dict(self, module: torch.nn.Module) -> dict[str, Any]:
        """Whole tensors, on all ranks."""
        return whole_tensors(module.state_dict())

    def get_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole tensors, on all ranks."""
        return whole_tensors(super().get_optimizer_state(optimizer))

    def load_module_state_dict(
        self, module: torch.nn.Module, state_dict: dict[str, Any], strict: bool = True
    ) -> None:
        module.load_state_dict(state_dict, strict=strict)

    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The norm over all parameters, whole on every rank."""
        norm: Any = super().clip_gradients_norm(*args, **kwargs)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


__all__ = ["AutoparPlugin", "AutoparStrategy", "FabricStrategy", "distribute_submodules"]
