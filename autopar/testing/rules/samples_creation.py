"""Calls of ops that make tensors from nothing but numbers."""

from __future__ import annotations

import torch

from autopar.testing.rules.draw import Arguments, Draw, sampler


@sampler("aten.new_zeros.default", "aten.new_ones.default", "aten.new_empty.default")
def _new(draw: Draw) -> Arguments:
    shape = draw.shape(0, 3)
    size = shape if draw.chance() else draw.shape(0, 3)
    return (draw.any_kind(shape), size), draw.choice([{}, {"dtype": torch.int64}])


@sampler("aten.new_full.default")
def _new_full(draw: Draw) -> Arguments:
    return (draw.normal(*draw.shape(0, 3)), draw.shape(0, 3), 1.5), {}


@sampler(
    *(f"aten.{n}.default" for n in ("zeros", "ones", "rand", "randn")), "aten.empty.memory_format"
)
def _sized(draw: Draw) -> Arguments:
    return (draw.shape(0, 3),), {"dtype": torch.float64}


@sampler("aten.full.default")
def _full(draw: Draw) -> Arguments:
    return (draw.shape(0, 3), draw.choice([2, -1.5])), {"dtype": torch.float64}


@sampler("aten.arange.default", "aten.randperm.default", "aten.eye.default")
def _counted(draw: Draw) -> Arguments:
    return (draw.size(),), {}


@sampler("aten.eye.m", "aten.tril_indices.default", "aten.triu_indices.default")
def _two_sizes(draw: Draw) -> Arguments:
    return (draw.size(), draw.size()), {}


@sampler("aten.arange.start", "aten.arange.start_step")
def _arange(draw: Draw) -> Arguments:
    start = draw.integer(0, 3)
    return (start, start + draw.size()), {}


@sampler("aten.linspace.default")
def _linspace(draw: Draw) -> Arguments:
    return (0.0, 1.0, draw.size()), {"dtype": torch.float64}


@sampler("aten.scalar_tensor.default")
def _scalar(draw: Draw) -> Arguments:
    return (draw.choice([1.5, 2.0]),), {"dtype": torch.float64}


@sampler("aten.hann_window.default")
def _hann(draw: Draw) -> Arguments:
    return (draw.size(),), {"dtype": torch.float64}


@sampler("aten.randint.default")
def _randint(draw: Draw) -> Arguments:
    return (9, draw.shape(0, 3)), {}


@sampler("aten.randint.low")
def _randint_low(draw: Draw) -> Arguments:
    return (2, 9, draw.shape(0, 3)), {}
