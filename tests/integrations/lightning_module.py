"""What a `LightningModule` does under Lightning's `Trainer`, by action."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DistributedSampler

from tests.integrations.language_model import (
    HELD_OUT,
    Sequences,
    generated,
    language_model,
    parameters,
)

STEPS = 4


class Module(pl.LightningModule):
    """A language model whose loss is computed outside of it, and a head for its logits."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.model = language_model(dtype)
        self.heads = torch.nn.ModuleList([torch.nn.Linear(96, 96, dtype=dtype)])
        self.losses: list[float] = []
        self.validated: list[float] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.heads[0](self.model(input_ids=ids).logits)

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: dict[str, torch.Tensor], k: int) -> torch.Tensor:
        loss = self._loss(batch["input_ids"])
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))

    def validation_step(self, batch: dict[str, torch.Tensor], k: int) -> None:
        self.log("validated", self._loss(batch["input_ids"]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(float(self.trainer.callback_metrics["validated"]))

    def predict_step(self, batch: dict[str, torch.Tensor], k: int) -> torch.Tensor:
        return self(batch["input_ids"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def _trainer(folder: Path, plugin: Any, ranks: int, steps: int = STEPS, **options: Any) -> Any:
    if plugin is not None:
        from autopar.integrations.lightning import AutoparStrategy

        options["strategy"] = AutoparStrategy(plugin)
    return pl.Trainer(
        accelerator="cpu", devices=ranks, max_steps=steps, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=1, val_check_interval=2, use_distributed_sampler=False, **options,
    )  # fmt: skip


def _data(ranks: int, batches: int = 1) -> tuple[Any, Any]:
    """Data in order, of which each process of `ranks` takes every so many samples. (Lightning's own
    sampler would shuffle them on several ranks.)"""
    rank = int(os.environ.get("RANK", "0"))

    def loader(data: Sequences, size: int) -> Any:
        sampler = DistributedSampler(data, ranks, rank, shuffle=False)
        return torch.utils.data.DataLoader(data, size, sampler=sampler)

    return loader(Sequences(), 8 // ranks // batches), loader(Sequences(HELD_OUT), 8 // ranks)


def _predictions(trainer: Any, module: Any, data: Any) -> torch.Tensor:
    """Of all ranks, which have every so many samples."""
    mine = torch.cat(trainer.predict(module, data))
    if trainer.world_size == 1:
        return mine
    return trainer.strategy.all_gather(mine).transpose(0, 1).flatten(0, 1)


def run(folder: Path, plugin: Any, ranks: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Actions and their results."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module()
    trainer = _trainer(folder, plugin, ranks, gradient_clip_val=0.5)
    trainer.fit(module, *_data(ranks))
    yield "train, clip", parameters(module)
    yield "evaluate", torch.tensor(module.validated, dtype=torch.float64)
    yield "predict", _predictions(trainer, module, _data(ranks)[1])
    trainer.save_checkpoint(folder / "whole.ckpt")
    saved = Module()
    state = torch.load(folder / "whole.ckpt", weights_only=False)["state_dict"]
    saved.load_state_dict(state)
    yield "save", parameters(saved)
    yield "generate", generated(module.model)

    first = _trainer(folder, plugin, ranks, 2, gradient_clip_val=0.5)
    first.fit(Module(), *_data(ranks))
    first.save_checkpoint(folder / "half.ckpt")
    resumed = Module()
    second = _trainer(folder, plugin, ranks, gradient_clip_val=0.5)
    second.fit(resumed, *_data(ranks), ckpt_path=folder / "half.ckpt", weights_only=False)
    yield "resume", parameters(resumed)

    accumulated = Module()
    _trainer(folder, plugin, ranks, accumulate_grad_batches=2).fit(accumulated, *_data(ranks, 2))
    yield "accumulate", parameters(accumulated)

    mixed = Module(torch.float32)
    _trainer(folder, plugin, ranks, precision="bf16-mixed").fit(mixed, *_data(ranks))
    yield "bf16", torch.tensor(mixed.losses, dtype=torch.float64)
