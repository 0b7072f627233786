"""What a training loop on Accelerate does, by action."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import safetensors.torch
import torch
import torch.nn.functional as F

from tests.integrations.language_model import (
    HELD_OUT,
    Sequences,
    generated,
    language_model,
    parameters,
)

STEPS = 4


class Run:
    """A model, its optimizer, schedule and data, prepared by an accelerator.

    Args:
        accumulated: batches of a step.
        max_norm: of gradients.
    """

    def __init__(
        self, plugin: Any, ranks: int, *, accumulated: int = 1, max_norm: float | None = None,
        bf16: bool = False, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        accelerate.state.AcceleratorState._reset_state()
        options: dict[str, Any] = {
            "cpu": plugin is None, "gradient_accumulation_steps": accumulated,
            "mixed_precision": "bf16" if bf16 else "no",
        }  # fmt: skip
        if plugin is None:
            self.accelerator = accelerate.Accelerator(**options)
        else:
            from autopar.integrations.accelerate import Accelerator

            self.accelerator = Accelerator(**options, autopar_plugin=plugin)
        self.max_norm = max_norm
        model = language_model(torch.float32 if bf16 else torch.float64, dropout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        # per step of one process; Accelerate steps it once per rank
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.9 ** (k // ranks))
        train = torch.utils.data.DataLoader(Sequences(), batch_size=8 // ranks // accumulated)
        held_out = torch.utils.data.DataLoader(Sequences(HELD_OUT), batch_size=8 // ranks)
        self.model, self.optimizer, self.schedule, self.train_data, self.held_out = (
            self.accelerator.prepare(model, optimizer, schedule, train, held_out)
        )
        self.norms: list[float] = []
        self.losses: list[float] = []

    def train(self, first: int = 0, last: int = STEPS) -> None:
        """Steps from `first` to `last`, with a loss outside of the model in every second step."""
        count = self.accelerator.gradient_accumulation_steps
        batches = itertools.islice(self.train_data, first * count, last * count)
        self.model.train()
        for k, batch in enumerate(batches, first * count):
            with self.accelerator.accumulate(self.model):
                loss = self._loss(batch, outside=k // count % 2 == 1)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.max_norm is not None:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
                    self.norms.append(float(norm))
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.losses.append(float(self.accelerator.reduce(loss.detach(), "mean")))

    def _loss(self, batch: dict[str, torch.Tensor], *, outside: bool) -> torch.Tensor:
        ids = batch["input_ids"]
        if not outside:
            return self.model(input_ids=ids, labels=ids).loss
        logits = self.model(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self) -> torch.Tensor:
        """Logits of all sequences held out."""
        self.model.eval()
        logits = [self.model(input_ids=batch["input_ids"]).logits for batch in self.held_out]
        return torch.cat([self.accelerator.gather_for_metrics(x) for x in logits])


def _resumed_with_dropout(folder: Path, plugin: Any, ranks: int) -> torch.Tensor:
    """How far a resumed run is from one that was not interrupted."""
    whole = Run(plugin, ranks, dropout=0.1)
    whole.train(0, 2)
    whole.accelerator.save_state(str(folder))
    whole.train(2, STEPS)
    resumed = Run(plugin, ranks, dropout=0.1)
    resumed.accelerator.load_state(str(folder))
    resumed.train(2, STEPS)
    return parameters(resumed.model) - parameters(whole.model)


def run(folder: Path, plugin: Any, ranks: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Actions and their results."""
    main = Run(plugin, ranks, max_norm=0.5)
    main.train(0, 2)
    main.accelerator.save_state(str(folder / "state"))
    main.train(2, STEPS)
    yield "train", parameters(main.model)
    yield "clip", torch.tensor(main.norms, dtype=torch.float64)
    yield "evaluate", main.evaluate()
    main.accelerator.save_model(main.model, str(folder / "saved"))
    main.accelerator.wait_for_everyone()
    saved = language_model()
    state = safetensors.torch.load_file(folder / "saved" / "model.safetensors")
    saved.load_state_dict(state, strict=False)
    yield "save", parameters(saved)
    yield "generate", generated(main.accelerator.unwrap_model(main.model))

    resumed = Run(plugin, ranks, max_norm=0.5)
    resumed.accelerator.load_state(str(folder / "state"))
    resumed.train(2, STEPS)
    yield "resume", parameters(resumed.model)
    yield "resume with dropout", _resumed_with_dropout(folder / "dropout", plugin, ranks)

    accumulating = Run(plugin, ranks, accumulated=2)
    accumulating.train()
    yield "accumulate", parameters(accumulating.model)

    mixed = Run(plugin, ranks, bf16=True)
    mixed.train()
    yield "bf16", torch.tensor(mixed.losses, dtype=torch.float64)
