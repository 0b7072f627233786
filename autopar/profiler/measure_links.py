"""Measures the collectives of every mesh axis.

The result per collective is a curve, which the planner uses, and per axis the two figures of the
alpha-beta model. In that model, a collective over k ranks on a local buffer of n bytes takes

    passes * ((k - 1) alpha + n (k - 1) / k beta)

(`cluster/link.py`); an all-reduce has two passes. All groups of an axis communicate at the same
time, as in a step.
"""

from __future__ import annotations

import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from autopar.cluster.cluster import ClusterInfo, parse_mesh
from autopar.cluster.curve import Curve
from autopar.cluster.device import Device
from autopar.cluster.link import PASSES, Link
from autopar.comm.groups import Group, find_group
from autopar.comm.world import DEFAULT_TIMEOUT, process_groups, start, stop
from autopar.errors import EngineError, MeshError
from autopar.profiler.clock import seconds_of
from autopar.profiler.measure import (
    Effort,
    Progress,
    device_steps,
    effort_for,
    host_memory,
    measure_device,
)
from autopar.progress import Bar
from autopar.units import bytes_text

_POLL_S = 0.2
# the file by which rank 0 of local processes hands its measurement to the caller
_RESULT = "measurement.pickle"


def fit_link(
    rows: Sequence[tuple[float, float]], seconds: Sequence[float]
) -> tuple[Link, np.ndarray]:
    """Fit alpha and beta to measured times, by least squares of the relative errors.

    Args:
        rows: how often alpha and beta occur in each time.
        seconds: the measured times.

    Returns:
        The link, and per time (predicted - measured) / measured.
    """
    times = np.asarray(seconds, float)
    scaled = np.asarray(rows, float) / times[:, None]
    fit = np.linalg.lstsq(scaled, np.ones(len(times)), rcond=None)[0]
    if (fit <= 0).any():
        # if one would have to be negative, the other alone fits best
        positive = int(fit[1] > fit[0])
        column = scaled[:, positive]
        fit = np.zeros(2)
        fit[positive] = column.sum() / (column @ column)
    alpha, beta = (float(f"{x:.4g}") for x in np.maximum(fit, (1e-9, 1e-15)))
    return Link(alpha, beta), scaled @ (alpha, beta) - 1


@dataclass(frozen=True)
class LinkFit:
    """The measurement of one mesh axis.

    Args:
        link: the fit.
        samples: (collective, bytes of the local buffer, measured seconds, predicted seconds).
    """

    link: Link
    samples: tuple[tuple[str, int, float, float], ...]

    @property
    def median_error(self) -> float:
        """Median of the absolute relative errors."""
        return float(np.median([abs(p / s - 1) for _, _, s, p in self.samples]))


@dataclass(frozen=True)
class Measurement:
    """A measured cluster, and the fits of its links; None for axes of one rank."""

    cluster: ClusterInfo
    fits: tuple[LinkFit | None, ...]


def measure_cluster(
    mesh: str, kind: str, *, level: str = "standard", say: Progress = lambda line: None
) -> Measurement | None:
    """Measure the machine for a mesh.

    It runs in the processes that torchrun started, or else starts as many local ones as the mesh
    needs.

    Args:
        mesh: as `"2x8"` or `"node=2,gpu=8"`.
        kind: "cpu" or "cuda".
        level: of `measure.EFFORTS`.
        say: called with a line per step, behind a bar.

    Returns:
        The measurement on rank 0, None elsewhere.

    Raises:
        MeshError: the mesh does not fit the processes or devices.
        EngineError: a process died.
    """
    sizes, _ = parse_mesh(mesh)
    size = math.prod(sizes)
    if kind == "cuda" and not torch.cuda.is_available():
        raise MeshError("this process sees no CUDA device; measure with --device cpu")
    if "WORLD_SIZE" in os.environ:
        started = not dist.is_initialized()
        try:
            return _measure_rank(mesh, kind, level, say)
        finally:
            if started and dist.is_initialized():
                stop()
    if size == 1:
        effort, device = effort_for(kind, level), torch.device(kind)
        bar = Bar(say, device_steps(device, effort))
        cluster = _cluster_with_usual_links(mesh, device, effort, 1, bar)
        return Measurement(cluster, (None,) * len(sizes))
    if kind == "cuda" and torch.cuda.device_count() < size:
        raise MeshError(
            f"mesh {mesh} needs {size} CUDA devices but this host has "
            f"{torch.cuda.device_count()}; run on every host: "
            "torchrun --nnodes ... --nproc-per-node ... --no-python autopar cluster --mesh ..."
        )
    say(f"start {size} processes ...")
    with tempfile.TemporaryDirectory() as folder:
        lines = get_context("spawn").SimpleQueue()
        run_local(_measure_local, size, (folder, mesh, kind, level, lines), lines, say)
        measurement: Measurement = pickle.loads((Path(folder) / _RESULT).read_bytes())
        return measurement


def run_local(
    function: Callable[..., None],
    size: int,
    args: tuple[Any, ...],
    lines: SimpleQueue[str] | None = None,
    say: Progress = lambda line: None,
) -> None:
    """Run `function(rank, size, *args)` in as many processes. If one fails, all are stopped.

    Args:
        lines: that the processes put there are said.

    Raises:
        EngineError: a process failed; the message names it.
    """
    try:
        processes = spawn(function, (size, *args), nprocs=size, join=False)
        while not processes.join(_POLL_S):
            while lines is not None and not lines.empty():
                say(lines.get())
    except ProcessExitedException as error:
        raise EngineError(
            f"process {error.error_index} of {size} died ({error}); the others were stopped. "
            "If it ran out of memory, measure fewer processes: a smaller --mesh."
        ) from error
    except ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        raise EngineError(
            f"process {error.error_index} of {size} failed, the others were stopped: {last}"
        ) from error


def _measure_local(
    rank: int, size: int, folder: str, mesh: str, kind: str, level: str, lines: SimpleQueue[str]
) -> None:
    """One of the processes that `measure_cluster` starts."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size)
    )
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank,
        world_size=size, timeout=DEFAULT_TIMEOUT,
    )  # fmt: skip
    try:
        measurement = _measure_rank(mesh, kind, level, lines.put)
        if measurement is not None:
            (Path(folder) / _RESULT).write_bytes(pickle.dumps(measurement))
    finally:
        stop()


def _measure_rank(mesh: str, kind: str, level: str, say: Progress) -> Measurement | None:
    """Measure as one rank of a world. Rank 0 returns the result."""
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    effort = effort_for(kind, level)
    shape = ClusterInfo.of(mesh, Device("measured", kind, {"float32": 1.0}, 1.0, 1.0, 1.0))
    device_mesh = start(shape, device)
    axes = sum(size > 1 for size in shape.mesh)
    on_device = device_steps(device, effort)
    bar = Bar(
        say if dist.get_rank() == 0 else (lambda line: None),
        on_device + 1 + axes * len(effort.messages),
    )
    # all ranks at once, because in training, too, they share memory bandwidth and perhaps cores
    _barrier(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cluster = _cluster_with_usual_links(mesh, device, effort, processes, bar)
    _barrier(device)
    groups = [find_group(name) for name in process_groups(device_mesh)]
    begin, left = time.monotonic(), effort.links_s
    bar.at(on_device, "waits of ranks for each other ...")
    waiting = _waiting_seconds([g for g in groups if g.size > 1], device, effort.seconds)
    fits: list[LinkFit | None] = []
    for axis, group in enumerate(groups):
        if group.size == 1:
            fits.append(None)
            continue
        measured = axes - sum(g.size > 1 for g in groups[axis:])

        def tell(number: int, nbytes: int, axis: int = axis, before: int = measured) -> None:
            bar.at(
                on_device + 1 + before * len(effort.messages) + number,
                f"collectives of {cluster.axis_label(axis)}, {bytes_text(nbytes)} ...",
            )

        left = effort.links_s - _slowest(time.monotonic() - begin, device)
        limit = max(0.0, left) / (axes - measured)
        fits.append(
            measure_axis(group, device, effort, cluster.device.launch_us, waiting, limit, tell)
        )
    if dist.get_rank() != 0:
        return None
    links = tuple(fit.link if fit else link for fit, link in zip(fits, cluster.links, strict=True))
    return Measurement(replace(cluster, links=links), tuple(fits))


def _barrier(device: torch.device) -> None:
    """Wait until all ranks are here, and their launched work is done."""
    dist.barrier(device_ids=[device.index] if device.index is not None else None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cluster_with_usual_links(
    mesh: str, device: torch.device, effort: Effort, processes: int, say: Progress
) -> ClusterInfo:
    """A mesh of devices measured as this one. Its links are the table's, which stay for axes of one
    rank, along which nothing is sent."""
    model = measure_device(device, effort, processes=processes, say=say)
    link = measure_host_link(device, effort)
    memory = None if link is None else host_memory() / processes
    return replace(ClusterInfo.of(mesh, model), host_link=link, host_memory_bytes=memory)


def measure_host_link(device: torch.device, effort: Effort) -> Link | None:
    """The link of copies between pinned host memory and the device, from both directions together.
    None for a CPU, whose memory is the host's."""
    if device.type != "cuda":
        return None
    rows, seconds = [], []
    for nbytes in effort.messages:
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        for target, source in ((on_device, host), (host, on_device)):
            copy = partial(target.copy_, source, non_blocking=True)
            rows.append((1.0, float(nbytes)))
            seconds.append(seconds_of(copy, device, effort.seconds))
    return fit_link(rows, seconds)[0]


def measure_axis(
    group: Group,
    device: torch.device,
    effort: Effort,
    launch_us: float,
    waiting: float,
    limit_s: float = math.inf,
    tell: Callable[[int, int], None] = lambda number, nbytes: None,
) -> LinkFit:
    """Time the collectives of one group by message size.

    Args:
        group: a group of the axis. Every rank of the world calls this at the same time.
        launch_us: launch of an operator, which the time model adds.
        waiting: seconds that a collective adds to its own time.
        limit_s: seconds, equal on all ranks, after which larger messages are left out.
        tell: called with the number and the bytes of the messages that come.
    """
    ops = torch.ops._c10d_functional
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "all_gather": lambda x: ops.all_gather_into_tensor(
            x[: x.numel() // group.size], group.size, group.name
        ),
        "reduce_scatter": lambda x: ops.reduce_scatter_tensor(x, "sum", group.size, group.name),
        "all_reduce": lambda x: ops.all_reduce(x, "sum", group.name),
        "all_to_all": lambda x: ops.all_to_all_single(
            x, *[[x.numel() // group.size] * group.size] * 2, group.name
        ),
    }
    samples: list[tuple[str, int, float]] = []
    spent, took, before = 0.0, 0.0, effort.messages[0]
    for number, nbytes in enumerate(effort.messages):
        if took * nbytes / before > limit_s - spent:
            break
        tell(number, nbytes)
        begin = time.monotonic()
        x = torch.ones(-(-nbytes // (4 * group.size)) * group.size, device=device)
        seconds = {
            name: _collective_seconds(partial(_waited, call, x), device, effort.seconds)
            for name, call in calls.items()
        }
        for name in ("all_gather", "reduce_scatter"):  # an all-reduce does both
            seconds[name] = min(seconds[name], seconds["all_reduce"])
        samples += [(name, 4 * x.numel(), waiting + s) for name, s in seconds.items()]
        took, before = _slowest(time.monotonic() - begin, device), nbytes
        spent += took
    k = group.size
    rows = [
        (PASSES[name] * (k - 1.0), PASSES[name] * nbytes * (k - 1.0) / k)
        for name, nbytes, _ in samples
    ]
    times = [max(t - 1e-6 * launch_us, 0.1 * t) for _, _, t in samples]
    link, _ = fit_link(rows, times)
    predicted = (np.asarray(rows) @ (link.alpha, link.beta) + 1e-6 * launch_us).tolist()
    points: dict[str, dict[float, float]] = {kind: {} for kind in calls}
    for (kind, nbytes, _), seconds_less_launch in zip(samples, times, strict=True):
        points[kind][nbytes] = seconds_less_launch
    curves = {kind: Curve.fit([*p], [*p.values()]) for kind, p in points.items()}
    link = replace(link, curves=curves)
    return LinkFit(link, tuple((*s, p) for s, p in zip(samples, predicted, strict=True)))


def _waited(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The result of a collective, when it is done."""
    return torch.ops._c10d_functional.wait_tensor(call(x))


def _waiting_seconds(groups: Sequence[Group], device: torch.device, budget: float) -> float:
    """Seconds that a collective adds because ranks come to it from computing, at different times,
    and wait for the slowest.

    This is measured if ranks share the cores of a host, and left out between GPUs.

    Args:
        groups: of all axes. They take turns, as in a step: a rank waits for one that waits for
            another on another axis.
    """
    if device.type != "cpu" or not groups:
        return 0.0
    ops = torch.ops._c10d_functional
    a = torch.randn(512, 512)
    calls = [
        partial(
            _waited, partial(ops.all_reduce, reduce_op="sum", group_name=group.name),
            torch.ones(64 * group.size),
        )
        for group in groups
    ]  # fmt: skip
    compute: list[float] = []
    with_collectives: list[float] = []
    rounds, repetitions = max(5, min(25, int(budget / 0.01))), -(-8 // len(calls))
    for _ in range(rounds):
        compute.append(_slowest_seconds(lambda: [_compute(a) for _ in calls], device, repetitions))
        with_collectives.append(
            _slowest_seconds(lambda: [(_compute(a), call()) for call in calls], device, repetitions)
        )
    added = float(np.median(np.subtract(with_collectives, compute)))
    alone = sum(_collective_seconds(call, device, budget) for call in calls)
    return max(0.0, added - alone) / len(calls)


def _compute(a: torch.Tensor) -> list[torch.Tensor]:
    """Some milliseconds of compute, as between two collectives of a step."""
    return [a @ a for _ in range(4)]


def _slowest_seconds(call: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    """Seconds of one call on the slowest rank."""
    _barrier(device)
    begin = time.perf_counter()
    for _ in range(repetitions):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _slowest(time.perf_counter() - begin, device) / repetitions


def _slowest(seconds: float, device: torch.device) -> float:
    """The largest of the ranks' numbers."""
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _collective_seconds(call: Callable[[], Any], device: torch.device, budget: float) -> float:
    """The usual time of the slowest rank. All ranks repeat equally often.

    It is the lower quartile. The best time would be too short: ranks that wait for each other here,
    because they have fewer cores, wait in a step too. The median would include stalls.
    """
    call()
    times: list[float] = []
    spent = 0.0
    while len(times) < 15 or (spent < budget and len(times) < 50):
        times.append(_slowest_seconds(call, device, 1))
        spent += times[-1]
    return float(np.quantile(times, 0.25))
