"""transformers: a `Trainer` that trains autopar's engines.

    trainer = Trainer(model, TrainingArguments(...), autopar_plugin=AutoparPlugin("2x2"))
    trainer.train()

Checkpoints are those of one process: whole weights and optimizer state, gathered on all ranks and
written by rank 0. So they resume on another mesh, or on one device without autopar.

`transformers.trainer.Accelerator` is patched while a trainer is made, since `Trainer` has no other
way to take one; tested with transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from transformers import trainer as hf_trainer

from autopar.errors import EngineError
from autopar.integrations.accelerate import Accelerator
from autopar.integrations.plugin import AutoparPlugin, load_random_states, save_random_states
from autopar.runtime.auto_engine import unwrapped

# What stands behind the end of a sequence.
_FILLS = {"attention_mask": 0, "labels": -100, "token_type_ids": 0}


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

    def _prepare_inputs(self, inputs: Any) -> Any:
        return self._padded(super()._prepare_inputs(inputs))

    def _padded(self, inputs: Any) -> Any:
        """Inputs of the longest sample of all ranks' batches. A collator pads to that of this
        rank's; what is added is masked."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return inputs
        length = mask.shape[1]
        longest = int(self.accelerator.gather(torch.tensor([length], device=mask.device)).max())
        token = getattr(self.model.config, "pad_token_id", None)
        fills = {**_FILLS, "input_ids": token if isinstance(token, int) else 0}
        return {
            name: F.pad(x, (0, longest - length), value=fills[name])
            if name in fills and isinstance(x, torch.Tensor) and x.shape[1:] == (length,)
            else x
            for name, x in inputs.items()
        }

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """A loss that the model returns is that of all ranks' samples. One that is computed from
        its results (label smoothing, `compute_loss_func`) is this rank's part of it."""
        inputs = args[1] if len(args) > 1 else kwargs["inputs"]
        smooths = self.label_smoother is not None and "labels" in inputs
        if smooths or self.compute_loss_func is not None:
            return super().compute_loss(*args, **kwargs)
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
