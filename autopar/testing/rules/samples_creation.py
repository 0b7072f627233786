"""Calls of ops that make tensors from nothing but numbers."""

from __future__ import annotations

import torch

from autopar.testing.rules.draw import Arguments, Draw, sampler
from autopar.testing.rules.rows import any_kind, calls, matching, normal, one_of, size

_FLOAT = torch.float64


def _any_shape(draw: Draw, shape: list[int]) -> list[int]:
    return shape if draw.chance() else draw.shape(0, 3)


calls(
    "new_zeros.default new_ones.default new_empty.default",
    (0, 3), any_kind, _any_shape, dtype=one_of(None, torch.int64),
)  # fmt: skip
calls("new_full.default", (0, 3), normal, _any_shape, 1.5)
calls(
    "zeros.default ones.default rand.default randn.default empty.memory_format",
    (0, 3), matching, dtype=_FLOAT,
)  # fmt: skip
calls("full.default", (0, 3), matching, one_of(2, -1.5), dtype=_FLOAT)
calls("arange.default randperm.default eye.default", (0, 0), size)
calls("eye.m tril_indices.default triu_indices.default", (0, 0), size, size)
calls("linspace.default", (0, 0), 0.0, 1.0, size, dtype=_FLOAT)
calls("scalar_tensor.default", (0, 0), one_of(1.5, 2.0), dtype=_FLOAT)
calls("hann_window.default", (0, 0), size, dtype=_FLOAT)
calls("randint.default", (0, 3), 9, matching)
calls("randint.low", (0, 3), 2, 9, matching)


@sampler("aten.arange.start", "aten.arange.start_step")
def _arange(draw: Draw) -> Arguments:
    start = draw.integer(0, 3)
    return (start, start + draw.size()), {}
