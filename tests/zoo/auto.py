"""Families that are enumerated: every model type of transformers, every architecture of timm.

A family is looked for in the worker that tries it: the head by which the library trains the type,
the smallest configuration that runs forward and backward, a batch that fits it. What does not run
in eager mode is `NotBuilt`, with the reasons.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import nn

from tests.zoo import assignment, auto_inputs, check
from tests.zoo.family import Family
from tests.zoo.shrink import shrunk

# by which head a type is tried: the first of these mappings that has it
HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "CTC",
    "SPEECH_SEQ_2_SEQ",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "MASKED_IMAGE_MODELING",
    "SEQUENCE_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "TIME_SERIES_PREDICTION",
    "MULTIMODAL_LM",
)
LARGEST = 60e6
_TRIES = ("all", "depth")
_DTYPES = (torch.float64, torch.float32)


class NotBuilt(Exception):
    """No configuration of the family runs in eager mode; the message has one reason per try."""


@functools.cache
def hf_types() -> dict[str, tuple[str, str]]:
    """Model type to head and class name, for every type that has a head."""
    from transformers.models.auto import modeling_auto

    heads: dict[str, tuple[str, str]] = {}
    for head in HEADS:
        names = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")
        for kind, classes in names.items():
            name = classes if isinstance(classes, str) else classes[0]
            heads.setdefault(kind, (head, name))
    return heads


def hf_family(name: str) -> Family:
    """The type's smallest configuration that trains.

    Raises:
        NotBuilt: none does.
    """
    import transformers

    head, class_name = hf_types()[name]
    cls = getattr(transformers, class_name)
    assignment.install(cls.__module__)
    reasons = []
    # with labels rather than without, in float64 rather than float32, small rather than large
    for draw, dtype, level in itertools.product(auto_inputs.DRAW[head], _DTYPES, _TRIES):
        make = functools.partial(_hf_model, cls, level, dtype)
        family = Family(name, "hf", head.lower(), make, draw, dtype)
        reason = why_not(family)
        if reason is None:
            return family
        reasons.append(f"{level}, {str(dtype)[6:]}: {reason}")
    raise NotBuilt("; ".join(dict.fromkeys(reasons)))


def _hf_model(cls: Any, level: str, dtype: torch.dtype) -> nn.Module:
    plain = cls.config_class()
    config = shrunk(plain, auto_inputs.overrides(plain), level=level)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > LARGEST:
        raise NotBuilt(f"{count / 1e6:.0f} million parameters")
    model = cls(config)
    if dtype is torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped products do without float64
    return model


def why_not(family: Family) -> str | None:
    """Why the family does not train in eager mode; None if it does."""
    try:
        model = family.build()
        check.step(model, model, family.batch(model))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a missing optional dependency of transformers is one
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {first[:160]}"
    return None
