"""The timm families that autopar promises to capture, one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.family import Batch, Family

CLASSES, BATCH = 10, 2


class Classifier(nn.Module):
    """An image model with the loss it is trained by."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net = net
        self.size = size

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(images)
        if isinstance(logits, tuple):  # a distilled head beside the classifier
            logits = sum(logits) / len(logits)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def draw(model: nn.Module, generator: torch.Generator) -> Batch:
    assert isinstance(model, Classifier)
    shape = (BATCH, 3, model.size, model.size)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"images": images, "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator)}


@dataclass(frozen=True)
class Timm:
    """An entry point of timm.

    Args:
        name: of the family.
        entry: for `timm.create_model`.
        size: of the image's side.
        overrides: for the constructor.
        sized: whether the constructor takes the size.
    """

    name: str
    entry: str
    size: int = 32
    overrides: Mapping[str, Any] = field(default_factory=dict)
    sized: bool = False

    def make(self) -> nn.Module:
        import timm

        settings = dict(self.overrides) | ({"img_size": self.size} if self.sized else {})
        net = timm.create_model(self.entry, pretrained=False, num_classes=CLASSES, **settings)
        return Classifier(net, self.size)

    def family(self) -> Family:
        return Family(self.name, "timm", "image", self.make, draw)


# timm has no dropout by default; these are the rates of recipes
_RATES = {"drop_rate": 0.1, "drop_path_rate": 0.1}
_TRANSFORMER = {"depth": 2, "embed_dim": 32, "num_heads": 4, **_RATES}
_STAGES = {"depths": (1, 1, 2, 1), **_RATES}
_HEADS = {"num_heads": (1, 2, 2, 4)}

ROWS = (
    Timm("resnet50", "resnet50", 32, {
        **_RATES, "layers": (1, 1, 2, 1), "channels": (8, 16, 16, 32),
    }),
    Timm("efficientnet_b0", "efficientnet_b0", 64, _RATES),
    Timm("mobilenetv3", "mobilenetv3_small_050", 32, {"drop_rate": 0.1}),
    Timm("regnety", "regnety_002", 32, _RATES),
    Timm("vit_small", "vit_small_patch16_224", 32, {**_TRANSFORMER, "patch_size": 8}, sized=True),
    Timm("deit3", "deit3_small_patch16_224", 32, {**_TRANSFORMER, "patch_size": 8}, sized=True),
    Timm("swinv2", "swinv2_tiny_window8_256", 64, {
        **_RATES, "depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4), "window_size": 4,
    }, sized=True),
    Timm("convnextv2", "convnextv2_atto", 32, {**_STAGES, "dims": (8, 16, 24, 32)}),
    Timm("mixer", "mixer_s16_224", 64, _RATES, sized=True),
    Timm("maxvit", "maxvit_pico_rw_256", 64, {
        **_RATES, "depths": (1, 1), "embed_dim": (16, 32), "transformer_dim_head": 8,
    }, sized=True),
    Timm("beit", "beit_base_patch16_224", 32, {**_TRANSFORMER, "patch_size": 8}, sized=True),
    Timm("xcit", "xcit_nano_12_p16_224", 32, _TRANSFORMER, sized=True),
    Timm("pvt_v2", "pvt_v2_b0", 64, {**_STAGES, **_HEADS, "embed_dims": (8, 16, 24, 32)}),
    Timm("densenet", "densenet121", 32, {
        "growth_rate": 8, "block_config": (2, 2, 2, 2), "drop_rate": 0.1, "proj_drop_rate": 0.1,
    }),
    Timm("nfnet", "nfnet_l0", 32, {**_STAGES, "channels": (32, 64, 64, 64), "group_size": 8}),
    Timm("levit", "levit_128s", 64, {
        "embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (2, 2, 4), "key_dim": 8,
        "drop_path_rate": 0.1,
    }, sized=True),
    Timm("eva02", "eva02_tiny_patch14_224", 28, {**_TRANSFORMER, "patch_size": 7}, sized=True),
    Timm("davit", "davit_tiny", 64, {**_STAGES, **_HEADS, "embed_dims": (8, 16, 16, 32)}),
)  # fmt: skip

FAMILIES = tuple(row.family() for row in ROWS)
