"""Ops that create tensors from numbers. Every rank creates the global tensor, without
communication.

If an operand only determines dtype and device, its layout does not matter.
"""

from __future__ import annotations

from autopar.sharding.rule import Row

ROWS: dict[str, Row | tuple[Row, ...]] = {
    **{
        f"aten.{name}": Row(" -> ...")
        for name in (
            "arange.default arange.start arange.start_step zeros.default ones.default full.default "
            "empty.memory_format eye.default eye.m linspace.default scalar_tensor.default "
            "rand.default randn.default randint.default randint.low randperm.default "
            "tril_indices.default triu_indices.default hann_window.default"
        ).split()
    },
    **{
        f"aten.{name}.default": Row("*d:complete -> ...")
        for name in ("new_zeros", "new_ones", "new_full", "new_empty")
    },
}
