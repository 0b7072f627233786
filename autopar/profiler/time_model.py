"""The time of a node's kernels on a device.

A kernel takes

    launch + max(flops / rate, read / rate + written / rate) + Σ count * extra

with rates by its own size, and counts of expensive elements (`profiler/elementwise.py`). A GPU
computes while the host launches ahead: on a measured GPU, whose rates hold for kernels of any size,
a kernel takes the larger of the launch and the rest, and the gap behind it that a framework leaves.
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
    """One kernel at global shapes, or several that are not distinguished.

    Args:
        work: FLOPs, bytes and the number of kernels.
        dtype: of the result.
        library: what computes the FLOPs: "matmul", "unaligned" (a product with rows that tensor
            cores cannot load at once), "convolution", "depthwise" (in groups) or "attention".
        extra: number of expensive elements by kind, with the keys of `Device.extra_ns`.
    """

    work: Work
    dtype: str
    library: str = "matmul"
    extra: Mapping[str, int] = field(default_factory=dict)

    def us(
        self, device: Device, share: np.ndarray | float = 1.0, traffic: np.ndarray | float = 1.0
    ) -> np.ndarray:
        """Microseconds on a device that does a part of the work.

        Args:
            share: its share of the arithmetic.
            traffic: its share of the bytes.
        """
        count = self.work.kernels
        if not count:
            return np.zeros(np.broadcast(share, traffic).shape)
        flops = device.flops_curve(self.library, self.dtype)
        arithmetic = count * flops.us(np.multiply(self.work.flops / count, share))
        directions = {"read": self.work.read_bytes, "write": self.work.written_bytes}
        moved = sum(
            count * device.bytes_curve(direction).us(np.multiply(nbytes / count, traffic))
            for direction, nbytes in directions.items()
        )
        expensive = sum(1e-3 * device.extra_ns.get(kind, 0.0) * n for kind, n in self.extra.items())
        work = np.maximum(arithmetic, moved) + np.multiply(expensive, share)
        launch = device.launch_us * count
        if device.kind == "cpu" or not device.measured:
            return work + launch
        return np.maximum(work, launch) + device.gap_us * count


def node_us(
    kernels: Sequence[Kernel],
    device: Device,
    share: np.ndarray | float = 1.0,
    traffic: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Microseconds of a node's kernels, for all pairs of `share` and `traffic` at once.

    Args:
        share: the device's share of the arithmetic.
        traffic: its share of the bytes.
    """
    none = np.zeros(np.broadcast(share, traffic).shape)
    return sum((kernel.us(device, share, traffic) for kernel in kernels), none)


def kernels_of(
    node: fx.Node, profile: NodeProfile, device: Device
) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """The kernels of an operator call, forward and backward.

    They are only distinguished for a measured device.
    """
    if device.measured:
        forward, backward = _dispatched(node, profile)
    else:
        values = [t for n in operands(node) if n for t in tensors_of(n.meta["val"])]
        dtype = dtype_of(values, tensors_of(node.meta["val"]))
        arguments = bound_arguments(node)
        forward, backward = (
            (Kernel(computed(node.target, arguments, work), dtype),)
            for work in (profile.forward, profile.backward)
        )
    return forward, _grouped(node, forward, backward)


def computed(target: Any, arguments: Mapping[str, Any], work: Work) -> Work:
    """The work that an operator does. Attention under a causal mask leaves out the pairs of a query
    and a later key, which torch counts.

    Args:
        arguments: by name in the operator's schema; tensors, or nodes with them.
        work: as torch counts it.
    """
    banded = "autopar.banded_attention." in str(target)
    if not banded and "scaled_dot_product" not in str(target):
        return work
    lengths = []
    for name in ("query", "key"):
        value = arguments[name]
        value = value.meta["val"] if isinstance(value, fx.Node) else value
        lengths.append(value.shape[-2])
    queries, keys = lengths
    causal = arguments.get("is_causal")
    if banded:  # elsewhere its tiles are counted
        bounds = arguments.get("before"), arguments.get("after")
        causal = bounds == (None, 0) and queries == keys
    if not causal:
        return work
    both = min(queries, keys)
    pairs = both * (both + 1) // 2 + max(0, queries - keys) * keys
    return replace(work, flops=work.flops * pairs // max(1, queries * keys))


def _grouped(
    node: fx.Node, forward: tuple[Kernel, ...], backward: tuple[Kernel, ...]
) -> tuple[Kernel, ...]:
    """The backward of a convolution in groups with its true FLOPs. Torch's count, which the profile
    follows, ignores the groups. Each of the two gradients costs as much as the forward."""
    if bound_arguments(node).get("groups", 1) == 1:
        return backward
    limit = 2 * sum(kernel.work.flops for kernel in forward)
    return tuple(
        replace(kernel, work=replace(kernel.work, flops=min(kernel.work.flops, limit)))
        for kernel in backward
    )


def _dispatched(
    node: fx.Node, profile: NodeProfile
) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Run the node and its derivative on fake tensors, and record every kernel."""
    inputs = [n for n in operands(node) if n is not None]
    trainable = {operands(node)[e.operand] for e in profile.tape.emitted}
    fakes = [t for n in (node, *inputs) for t in tensors_of(n.meta["val"])]
    mode = next(t.fake_mode for t in fakes if isinstance(t, FakeTensor))
    with mode, torch.enable_grad():
        copies = {n: torch.empty_like(n.meta["val"]) for n in inputs}
        leaves = [t.requires_grad_() for n, t in copies.items() if n in trainable]
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: copies.get(n, n.meta["val"])
        )
        with KernelLog() as log:
            results = tensors_of(node.target(*args, **kwargs))  # type: ignore[operator]
        forward, backward = log.kernels, []
        roots = [t for t in results if t.requires_grad]
        if leaves and roots:
            seeds = [torch.empty_like(t) for t in roots]
            with KernelLog() as log:
                torch.autograd.grad(roots, leaves, seeds, allow_unused=True)
            backward = log.kernels
    return _kernels(forward, profile.forward), _kernels(backward, profile.backward)


def _kernels(recorded: Sequence[tuple[Work, Kernel]], total: Work) -> tuple[Kernel, ...]:
    """The kernels, and the remaining work of the profile: backward copies gradients that come in
    with another layout than they do here."""
    counted = sum((work for work, _ in recorded), Work())
    rest = Work(*(max(0, a - b) for a, b in zip(astuple(total), astuple(counted), strict=True)))
    kernels = tuple(kernel for _, kernel in recorded)
    return (*kernels, Kernel(rest, "float32")) if rest.kernels else kernels


def dtype_of(operands: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> str:
    """The name of the dtype in which a kernel multiplies: that of its operands if it accumulates in
    a wider one, as partial attention does."""
    dtype = results[0].dtype if results else torch.float32
    for t in operands:
        if t.ndim > 1 and t.dtype.is_floating_point and 1 < t.itemsize < dtype.itemsize:
            dtype = t.dtype
    return str(dtype).removeprefix("torch.")


class KernelLog(Recorder):
    """A recorder that distinguishes kernels.

    Attributes:
        kernels: the counted work of each kernel, and the kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Work, Kernel]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        work, _ = self.take()
        if work.kernels:
            self.kernels.append((work, kernel_of(func, args, kwargs or {}, out, work)))
        return out


def kernel_of(func: Any, args: Any, kwargs: Any, out: Any, work: Work) -> Kernel:
    """A dispatched operator as a kernel, from its counted work."""
    results = tensors_of(out)
    dtype = dtype_of(tensors_of((args, kwargs)), results)
    if work.flops:
        done = computed(func, by_name(func, args, kwargs), work)
        return Kernel(done, dtype, _library(func, args, kwargs, results))
    indices = indices_of(func, tensors_of((args, kwargs)))
    if indices and not func._schema.is_mutable:
        # only the rows that are looked up are read
        index_bytes = sum(t.numel() * t.element_size() for t in indices)
        read = min(work.read_bytes, work.written_bytes + index_bytes)
        work = replace(work, read_bytes=read)
    return Kernel(work, dtype, extra=expensive_elements(func, args, kwargs, results))


def by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an operator, as its schema names them."""
    return dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs


def _library(func: Any, args: Any, kwargs: Any, results: Sequence[torch.Tensor]) -> str:
    """What computes the FLOPs. Convolutions with few channels per group are not products."""
    name = func._schema.name
    if "attention" in name:
        return "attention"
    if "convolution" not in name:
        matrices = (*tensors_of((args, kwargs)), *results)
        return "matmul" if all(map(_aligned, matrices)) else "unaligned"
    groups = by_name(func, args, kwargs).get("groups", 1)
    return "convolution" if groups == 1 else "depthwise"


def _aligned(t: torch.Tensor) -> bool:
    """Whether the rows (or columns) of a matrix begin at multiples of 16 bytes."""
    return t.ndim < 2 or max(t.stride()[-2:]) * t.element_size() % 16 == 0
