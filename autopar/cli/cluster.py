"""What `autopar cluster` prints and writes."""

from __future__ import annotations

import datetime
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from autopar.cluster.cluster import parse_mesh
from autopar.cluster.curve import Curve
from autopar.files import write_atomically
from autopar.profiler.measure_links import Measurement, measure_cluster


def measured(
    mesh: str | None, device: str | None, quick: bool, say: Callable[[str], None]
) -> Measurement | None:
    """Measure as the command's options say; None on ranks that have nothing to tell.

    Raises:
        MeshError: no such mesh here.
        EngineError: a process died.
        ValueError: no such kind of device.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"cannot measure a device {kind!r}; it is cpu or cuda")
    sizes, axis_names = parse_mesh(mesh or os.environ.get("WORLD_SIZE", "1"))
    measurement = measure_cluster(sizes, kind, quick=quick, say=say)
    if measurement is None:
        return None
    return replace(measurement, cluster=replace(measurement.cluster, axis_names=axis_names))


def write_measured(found: Measurement, path: Path) -> None:
    """The YAML, below a comment that says where it comes from."""
    today = datetime.date.today().isoformat()
    where = f"{socket.gethostname()}, {today}, torch {torch.__version__}"
    write_atomically(path, f"# measured by autopar cluster on {where}\n{found.cluster.to_yaml()}")


def print_measured(found: Measurement, path: Path | None) -> None:
    """The figures as tables on stdout."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    cluster, device = found.cluster, found.cluster.device
    console.print(
        f"{device.name} ({device.kind}), {device.memory_bytes / 2**30:.1f} GiB, "
        f"{device.launch_us:.1f} us per operator",
        markup=False,
    )
    for title, curves, size in (
        ("GFLOP/s by the kernel's FLOPs", device.flops_by_size, _flops),
        ("GB/s by the kernel's bytes", device.bytes_by_size, _bytes),
    ):
        console.print(f"\n{title}", style="bold")
        for name, curve in curves.items():
            console.print(f"  {name:22} {_points(curve, size)}", markup=False, soft_wrap=True)
    console.print("\nns per element beyond moving it", style="bold")
    extra = ", ".join(f"{kind} {ns:.3g}" for kind, ns in device.extra_ns.items())
    console.print(f"  {extra}", markup=False)
    table = Table(
        title="\nLinks", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for column in ("axis", "ranks", "alpha us", "GB/s", "median error of the fit"):
        table.add_column(column, justify="right", no_wrap=True)
    for axis, (size_, link, fit) in enumerate(
        zip(cluster.mesh, cluster.links, found.fits, strict=True)
    ):
        if fit is not None:
            error = f"{100 * fit.median_error:.0f}% of {len(fit.samples)} times"
            table.add_row(
                str(axis), str(size_), f"{1e6 * link.alpha:.1f}", f"{1e-9 / link.beta:.3g}", error
            )
    if table.row_count:
        console.print(table)
        console.print("\nms of collectives by the bytes of the buffer", style="bold")
    for axis, link in enumerate(cluster.links):
        for kind, curve in link.curves.items():
            times = "  ".join(f"{_bytes(n)}: {1e-3 * float(curve.us(n)):.3g}" for n in curve.sizes)
            console.print(f"  {f'axis {axis} {kind}':22} {times}", markup=False, soft_wrap=True)
    if cluster.host_link is not None:
        link = cluster.host_link
        console.print(
            f"\nhost link: alpha {1e6 * link.alpha:.1f} us, {1e-9 / link.beta:.3g} GB/s",
            markup=False,
        )
    console.print(
        f"\nwritten to {path}"
        if path
        else "\n-o cluster.yaml keeps this for autopar plan --cluster",
        markup=False,
    )


def _points(curve: Curve, size: Callable[[float], str]) -> str:
    pairs = zip(curve.sizes, curve.rates, strict=True)
    return "  ".join(f"{size(work)}: {rate / 1e9:.3g}" for work, rate in pairs)


def _flops(work: float) -> str:
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if work >= factor:
            return f"{work / factor:.3g}{letter}"
    return f"{work / 1e3:.3g}k"


def _bytes(work: float) -> str:
    return f"{work / 2**20:.3g}M" if work >= 2**20 else f"{work / 2**10:.3g}K"
