"""A classifier with its loss inside, for the command line:

autopar plan examples/mlp.py --mesh 4
"""

import torch
from torch import nn

BATCH, FEATURES, CLASSES, BLOCKS = 4096, 1024, 1000, 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(FEATURES) for _ in range(BLOCKS)))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.blocks(x)), labels)


def build_model() -> nn.Module:
    return Classifier()


def example_inputs() -> dict[str, torch.Tensor]:
    x = torch.zeros(BATCH, FEATURES)
    labels = torch.zeros(BATCH, dtype=torch.long)
    return {"x": x, "labels": labels}
