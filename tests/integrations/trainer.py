"""What transformers' `Trainer` does, by action."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2LMHeadModel, TrainingArguments

from tests.integrations.language_model import (
    HELD_OUT,
    Sequences,
    generated,
    language_model,
    padded,
    parameters,
)

STEPS = 4


def _trainer(
    folder: Path, plugin: Any, ranks: int, *, dropout: float = 0.0, collator: Any = None,
    **options: Any,
) -> Any:  # fmt: skip
    dtype = torch.float32 if options.get("bf16") else torch.float64
    per_rank = 8 // ranks // options.get("gradient_accumulation_steps", 1)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=per_rank,
        per_device_eval_batch_size=8 // ranks, max_steps=STEPS, logging_steps=1, save_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-3, warmup_steps=2, seed=3,
        **options,
    )  # fmt: skip
    data = {
        "train_dataset": Sequences(), "eval_dataset": Sequences(HELD_OUT),
        "data_collator": collator,
    }  # fmt: skip
    if plugin is None:
        return transformers.Trainer(language_model(dtype, dropout), arguments, **data)
    from autopar.integrations.transformers import Trainer

    return Trainer(language_model(dtype, dropout), arguments, **data, autopar_plugin=plugin)


def _logged(trainer: Any, name: str) -> torch.Tensor:
    return torch.tensor([entry[name] for entry in trainer.state.log_history if name in entry])


def _resumed_with_dropout(folder: Path, plugin: Any, ranks: int) -> torch.Tensor:
    """How far a resumed run is from one that was not interrupted."""
    whole, resumed = (_trainer(folder, plugin, ranks, dropout=0.1) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return parameters(resumed.model) - parameters(whole.model)


def run(folder: Path, plugin: Any, ranks: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Actions and their results."""
    trainer = _trainer(
        folder / "main", plugin, ranks, max_grad_norm=0.5, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    yield "train", parameters(trainer.model)
    yield "clip", _logged(trainer, "grad_norm").double()
    yield "evaluate", _logged(trainer, "eval_loss").double()
    yield "predict", torch.from_numpy(trainer.predict(Sequences(HELD_OUT)).predictions)
    trainer.save_model(str(folder / "saved"))
    trainer.accelerator.wait_for_everyone()
    yield "save", parameters(GPT2LMHeadModel.from_pretrained(folder / "saved"))
    yield "generate", generated(trainer.model)

    resumed = _trainer(folder / "main", plugin, ranks, max_grad_norm=0.5)
    resumed.train(resume_from_checkpoint=str(folder / "main" / "checkpoint-2"))
    yield "resume", parameters(resumed.model)
    yield "resume with dropout", _resumed_with_dropout(folder / "dropout", plugin, ranks)

    smoothing = _trainer(folder / "smoothed", plugin, ranks, label_smoothing_factor=0.1)
    smoothing.train()
    yield "label smoothing", parameters(smoothing.model)

    padding = _trainer(folder / "padded", plugin, ranks, collator=padded)
    padding.train()
    yield "dynamic padding", parameters(padding.model)

    accumulating = _trainer(folder / "accumulated", plugin, ranks, gradient_accumulation_steps=2)
    accumulating.train()
    yield "accumulate", parameters(accumulating.model)

    mixed = _trainer(folder / "bf16", plugin, ranks, bf16=True)
    mixed.train()
    yield "bf16", _logged(mixed, "loss").double()
