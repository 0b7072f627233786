"""Holds the kernels of the table to plain torch in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.cluster.device import DEVICES
from autopar.ir.graph import ModelGraph
from autopar.kernels.substitute import substitute_kernels
from autopar.passes.split_regions import with_shapes
from autopar.tracer import ColoTracer

if TYPE_CHECKING:
    from autopar.kernels.table import KernelRow


class Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: Tensor) -> Any:
        return self.function(*operands)


def with_kernels(function: Callable[..., Any], operands: Sequence[Tensor]) -> fx.GraphModule:
    """A function of tensors, captured, with kernels wherever they move fewer bytes: they are
    substituted as for a device whose launches take no time. It returns a tuple."""
    return with_kernels_in_model(Function(function), {}, operands).gm


def with_kernels_in_model(
    model: nn.Module, inputs: Mapping[str, Any], positional: Sequence[Any] = ()
) -> ModelGraph:
    """A model, captured, with kernels substituted in the same way."""
    graph = ColoTracer().trace(model, tuple(positional), dict(inputs))
    values = [n.meta["val"] for n in graph.placeholders.values()]
    slow = replace(DEVICES["cpu"], kind=values[0].device.type, bandwidth=1.0, launch_us=0.0)
    gm = substitute_kernels(with_shapes(graph.gm, values), device=slow)
    gm.recompile()
    return replace(graph, gm=gm)


def kernels_in(gm: fx.GraphModule) -> list[str]:
    """The names of the operators in a program that launch kernels."""
    return [name for name in map(_kernel, (n.target for n in gm.graph.nodes)) if name]


def _kernel(target: Any) -> str:
    """The name of an operator that launches kernels; empty of others."""
    from autopar.kernels import launch

    ours = isinstance(target, torch._ops.OpOverload) and target.namespace == "autopar"
    return target._opname if ours and target._opname in launch.names else ""


class KernelCalls(TorchDispatchMode):
    """Notes which operators that launch kernels are called.

    Attributes:
        names: of them, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += filter(None, [_kernel(func)])
        return func(*args, **(kwargs or {}))


def roundings_off(
    row: KernelRow, rows: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> float:
    """Run the sample of a row by its kernel, forward and backward, and compare with float64.

    Returns:
        the largest error of the results and of the gradients, in roundings (machine epsilons of the
        dtype) of the largest element of each.

    Raises:
        AssertionError: the kernel was not substituted.
    """
    torch.manual_seed(0)
    operands = [
        t.detach().to(device).requires_grad_(t.requires_grad)
        for t in row.sample.operands(rows, width, dtype)
    ]
    gm = with_kernels(row.sample.run, operands)
    assert len(kernels_in(gm)) == 1, f"{row.name} is not substituted:\n{gm.graph}"
    exact = [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in operands
    ]
    with KernelCalls() as calls:
        results = gm(*operands)
        seeds = [torch.randn_like(result) for result in results]
        actual = [*(r.detach() for r in results), *_gradients(results, operands, seeds)]
    assert len(calls.names) == 2, f"{row.name} runs {calls.names}, not its two kernels"
    results = as_tuple(row.sample.run(*exact))
    wide = [seed.double() for seed in seeds]
    expected = [*(r.detach() for r in results), *_gradients(results, exact, wide)]
    return max(_roundings(a, b) for a, b in zip(actual, expected, strict=True))


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One or several results of a sample."""
    return results if isinstance(results, tuple) else (results,)


def _gradients(
    results: Sequence[Tensor], operands: Sequence[Tensor], seeds: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(results, [t for t in operands if t.requires_grad], seeds)


def _roundings(actual: Tensor, expected: Tensor) -> float:
    if not (actual.isfinite().all() and actual.shape == expected.shape):
        return float("inf")
    scale = max(float(expected.abs().max()), torch.finfo(actual.dtype).tiny)
    error = float((actual.double() - expected).abs().max())
    return error / scale / torch.finfo(actual.dtype).eps
