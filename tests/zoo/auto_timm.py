"""timm by itself: of every file of architectures, the smallest entry point that trains."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from tests.zoo.auto import NotBuilt, why_not
from tests.zoo.family import Family
from tests.zoo.timm_rows import CLASSES, Classifier, draw

# what tells a small entry point, the smallest first
_SMALL = re.compile(
    r"test_|zepto|atto|femto|pico|nano|xxs|xx_small|xtiny|xs|mini|tiny|_s|_b0|_m0|_t0"
)
_TRIED = 6
LARGEST = 60e6
# what constructors call their depth; the first that one accepts is taken
_SHALLOW: tuple[dict[str, Any], ...] = (
    {"depths": (1, 1, 1, 1)},
    {"depth": 2},
    {"layers": (1, 1, 1, 1)},
    {"num_blocks": 2},
    {},
)
_SIZES = (64, 96, 128, 224, 240, 256)


@functools.cache
def modules() -> dict[str, tuple[str, ...]]:
    """File of timm.models to its entry points, those that sound small first."""
    import timm

    by_module: dict[str, list[str]] = defaultdict(list)
    for entry in timm.list_models():
        by_module[module_of(entry)].append(entry)
    return {module: tuple(sorted(entries, key=_rank)) for module, entries in by_module.items()}


def module_of(entry: str) -> str:
    """The file that an entry point is defined in."""
    from timm.models import model_entrypoint

    return model_entrypoint(entry).__module__.rpartition(".")[2]


def _rank(entry: str) -> tuple[int, int]:
    named = _SMALL.search(entry)
    order = _SMALL.pattern.split("|")
    digits = [int(n) for n in re.findall(r"\d+", entry)]
    return (order.index(named[0]) if named else len(order), max(digits, default=0))


def family(module: str) -> Family:
    """The first entry point of the module that trains, shallow and on small images if it can.

    Raises:
        NotBuilt: none does.
    """
    reasons = []
    for entry in modules()[module][:_TRIED]:
        for shallow in _SHALLOW:
            for size in _SIZES:
                make = functools.partial(_make, entry, size, shallow)
                family = Family(module, "timm", entry, make, draw)
                reason = why_not(family)
                if reason is None:
                    return family
                reasons.append(f"{entry}, {shallow}, {size}: {reason}")
                if "unexpected keyword" in reason or "multiple values" in reason:
                    break
    raise NotBuilt("; ".join(dict.fromkeys(reasons)))


def _make(entry: str, size: int, shallow: dict[str, Any]) -> nn.Module:
    import timm

    create = functools.partial(
        timm.create_model, entry, pretrained=False, num_classes=CLASSES, **shallow
    )
    for sized in ({"img_size": size}, {}):
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in create(**sized).parameters())
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            continue
        except (RuntimeError, NotImplementedError):  # initializes by value, which meta has not
            count = 0
        if count > LARGEST:
            raise NotBuilt(f"{count / 1e6:.0f} million parameters")
        return Classifier(create(**sized), size)
    raise AssertionError("one of the two is accepted")
