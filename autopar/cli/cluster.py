"""What `autopar cluster` does after its options are read."""

from __future__ import annotations

import datetime
import math
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from autopar.cli.common import check_devices
from autopar.cluster.cluster import parse_mesh
from autopar.files import write_atomically
from autopar.profiler.measure_links import Measurement, measure_cluster
from autopar.report.text import terminal_width
from autopar.units import bytes_text, flops_text


def measure(
    mesh: str | None, device: str | None, level: str, say: Callable[[str], None]
) -> Measurement | None:
    """Measure as the command's options say. The result is None on all ranks but the first.

    Raises:
        MeshError: the mesh does not fit the devices or processes.
        EngineError: a process died.
        ValueError: the kind of device is unknown, or no host starts so many processes.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"cannot measure a device {kind!r}; it is cpu or cuda")
    if mesh is not None and "WORLD_SIZE" not in os.environ:
        check_devices(f"mesh {mesh}", math.prod(parse_mesh(mesh)[0]), started=True)
    mesh = mesh or os.environ.get("WORLD_SIZE", "1")
    return measure_cluster(mesh, kind, level=level, say=say)


def write_measured(measurement: Measurement, path: Path) -> None:
    """Write the cluster as YAML, below a comment that says where and when it was measured."""
    today = datetime.date.today().isoformat()
    where = f"{socket.gethostname()}, {today}, torch {torch.__version__}"
    text = measurement.cluster.to_yaml()
    write_atomically(path, f"# measured by autopar cluster on {where}\n{text}")


def print_measured(measurement: Measurement, path: Path | None) -> None:
    """Print the measurement on stdout, and where it was written."""
    console = Console(highlight=False, width=terminal_width(160))
    cluster, device = measurement.cluster, measurement.cluster.device
    show = partial(console.print, markup=False, soft_wrap=True)
    show(
        f"{device.name} ({device.kind}), {bytes_text(device.memory_bytes)}, "
        f"{device.launch_us:.1f} us per operator"
    )
    for title, curves, size_text in (
        ("GFLOP/s by the kernel's FLOPs", device.flops_by_size, flops_text),
        ("GB/s by the kernel's bytes", device.bytes_by_size, bytes_text),
    ):
        show(f"\n{title}", style="bold")
        for name, curve in curves.items():
            points = zip(curve.sizes, curve.rates, strict=True)
            rates = "  ".join(f"{size_text(size)}: {rate / 1e9:.3g}" for size, rate in points)
            show(f"  {name:22} {rates}")
    show("\nns per element beyond reading and writing it", style="bold")
    show("  " + ", ".join(f"{kind} {ns:.3g}" for kind, ns in device.extra_ns.items()))
    table = _links_table(measurement)
    if table.row_count:
        console.print(table)
        show("\nms of collectives by the bytes of the buffer", style="bold")
    for axis, link in enumerate(cluster.links):
        for kind, curve in link.curves.items():
            times = (f"{bytes_text(n)}: {1e-3 * float(curve.us(n)):.3g}" for n in curve.sizes)
            show(f"  {f'{cluster.axis_label(axis)} {kind}':22} {'  '.join(times)}")
    if cluster.host_link is not None:
        alpha, beta = cluster.host_link.alpha, cluster.host_link.beta
        show(f"\nhost link: alpha {1e6 * alpha:.1f} us, {1e-9 / beta:.3g} GB/s")
    show(
        f"\nwritten to {path}"
        if path
        else "\n-o cluster.yaml writes this to a file, for autopar plan --cluster"
    )


def _links_table(measurement: Measurement) -> Table:
    cluster = measurement.cluster
    table = Table(
        title="\nLinks", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for column in ("axis", "ranks", "alpha us", "GB/s", "median error of the fit"):
        table.add_column(column, justify="right", no_wrap=True)
    for axis, (ranks, link, fit) in enumerate(
        zip(cluster.mesh, cluster.links, measurement.fits, strict=True)
    ):
        if fit is not None:
            table.add_row(
                cluster.axis_label(axis).removeprefix("axis "),
                str(ranks),
                f"{1e6 * link.alpha:.1f}",
                f"{1e-9 / link.beta:.3g}",
                f"{100 * fit.median_error:.0f}% of {len(fit.samples)} times",
            )
    return table
