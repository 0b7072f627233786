"""Models and plans that several tests of the planner share."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from autopar.planner.baselines import BaselinePlan
from autopar.planner.decisions import Edge
from autopar.planner.space import SearchSpace


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Four blocks, a buffer, and a table that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(16) for _ in range(4)))
        self.table = nn.Embedding(32, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.ones(16))

    def forward(self, ids, y):
        logits = self.head(self.blocks(self.table(ids) * self.scale))
        return F.cross_entropy(logits, y), logits


BATCH = {"ids": torch.zeros(8, dtype=torch.long), "y": torch.zeros(8, dtype=torch.long)}


class NormedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """Some blocks with a norm, and a loss."""

    def __init__(self, width: int, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(NormedBlock(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 1000)

    def forward(self, x, y):
        return F.cross_entropy(self.head(self.blocks(x)), y)


def by_name(plans: list[BaselinePlan], prefix: str) -> BaselinePlan:
    """The plan of the first baseline whose name begins so."""
    return next(p for p in plans if p.name.startswith(prefix))


def random_choices(space: SearchSpace, rng: np.random.Generator) -> tuple[int, ...]:
    """A uniformly drawn candidate per decision; shared layouts are drawn last, among those that all
    conversions exist for."""
    touching: dict[int, list[Edge]] = defaultdict(list)
    for edge in space.edges:
        touching[edge.source].append(edge)
        touching[edge.target].append(edge)
    choices = [int(rng.integers(len(d.candidates))) for d in space.decisions]
    for i, decision in enumerate(space.decisions):
        if decision.kind == "shared":
            allowed = np.ones(len(decision.candidates), dtype=bool)
            for edge in touching[i]:
                time_us = space.edge_costs(edge).time_us
                if edge.source == i:
                    allowed &= np.isfinite(time_us[:, choices[edge.target]])
                else:
                    allowed &= np.isfinite(time_us[choices[edge.source]])
            choices[i] = int(rng.choice(np.flatnonzero(allowed)))
    return tuple(choices)
