"""What a training loop on Fabric does, by action."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, DistributedSampler

from tests.integrations.language_model import Sequences, language_model, parameters

STEPS = 4


class Run:
    """A model and its optimizer, set up by Fabric."""

    def __init__(self, plugin: Any, ranks: int, precision: Any = "64-true") -> None:
        options: dict[str, Any] = {}
        if plugin is not None:
            from autopar.integrations.lightning import FabricStrategy

            options["strategy"] = FabricStrategy(plugin)
        self.fabric = Fabric(accelerator="cpu", devices=ranks, precision=precision, **options)
        self.fabric.launch()
        model = language_model(torch.float64 if precision == "64-true" else torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        sampler = DistributedSampler(Sequences(), ranks, self.fabric.global_rank, shuffle=False)
        self.batches = list(DataLoader(Sequences(), 8 // ranks, sampler=sampler))
        self.norms: list[float] = []
        self.losses: list[float] = []

    def train(self, first: int = 0, last: int = STEPS, accumulated: int = 1) -> None:
        """Steps from `first` to `last`."""
        self.model.train()
        for step in range(first, last):
            for k, batch in enumerate(self.batches[step * accumulated : (step + 1) * accumulated]):
                ids = batch["input_ids"]
                with self.fabric.no_backward_sync(self.model, enabled=k < accumulated - 1):
                    logits = self.model(input_ids=ids).logits
                    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                    self.fabric.backward(loss / accumulated)
            norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=0.5)
            self.norms.append(float(norm))
            self.losses.append(float(self.fabric.all_reduce(loss.detach(), reduce_op="mean")))
            self.optimizer.step()
            self.optimizer.zero_grad()


def run(folder: Path, plugin: Any, ranks: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Actions and their results."""
    main = Run(plugin, ranks)
    main.train(0, 2)
    main.fabric.save(folder / "half.ckpt", {"model": main.model, "optimizer": main.optimizer})
    main.train(2, STEPS)
    yield "train", parameters(main.model)
    yield "clip", torch.tensor(main.norms, dtype=torch.float64)
    saved = language_model()
    saved.load_state_dict(torch.load(folder / "half.ckpt", weights_only=False)["model"])
    yield "save", parameters(saved)

    resumed = Run(plugin, ranks)
    state = {"model": resumed.model, "optimizer": resumed.optimizer}
    resumed.fabric.load(folder / "half.ckpt", state, weights_only=False)
    resumed.train(2, STEPS)
    yield "resume", parameters(resumed.model)

    accumulating = Run(plugin, ranks)
    accumulating.train(last=2, accumulated=2)
    yield "accumulate", parameters(accumulating.model)

    mixed = Run(plugin, ranks, "bf16-mixed")
    mixed.train()
    yield "bf16", torch.tensor(mixed.losses, dtype=torch.float64)
