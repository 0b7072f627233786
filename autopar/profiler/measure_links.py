"""Measures the collectives of every mesh axis: a curve of each, and the alpha-beta model that says
in two figures how fast the axis is.

A collective over k ranks on a local buffer of n bytes is taken to last

    passes * ((k - 1) alpha + n (k - 1) / k beta)

(`profiler/link.py`), an all-reduce being two passes; the planner goes by the curves. All groups of
an axis communicate at the same time, as they do in a step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.curve import Curve
from autopar.cluster.device import Device
from autopar.cluster.link import PASSES, Link
from autopar.comm.groups import Group, find_group
from autopar.comm.world import DEFAULT_TIMEOUT, process_groups, start, stop
from autopar.errors import EngineError, MeshError
from autopar.profiler.measure import (
    Effort,
    Progress,
    effort_for,
    host_memory,
    measure_device,
    measure_host_link,
)


def fit_link(
    rows: Sequence[tuple[float, float]], seconds: Sequence[float]
) -> tuple[Link, np.ndarray]:
    """The alpha and beta that explain the times best by their relative errors.

    Args:
        rows: how often alpha and beta occur in each time.
        seconds: measured.

    Returns:
        The link, and per time (predicted - measured) / measured.
    """
    times = np.asarray(seconds, float)
    scaled = np.asarray(rows, float) / times[:, None]
    found = np.linalg.lstsq(scaled, np.ones(len(times)), rcond=None)[0]
    if (found <= 0).any():
        # the other alone explains the times best if one would have to be negative
        keep = int(found[1] > found[0])
        column = scaled[:, keep]
        found = np.zeros(2)
        found[keep] = column.sum() / (column @ column)
    alpha, beta = (float(f"{x:.4g}") for x in np.maximum(found, (1e-9, 1e-15)))
    return Link(alpha, beta), scaled @ (alpha, beta) - 1


@dataclass(frozen=True)
class LinkFit:
    """What was measured of one mesh axis.

    Args:
        link: the fit.
        samples: (collective, bytes of the local buffer, measured seconds, predicted seconds).
    """

    link: Link
    samples: tuple[tuple[str, int, float, float], ...]

    @property
    def median_error(self) -> float:
        """Of the relative errors, without their signs."""
        return float(np.median([abs(p / s - 1) for _, _, s, p in self.samples]))


@dataclass(frozen=True)
class Measurement:
    """A cluster and how well its links are described; None for axes of one rank."""

    cluster: ClusterInfo
    fits: tuple[LinkFit | None, ...]

    def to_json(self) -> str:
        fits = [fit and [fit.link.to_dict(), fit.samples] for fit in self.fits]
        return json.dumps([self.cluster.to_dict(), fits])

    @staticmethod
    def from_json(text: str) -> Measurement:
        data, fits = json.loads(text)
        read = (f and LinkFit(Link.from_dict("link", f[0]), tuple(map(tuple, f[1]))) for f in fits)
        return Measurement(ClusterInfo.from_dict(data), tuple(read))


def measure_cluster(
    mesh: Sequence[int], kind: str, *, quick: bool = False, say: Progress = lambda line: None
) -> Measurement | None:
    """Measure the machine for a mesh: in the processes that torchrun started, or else in as many
    local ones as the mesh needs.

    Args:
        mesh: sizes of the axes.
        kind: "cpu" or "cuda".
        quick: fewer sizes and repetitions.
        say: told what is measured now.

    Returns:
        On rank 0 what was measured, None elsewhere.

    Raises:
        MeshError: the mesh does not fit the processes or devices there are.
        EngineError: a process died.
    """
    size = int(np.prod(mesh))
    if kind == "cuda" and not torch.cuda.is_available():
        raise MeshError("this process sees no CUDA device; measure with --device cpu")
    if "WORLD_SIZE" in os.environ:
        started = not dist.is_initialized()
        try:
            return _measure_rank(tuple(mesh), kind, quick, say)
        finally:
            if started and dist.is_initialized():
                stop()
    if size == 1:
        device = torch.device(kind)
        found = _device_on(device, effort_for(kind, quick), 1, say)
        links = _links(mesh, found.device)
        return Measurement(replace(found, mesh=tuple(mesh), links=links), (None,) * len(mesh))
    if kind == "cuda" and torch.cuda.device_count() < size:
        raise MeshError(
            f"mesh {'x'.join(map(str, mesh))} needs {size} CUDA devices but this host has "
            f"{torch.cuda.device_count()}; run on every host: "
            "torchrun --nnodes ... --nproc-per-node ... --no-python autopar cluster --mesh ..."
        )
    say(f"start {size} processes ...")
    with tempfile.TemporaryDirectory() as folder:
        run_local(_measure_local, size, (folder, tuple(mesh), kind, quick))
        return Measurement.from_json((Path(folder) / "measured.json").read_text())


def run_local(function: Callable[..., None], size: int, args: tuple[Any, ...]) -> None:
    """`function(rank, size, *args)` in processes of their own; one that fails ends them all.

    Raises:
        EngineError: one failed; the message names it.
    """
    try:
        spawn(function, (size, *args), nprocs=size)
    except ProcessExitedException as error:
        raise EngineError(
            f"process {error.error_index} of {size} died ({error}); the others were stopped. "
            "If it was killed for its memory, measure fewer processes: a smaller --mesh."
        ) from error
    except ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        raise EngineError(
            f"process {error.error_index} of {size} failed, the others were stopped: {last}"
        ) from error


def _measure_local(
    rank: int, size: int, folder: str, mesh: tuple[int, ...], kind: str, quick: bool
) -> None:
    """One of the processes that `measure_cluster` starts."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size)
    )
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=DEFAULT_TIMEOUT,
    )
    try:
        found = _measure_rank(
            mesh, kind, quick, lambda line: print(line, file=sys.stderr, flush=True)
        )
        if found is not None:
            (Path(folder) / "measured.json").write_text(found.to_json())
    finally:
        stop()


def _measure_rank(
    mesh: tuple[int, ...], kind: str, quick: bool, say: Progress
) -> Measurement | None:
    """Measure as one rank of a world; rank 0 answers."""
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    effort = effort_for(kind, quick)
    shape = ClusterInfo.of(mesh, Device("measured", kind, {"float32": 1.0}, 1.0, 1.0, 1.0))
    device_mesh = start(shape, device)
    say = say if dist.get_rank() == 0 else _quiet
    # all ranks at once, as in training: they share memory bandwidth, and perhaps cores
    _barrier(device)
    found = _device_on(device, effort, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), say)
    _barrier(device)
    names = process_groups(device_mesh)
    fits: list[LinkFit | None] = []
    for axis, name in enumerate(names):
        if mesh[axis] == 1:
            fits.append(None)
            continue
        say(f"collectives of mesh axis {axis} ({mesh[axis]} ranks) ...")
        fits.append(measure_axis(find_group(name), device, effort, found.device.launch_us))
    if dist.get_rank() != 0:
        return None
    links = [fit.link if fit else None for fit in fits]
    default = _links(mesh, found.device)
    chosen = tuple(link or d for link, d in zip(links, default, strict=True))
    return Measurement(replace(found, mesh=mesh, links=chosen), tuple(fits))


def _quiet(line: str) -> None:
    pass


def _barrier(device: torch.device) -> None:
    """All ranks have come here, and what they launched is done."""
    dist.barrier(device_ids=[device.index] if device.index is not None else None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _links(mesh: Sequence[int], device: Device) -> tuple[Link, ...]:
    """For axes of one rank, which nothing is sent along: the table's."""
    return ClusterInfo.of(tuple(mesh), device).links


def _device_on(device: torch.device, effort: Effort, processes: int, say: Progress) -> ClusterInfo:
    """A cluster of this device alone."""
    model = measure_device(device, effort, processes=processes, say=say)
    if device.type == "cuda":
        say("host link ...")
    link = measure_host_link(device, effort)
    memory = None if link is None else host_memory() / processes
    return ClusterInfo((1,), model, _links((1,), model), None, link, memory)


def measure_axis(group: Group, device: torch.device, effort: Effort, launch_us: float) -> LinkFit:
    """Time the collectives of one group by message size: curves, and the fit of its link.

    Args:
        group: of the axis; every rank of the world calls this at the same time.
        launch_us: of an operator; the model counts it apart.
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
    waiting = _waiting_seconds(group, device, effort.seconds)
    for nbytes in effort.messages:
        x = torch.ones(-(-nbytes // (4 * group.size)) * group.size, device=device)
        taken = {
            name: _collective_seconds(partial(_waited, call, x), device, effort.seconds)
            for name, call in calls.items()
        }
        for name in ("all_gather", "reduce_scatter"):  # of which an all-reduce is both
            taken[name] = min(taken[name], taken["all_reduce"])
        samples += [(name, 4 * x.numel(), waiting + seconds) for name, seconds in taken.items()]
    k = group.size
    rows = [
        (PASSES[name] * (k - 1.0), PASSES[name] * nbytes * (k - 1.0) / k)
        for name, nbytes, _ in samples
    ]
    times = [max(t - 1e-6 * launch_us, 0.1 * t) for _, _, t in samples]
    link, _ = fit_link(rows, times)
    predicted = (np.asarray(rows) @ (link.alpha, link.beta) + 1e-6 * launch_us).tolist()
    curves = {
        kind: Curve.fit(
            *zip(
                *[(s[1], t) for s, t in zip(samples, times, strict=True) if s[0] == kind],
                strict=True,
            )
        )
        for kind in calls
    }
    link = replace(link, curves=curves)
    return LinkFit(link, tuple((*s, p) for s, p in zip(samples, predicted, strict=True)))


def _waited(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The result of a collective, when it is done."""
    return torch.ops._c10d_functional.wait_tensor(call(x))


def _waiting_seconds(group: Group, device: torch.device, budget: float) -> float:
    """What a collective takes beyond its own time because ranks come to it from computing, and none
    at the same time: the slowest keeps the others waiting at every one of them.

    Measured where ranks share a host's cores; between GPUs it is left out.
    """
    if device.type != "cpu":
        return 0.0
    ops = torch.ops._c10d_functional
    a, small = torch.randn(512, 512), torch.ones(64 * group.size)
    call = partial(_waited, partial(ops.all_reduce, reduce_op="sum", group_name=group.name), small)
    alone: list[float] = []
    between: list[float] = []
    rounds = max(5, min(25, int(budget / 0.01)))
    for _ in range(rounds):
        alone.append(_loop_seconds(lambda: _compute(a)))
        between.append(_loop_seconds(lambda: [_compute(a), call()]))
    added = float(np.median(np.subtract(between, alone)))
    return max(0.0, added - _collective_seconds(call, device, budget))


def _compute(a: torch.Tensor) -> list[torch.Tensor]:
    """Some milliseconds, as between two collectives of a step."""
    return [a @ a for _ in range(4)]


def _loop_seconds(call: Callable[[], Any], repetitions: int = 8) -> float:
    """Of one call, on the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(repetitions):
        call()
    slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest) / repetitions


def _collective_seconds(call: Callable[[], Any], device: torch.device, budget: float) -> float:
    """The usual time of the slowest rank; all ranks repeat equally often.

    Not the best: where ranks wait for each other, as they do where there are fewer cores than
    ranks, they do so in a step as well. The lower quartile, as a stall is no usual time.
    """
    call()
    times: list[float] = []
    spent = 0.0
    while len(times) < 15 or (spent < budget and len(times) < 50):
        _barrier(device)
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(float(slowest))
        spent += times[-1]
    return float(np.quantile(times, 0.25))
