"""What peft's LoRA does on a model that `auto_engine` distributes, by action."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F

from tests.integrations.language_model import Sequences, generated, language_model, parameters

STEPS = 3


def _adapted() -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    return peft.get_peft_model(language_model(), config).double()


class Run:
    """An adapted model, and the optimizer of what it trains."""

    def __init__(self, plugin: Any, ranks: int, model: Any) -> None:
        self.plugin, self.ranks = plugin, ranks
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.model = model if plugin is None else plugin.engine(model, self.optimizer)

    def train(self) -> None:
        data = Sequences()
        for step in range(STEPS):
            ids = torch.stack([data[k]["input_ids"] for k in range(8 * step, 8 * step + 8)])
            if self.plugin is not None:
                ids = ids.chunk(self.ranks)[torch.distributed.get_rank()]
            logits = self.model(input_ids=ids).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Of the same sequences on all ranks."""
        self.model.eval()
        ids = torch.stack([Sequences()[k]["input_ids"] for k in range(4)])
        return self.model(input_ids=ids).logits.clone()


def run(folder: Path, plugin: Any, ranks: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Actions and their results."""
    main = Run(plugin, ranks, _adapted())
    main.train()
    yield "train", parameters(main.model)
    yield "evaluate", main.logits()
    with main.model.disable_adapter():
        yield "disable_adapter", main.logits()
    yield "generate", generated(main.model)
    main.model.save_pretrained(folder / "adapter")
    if plugin is not None:
        torch.distributed.barrier()
    saved = peft.PeftModel.from_pretrained(language_model(), folder / "adapter").double()
    yield "save", parameters(saved)
    main.model.merge_adapter()
    yield "merge_adapter", main.logits()
