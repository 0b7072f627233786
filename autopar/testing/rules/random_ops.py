"""Ops that draw random numbers: their expected results for the ranks' draw.

A rule with `always` replaces torch's generator, so results cannot be compared with torch's
directly. The joined results of the ranks determine the draw. For a fixed draw the op is a
deterministic function, and every rank's result is compared with that function's value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Results = Sequence[torch.Tensor]


def _scale(p: float) -> float:
    return 0.0 if p == 1 else 1 / (1 - p)


def _native_dropout(results: Results, a: Mapping[str, Any]) -> Results:
    if not a.get("train", True):
        return [a["input"].clone(), torch.ones_like(a["input"], dtype=torch.bool)]
    return [a["input"] * results[1] * _scale(a["p"]), results[1]]


def _dropout(results: Results, a: Mapping[str, Any]) -> Results:
    """Samplers draw no zeros, so zeros are the dropped elements."""
    if not a["train"]:
        return [a["input"].clone()]
    return [a["input"] * (results[0] != 0) * _scale(a["p"])]


def _attention(results: Results, a: Mapping[str, Any]) -> Results:
    """Samplers take an identity for the values, so the result is the dropped probabilities."""
    query, key, value = a["query"], a["key"], a["value"]
    if a.get("enable_gqa"):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scale = a.get("scale")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if a.get("is_causal"):
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    mask = a.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return [(scores.softmax(-1) * (results[0] != 0) * _scale(a["dropout_p"])) @ value]


RANDOM: dict[str, Callable[[Results, Mapping[str, Any]], Results]] = {
    "aten.native_dropout.default": _native_dropout,
    "aten.dropout.default": _dropout,
    "aten.scaled_dot_product_attention.default": _attention,
    # the result is the draw: replicas agree, and there is no gradient
    "aten.bernoulli.p": lambda results, arguments: results,
}


def kept_mask(
    name: str, results: Results, a: Mapping[str, Any]
) -> tuple[torch.Tensor, float] | None:
    """The draw as booleans, and the expected share of True; None if nothing is drawn."""
    if name == "aten.bernoulli.p":
        return results[0] != 0, a["p"]
    if name == "aten.native_dropout.default" and a.get("train", True):
        return results[1], 1 - a["p"]
    if name == "aten.dropout.default" and a["train"]:
        return results[0] != 0, 1 - a["p"]
    return None


# Results with undefined elements: only shapes and dtypes are compared.
UNDEFINED = frozenset(
    {"aten.empty_like.default", "aten.new_empty.default", "aten.empty.memory_format"}
)

# Random ops that run on every rank with torch's generator. The trainer seeds it equally on all
# ranks, and so does the proof.
SEEDED = frozenset(
    f"aten.{name}"
    for name in (
        "rand.default randn.default randint.default randint.low randperm.default "
        "rand_like.default randn_like.default"
    ).split()
)
_SEED = 4321


def seed_torch(name: str) -> None:
    """Seed torch before a `SEEDED` op runs, on global tensors or on a rank."""
    if name in SEEDED:
        torch.manual_seed(_SEED)
