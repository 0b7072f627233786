"""Measures a process's device: arithmetic, memory, launches, the link to the host.

Results are allocated anew, as operators do it, so rates include the cost of fresh pages. A CPU
launches a kernel before it computes it, so launches are subtracted. A GPU computes while the host
launches ahead: there kernels are timed in a queue, and the launch is the least time of a kernel.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from autopar.cluster.curve import Curve
from autopar.cluster.device import Device
from autopar.profiler.clock import seconds_of
from autopar.progress import Deadline

Progress = Callable[[str], None]
KiB, MiB = 2**10, 2**20


@dataclass(frozen=True)
class Effort:
    """How thoroughly to measure.

    Args:
        bytes: sizes of memory traffic.
        sides: sides of square matrix products.
        channels: channels of convolutions.
        lengths: sequence lengths of attention.
        messages: bytes of collectives.
        seconds: time for each figure.
        rounds: rounds through all arithmetic. A disturbance in one round may be over in the next.
        side: side of the square tensor that measures the cost of elements.
        images: shape of the images that measure the cost of a variance; at most as many elements.
        device_s, links_s: seconds for the device and for the collectives of all axes, after which
            larger sizes and further rounds are left out.
    """

    bytes: tuple[int, ...]
    sides: tuple[int, ...]
    channels: tuple[int, ...]
    lengths: tuple[int, ...]
    messages: tuple[int, ...]
    seconds: float
    rounds: int = 1
    side: int = 768
    images: tuple[int, ...] = (8, 8, 96, 96)
    device_s: float = math.inf
    links_s: float = math.inf


_kernel_seconds = partial(seconds_of, queued=True)

# The C library returns blocks above 32 MiB to the system, and fresh pages are slow. So sizes on
# both sides of that are measured.
QUICK = Effort(
    (16 * KiB, 256 * KiB, 4 * MiB, 30 * MiB, 34 * MiB, 64 * MiB),
    (64, 256, 768),
    (16, 64, 256),
    (64, 256),
    (KiB, 64 * KiB, MiB, 8 * MiB),
    0.02,
)
THOROUGH = Effort(
    (16 * KiB, 128 * KiB, MiB, 4 * MiB, 16 * MiB, 30 * MiB, 34 * MiB, 64 * MiB, 256 * MiB),
    (32, 64, 128, 256, 512, 1024, 2048),
    (8, 16, 32, 64, 128, 256, 512),
    (32, 64, 128, 256, 512, 1024),
    (KiB, 4 * KiB, 16 * KiB, 64 * KiB, 256 * KiB, MiB, 4 * MiB, 16 * MiB),
    0.1,
    3,
)
# The largest sizes take most of a thorough run, and run at the rates of the next smaller ones. They
# are also the first that other work on the machine interrupts.
STANDARD = replace(
    THOROUGH, sides=THOROUGH.sides[:-1], channels=THOROUGH.channels[:-1],
    lengths=THOROUGH.lengths[:-1], seconds=0.03, device_s=24.0, links_s=12.0,
)  # fmt: skip
EFFORTS = {"quick": QUICK, "standard": STANDARD, "thorough": THOROUGH}


def effort_for(kind: str, level: str) -> Effort:
    """What to measure on a device type, `"cpu"` or `"cuda"`, at a level of `EFFORTS`."""
    effort = EFFORTS[level]
    if kind == "cpu":
        return effort
    # a GPU is far from its peak at sizes that keep a CPU busy
    return replace(
        effort, bytes=(*effort.bytes, 1024 * MiB), sides=(*effort.sides, 4096, 8192),
        channels=(*effort.channels, 1024), lengths=(*effort.lengths, 2048, 4096), side=8192,
        images=(64, 64, 112, 112),
    )  # fmt: skip


# -- the device ---------------------------------------------------------------------------------


def measure_device(
    device: torch.device, effort: Effort, *, processes: int = 1, say: Progress = lambda line: None
) -> Device:
    """Measure this process's device, with torch's number of threads.

    Args:
        processes: number of processes on this host. They share its memory if the device is the CPU.
    """
    deadline = Deadline(effort.device_s, time.monotonic)
    say("launch overhead ...")
    in_step, single = _launch_seconds(device)
    launch = single if device.type == "cpu" else 0.0
    say("memory bandwidth ...")
    traffic = _memory_curves(device, effort, launch, Deadline(effort.device_s / 4, time.monotonic))
    say("cost of elements beyond moving them ...")
    extra = _extra_ns(device, effort, launch)
    times = _arithmetic_seconds(device, effort, deadline, say)
    flops = {key: _curve(list(points.items()), launch) for key, points in times.items()}
    peaks = {
        key.removeprefix("matmul."): max(curve.rates)
        for key, curve in flops.items()
        if key.startswith("matmul.")
    }
    largest = min(max(effort.bytes), 16 * MiB) if device.type == "cpu" else max(effort.bytes)
    memory = host_memory() / processes
    if device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    copy = 1e-6 * float(traffic["read"].us(largest) + traffic["write"].us(largest))
    return Device(
        name=device_name(device), kind=device.type, peak_flops=peaks, memory_bytes=memory,
        bandwidth=_short(2 * largest / copy), launch_us=_short(1e6 * in_step),
        flops_by_size=flops, bytes_by_size=traffic, extra_ns=extra,
    )  # fmt: skip


def _short(value: float) -> float:
    """Rounded to four digits."""
    return float(f"{value:.4g}")


def _curve(times: Sequence[tuple[float, float]], launch: float) -> Curve:
    """A curve from (work, seconds). The launch is subtracted, down to a tenth of the time."""
    return Curve.fit([n for n, _ in times], [max(t - launch, 0.1 * t) for _, t in times])


def _launch_seconds(device: torch.device) -> tuple[float, float]:
    """Seconds per operator on tiny tensors: in a training step, forward or backward; and in a
    single call, as everything else is timed here."""
    count = 64
    x = torch.ones(16, device=device, requires_grad=True)
    factor = torch.ones(16, device=device)

    def step() -> None:
        y = x
        for _ in range(count):
            y = y * factor
        torch.autograd.grad(y, x, factor)

    return seconds_of(step, device, 0.1) / (2 * count), seconds_of(factor.clone, device, 0.02)


def _memory_curves(
    device: torch.device, effort: Effort, launch: float, limit: Deadline
) -> dict[str, Curve]:
    """Rates of reading and writing, up to the largest size that is expected to take no longer than
    until the limit. A sum reads, a copy reads and writes."""
    reads, writes = [], []
    took, before = 0.0, effort.bytes[0]
    for nbytes in effort.bytes:
        if took * nbytes / before > limit.left:
            break
        begin = time.monotonic()
        x = torch.ones(nbytes // 4, device=device)
        read = _kernel_seconds(x.sum, device, effort.seconds)
        copy = _kernel_seconds(x.clone, device, effort.seconds)
        reads.append((float(nbytes), read))
        writes.append((float(nbytes), max(copy - max(read - launch, 0.0), 0.1 * copy)))
        took, before = time.monotonic() - begin, nbytes
    return {"read": _curve(reads, launch), "write": _curve(writes, launch)}


def _extra_ns(device: torch.device, effort: Effort, launch: float) -> dict[str, float]:
    """Nanoseconds per element of the kinds in `EXTRAS`, beyond the time of a copy.

    Where several kernels represent a kind, it is their geometric mean, because they differ by
    factors.
    """
    side = effort.side
    x = torch.randn(side, side, device=device)
    images = x.flatten()[: math.prod(effort.images)].view(effort.images)
    weight = torch.ones(effort.images[1], device=device)
    where = torch.randint(side * side, (side * side,), device=device)

    def normalize() -> Any:
        return F.batch_norm(images, None, None, weight, weight, training=True)

    # per kind: the call, number of expensive elements, number of elements that a copy would move
    jobs: dict[str, list[tuple[Callable[[], Any], float, float]]] = {
        "function": [
            (lambda: F.gelu(x), x.numel(), x.numel()),
            (lambda: F.gelu(x, approximate="tanh"), x.numel(), x.numel()),
            (x.exp, x.numel(), x.numel()),
            (x.tanh, x.numel(), x.numel()),
        ],
        "reduction": [
            (lambda: F.layer_norm(x, (side,)), 2 * x.numel(), x.numel()),
            (lambda: torch._softmax_backward_data(x, x, -1, x.dtype), x.numel(), 1.5 * x.numel()),
        ],
        "random": [(lambda: torch.native_dropout(x, 0.1, True), x.numel(), 1.25 * x.numel())],
        "variance": [(normalize, images.numel(), images.numel())],
        "index": [(lambda: x.flatten()[where], x.numel(), 2 * x.numel())],
        "strided": [(lambda: x.t().contiguous(), x.numel(), x.numel())],
        "scalar": [(lambda: x == x, x.numel(), 0.625 * x.numel())],
    }
    plain = _kernel_seconds(x.clone, device, effort.seconds) - launch
    extra_ns = {}
    for kind, kernels in jobs.items():
        extra_s = []
        for call, expensive, moved in kernels:
            seconds = _kernel_seconds(call, device, effort.seconds)
            extra_s.append((seconds - launch - plain * moved / x.numel()) / expensive)
        # by noise, a cheap kernel may be faster than a copy
        least = 0.01 * plain / x.numel()
        extra_ns[kind] = _short(1e9 * statistics.geometric_mean(max(t, least) for t in extra_s))
    return extra_ns


@dataclass(frozen=True)
class _Job:
    """Kernels that are timed together, as training runs them: forward and backward.

    Args:
        flops: of one kernel, on average.
        kernels: number of kernels.
        call: runs them.
    """

    flops: float
    kernels: int
    call: Callable[[], Any]


@dataclass(frozen=True)
class _Kind:
    """A kind of kernel.

    Args:
        library, dtype: of its curve.
        sizes: ascending.
        power: of the size, that the FLOPs grow with.
        job: of a size. Its tensors exist while it is measured.
    """

    library: str
    dtype: str
    sizes: Sequence[int]
    power: int
    job: Callable[[int], _Job]

    def measure(
        self, device: torch.device, budget: float, limit: Deadline, best: dict[float, float]
    ) -> None:
        """Update the best seconds of a kernel by its FLOPs, up to the largest size that is expected
        to take no longer than until the limit.

        Args:
            budget: seconds for each size.
        """
        took, before = 0.0, self.sizes[0]
        for size in self.sizes:
            if took * (size / before) ** self.power > limit.left:
                return
            begin = time.monotonic()
            job = self.job(size)
            seconds = _kernel_seconds(job.call, device, budget) / job.kernels
            best[job.flops] = min(seconds, best.get(job.flops, seconds))
            took, before = time.monotonic() - begin, size


def _arithmetic_seconds(
    device: torch.device, effort: Effort, deadline: Deadline, say: Progress
) -> dict[str, dict[float, float]]:
    """Per library and dtype the best seconds of a kernel by its FLOPs."""
    kinds = _arithmetic(device, effort)
    best: dict[str, dict[float, float]] = {f"{k.library}.{k.dtype}": {} for k in kinds}
    for number in range(effort.rounds):
        begin = time.monotonic()
        for i, kind in enumerate(kinds):
            say(f"{kind.library} in {kind.dtype}, round {number + 1} of {effort.rounds} ...")
            limit = Deadline(deadline.share(len(kinds) - i), time.monotonic)
            kind.measure(device, effort.seconds, limit, best[f"{kind.library}.{kind.dtype}"])
        if time.monotonic() - begin > deadline.left:
            break
    return best


def _arithmetic(device: torch.device, effort: Effort) -> list[_Kind]:
    """Kinds of kernels, whose curves a device has."""
    dtypes = ["float32", "float64", "bfloat16"] + ["float16"] * (device.type == "cuda")
    kinds = []
    for dtype in dtypes:
        product = partial(_matmul, dtype=dtype, device=device)
        kinds.append(_Kind("matmul", dtype, effort.sides, 3, product))
        if device.type == "cuda" and dtype.endswith("16"):
            odd = [n - 1 for n in effort.sides]
            kinds.append(_Kind("unaligned", dtype, odd, 3, product))
    for dtype in ("float32",) if device.type == "cpu" else ("float32", "bfloat16"):
        dense = partial(_convolution, dtype=dtype, device=device)
        kinds.append(_Kind("convolution", dtype, effort.channels, 2, dense))
        depthwise = partial(_convolution, dtype=dtype, device=device, depthwise=True)
        kinds.append(_Kind("depthwise", dtype, effort.channels, 1, depthwise))
        attention = partial(_attention, dtype=dtype, device=device)
        kinds.append(_Kind("attention", dtype, effort.lengths, 2, attention))
    return kinds


def device_steps(device: torch.device, effort: Effort) -> int:
    """How many steps `measure_device` tells of."""
    return 3 + effort.rounds * len(_arithmetic(device, effort))


def _random(dtype: str, device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(getattr(torch, dtype)).requires_grad_()


def _matmul(n: int, dtype: str, device: torch.device) -> _Job:
    a, b = (_random(dtype, device, n, n).detach() for _ in range(2))
    return _Job(2.0 * n**3, 3, lambda: (a @ b, a @ b.t(), a.t() @ b))


def _step(forward: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]) -> Any:
    gradient = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def _convolution(n: int, dtype: str, device: torch.device, depthwise: bool = False) -> _Job:
    groups = n if depthwise else 1
    batch, side = (4, 28) if device.type == "cpu" else (32, 56)
    kernel = 5 if groups > 1 else 3
    x = _random(dtype, device, batch, n, side, side)
    weight = _random(dtype, device, n, n // groups, kernel, kernel)
    forward = 2.0 * kernel**2 * batch * side * side * n * (n // groups)
    call = _step(lambda: F.conv2d(x, weight, padding=kernel // 2, groups=groups), (x, weight))
    return _Job(1.5 * forward, 2, call)  # the backward computes two more, in one kernel


def _attention(n: int, dtype: str, device: torch.device) -> _Job:
    batch, heads, dim = 4, 12, 64
    q, k, v = (_random(dtype, device, batch, heads, n, dim) for _ in range(3))
    forward = 4.0 * batch * heads * n * n * dim
    # the backward computes 2.5 more: it recomputes the scores
    run = _step(lambda: F.scaled_dot_product_attention(q, k, v), (q, k, v))
    return _Job(1.75 * forward, 2, run)


# -- the host -----------------------------------------------------------------------------------


def host_memory() -> float:
    """Bytes of memory of this host, or of the container."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(float(Path(path).read_text()))
        except (OSError, ValueError):  # no such limit
            continue
    return min(limits)


def device_name(device: torch.device) -> str:
    """The device's name, as the system has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    return f"{names[0] if names else 'cpu'}, {threads} thread{plural}"
