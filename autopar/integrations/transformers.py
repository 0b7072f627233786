"""transformers: a `Trainer` that trains autopar's engines.

    trainer = Trainer(model, TrainingArguments(...), autopar_plugin=AutoparPlugin("2x2"))
    trainer.train()

Checkpoints are those of one process: whole weights and optimizer state, gathered on all ranks and
written by rank 0. So they resume on another mesh, or on one device without autopar.

`transformers.trainer.Accelerator` is patched while a trainer is made, since `Trainer` has no other
way to take one; tested with transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import transformers
from transformers import trainer as hf_trainer

from autopar.errors import EngineError
from autopar.integrations.accelerate import Accelerator
from autopar.integrations.plugin import AutoparPlugin, load_random_states, save_random_states
from autopar.runtime.auto_engine import unwrapped


class Trainer(transformers.Trainer):
    """`transformers.Trainer` on a mesh.

    Args:
        autopar_plugin: how the model is distributed.
        args, kwargs: those of `transformers.Trainer`.

    Raises:
        EngineError: `average_tokens_across_devices=False`, which gives each rank a loss of its own.
    """

    def __init__(self, *args: Any, autopar_plugin: AutoparPlugin, **kwargs: Any) -> None:
        self.autopar_plugin = autopar_plugin
        super().__init__(*args, **kwargs)
        if not self.args.average_tokens_across_devices:
            raise EngineError(
                "average_tokens_across_devices=False gives each rank a loss over its own number "
                "of tokens, and a distributed step has one loss; leave the argument out"
            )

    def create_accelerator_and_postprocess(self) -> None:
        make = partial(Accelerator, autopar_plugin=self.autopar_plugin)
        with mock.patch.object(hf_trainer, "Accelerator", make):
            super().create_accelerator_and_postprocess()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.model = self.model_wrapped  # for evaluation, too
        return prepared

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss is that of all ranks' samples already, not this rank's part of it."""
        with mock.patch.object(self.args, "average_tokens_across_devices", False):
            return super().compute_loss(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._whole_model():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        state = self._whole_state if state_dict is None else state_dict
        super()._save(output_dir, state)

    @contextmanager
    def _whole_model(self) -> Iterator[None]:
        """While on, `_save` has whole tensors and the model without its engine, so that rank 0 can
        write them alone."""
        engine = self.model
        self._whole_state = self.accelerator.get_state_dict(engine)
        self.model = unwrapped(engine)
        try:
            yield
        finally:
            self.model = engine
            del self._whole_state

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_random_states([self.model], output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            load_random_states([self.model], checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self.optimizer.state_dict()  # on all ranks
        with mock.patch.object(self.optimizer, "state_dict", lambda: state):
            super()._save_optimizer_and_scheduler(output_dir)


__all__ = ["AutoparPlugin", "Trainer"]
