"""How long the kernels of a node take on a device.

A kernel takes

    launch + max(flops / rate, read / rate + written / rate) + Σ count * extra

with rates by the kernel's own size, and counts of the elements that cost more than being moved
(`profiler/elementwise.py`). A GPU is launched for while it computes: one that was measured, whose rates so
hold for kernels of any size, takes the longer of the launch and the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor

from autopar.cluster.device import Device
from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import bound_arguments, operands
from autopar.profiler.counting import Recorder, Work
from autopar.profiler.elementwise import expensive_elements, indices_of
from autopar.profiler.profile import NodeProfile


@dataclass(frozen=True)
class Kernel:
    """What one kernel does, at global shapes, or several that are not told apart.

    Args:
        work: FLOPs, bytes and the number of kernels.
        dtype: of the result.
        library: what the FLOPs are done by: "matmul", "unaligned" (a product with rows that tensor
            cores cannot load at once), "convolution", "depthwise" (in groups) or "attention".
        extra: elements by what makes them expensive, with the keys of `Device.extra_ns`.
    """

    work: Work
    dtype: str
    library: str = "matmul"
    extra: Mapping[str, int] = field(default_factory=dict)

    def us(
        self, device: Device, share: np.ndarray | float = 1.0, traffic: np.ndarray | float = 1.0
    ) -> np.ndarray:
        """Microseconds on a device that does a part of it.

        Args:
            share: of the arithmetic.
            traffic: share of the bytes.
        """
        count = self.work.kernels
        if not count:
            return np.zeros(np.broadcast(share, traffic).shape)
        flops = device.flops_curve(self.library, self.dtype)
        arithmetic = count * flops.us(np.multiply(self.work.flops / count, share))
        moved = sum(
            count * device.bytes_curve(direction).us(np.multiply(nbytes / count, traffic))
            for direction, nbytes in (
                ("read", self.work.read_bytes),
                ("write", self.work.written_bytes),
            )
        )
        expensive = sum(1e-3 * device.extra_ns.get(kind, 0.0) * n for kind, n in self.extra.items())
        work = np.maximum(arithmetic, moved) + np.multiply(expensive, share)
        launch = device.launch_us * count
        if device.kind == "cpu" or not device.measured:
            return work + launch
        return np.maximum(work, launch)


def node_us(
    kernels: Sequence[Kernel],
    device: Device,
    share: np.ndarray | float = 1.0,
    traffic: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Microseconds of a node's kernels, for all pairs of `share` and `traffic` at once.

    Args:
        share: of the arithmetic that the device does.
        traffic: share of the bytes.
    """
    total = np.zeros(np.broadcast(share, traffic).shape)
    for kernel in kernels:
        total = total + kernel.us(device, share, traffic)
    return total


def kernels_of(
    node: fx.Node, profile: NodeProfile, device: Device
) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """The kernels of an operator call, forward and backward.

    For a device of which only the peaks are known they are not told apart.

    Args:
        profile: of the node.
        device: what it is to be timed on.
    """
    if device.measured:
        forward, backward = _dispatched(node, profile)
    else:
        values = tensors_of(node.meta["val"])
        dtype = _name(values[0].dtype) if values else "float32"
        forward, backward = (Kernel(profile.forward, dtype),), (Kernel(profile.backward, dtype),)
    return forward, _grouped(node, forward, backward)


def _grouped(
    node: fx.Node, forward: tuple[Kernel, ...], backward: tuple[Kernel, ...]
) -> tuple[Kernel, ...]:
    """Backward of a convolution in groups with the FLOPs that it has: torch's count, which the
    profile follows, forgets the groups. Each of the two gradients costs what forward does."""
    if bound_arguments(node).get("groups", 1) == 1:
        return backward
    most = 2 * sum(kernel.work.flops for kernel in forward)
    return tuple(
        replace(kernel, work=replace(kernel.work, flops=min(kernel.work.flops, most)))
        for kernel in backward
    )


def _dispatched(
    node: fx.Node, profile: NodeProfile
) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Run the node and its derivative on fake tensors, and take down every kernel."""
    given = [n for n in operands(node) if n is not None]
    wanted = {operands(node)[e.operand] for e in profile.tape.emitted}
    fakes = [t for n in (node, *given) for t in tensors_of(n.meta["val"])]
    mode = next(t.fake_mode for t in fakes if isinstance(t, FakeTensor))
    with mode, torch.enable_grad():
        made = {n: torch.empty_like(n.meta["val"]).requires_grad_(n in wanted) for n in given}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n, _value(n)))
        with KernelLog() as log:
            results = tensors_of(node.target(*args, **kwargs))  # type: ignore[operator]
        forward, backward = log.seen, []
        roots = [t for t in results if t.requires_grad]
        if wanted and roots:
            seeds = [torch.empty_like(t) for t in roots]
            leaves = [t for n, t in made.items() if n in wanted]
            with KernelLog() as log:
                torch.autograd.grad(roots, leaves, seeds, allow_unused=True)
            backward = log.seen
    return _kernels(forward, profile.forward), _kernels(backward, profile.backward)


def _kernels(seen: Sequence[tuple[Work, Kernel]], total: Work) -> tuple[Kernel, ...]:
    """The kernels, and what the profile counts beyond them: backward copies gradients that arrive
    in another layout than they do here."""
    found = sum((work for work, _ in seen), Work())
    rest = Work(*(max(0, a - b) for a, b in zip(astuple(total), astuple(found), strict=True)))
    kernels = tuple(kernel for _, kernel in seen)
    return (*kernels, Kernel(rest, "float32")) if rest.kernels else kernels


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class KernelLog(Recorder):
    """A recorder that keeps the kernels apart.

    Attributes:
        seen: the work as it was counted, and the kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Work, Kernel]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        work, _ = self.take()
        if work.kernels:
            self.seen.append((work, kernel_of(func, args, kwargs or {}, out, work)))
        return out


def kernel_of(func: Any, args: Any, kwargs: Any, out: Any, work: Work) -> Kernel:
    """What an operator that was dispatched does, beyond the work that was counted of it."""
    results = tensors_of(out)
    dtype = _name(results[0].dtype) if results else "float32"
    if work.flops:
        return Kernel(work, dtype, _library(func, args, kwargs, results))
    given = tensors_of((args, kwargs))
    if indices_of(func, given) and not func._schema.is_mutable:
        # a table is not read whole but where it is looked up
        indices = sum(t.numel() * t.element_size() for t in indices_of(func, given))
        read = min(work.read_bytes, work.written_bytes + indices)
        work = replace(work, read_bytes=read)
    return Kernel(work, dtype, extra=expensive_elements(func, args, kwargs, results))


def _library(func: Any, args: Any, kwargs: Any, results: Sequence[torch.Tensor]) -> str:
    """What does the FLOPs; with a channel or a few per group, convolutions are not products."""
    name = func._schema.name
    if "attention" in name:
        return "attention"
    if "convolution" not in name:
        matrices = (*tensors_of((args, kwargs)), *results)
        return "matmul" if all(map(_aligned, matrices)) else "unaligned"
    names = [a.name for a in func._schema.arguments]
    groups = (dict(zip(names, args, strict=False)) | kwargs).get("groups", 1)
    return "convolution" if groups == 1 else "depthwise"


def _aligned(t: torch.Tensor) -> bool:
    """Whether the rows (or columns) of a matrix begin at multiples of 16 bytes."""
    return t.ndim < 2 or max(t.stride()[-2:]) * t.element_size() % 16 == 0
