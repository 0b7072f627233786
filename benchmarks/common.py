"""The shared parts of benchmarks: options, rows with targets, fresh processes, table, JSON.

A benchmark collects `Row`s and ends with `finish`, which prints them as a table, writes them as
JSON with `--json`, and prints the headline figure as the last line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

# wide enough for all tables in a pipe or a file
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        case: what was run.
        metric: what was measured.
        value: in `unit`.
        unit: "s", "MiB", "%", ...
        target: upper bound of the value, if there is a target.
    """

    case: str
    metric: str
    value: float
    unit: str
    target: float | None = None

    @property
    def ok(self) -> bool | None:
        """Whether the target is met; None without a target."""
        return None if self.target is None else self.value <= self.target

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def turns(contestants: int, rounds: int) -> Iterator[list[int]]:
    """The order in which contestants take turns, per round. It is the same in all processes.

    The order is random, because each contestant finds caches and heap as the previous one left
    them. In a fixed rotation it would always run behind the same one.
    """
    order = random.Random(0)
    for _ in range(rounds):
        yield order.sample(range(contestants), contestants)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--quick", action="store_true", help="small and once, to check that it runs"
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    return options


def cpu_model() -> str:
    """The CPU's name, as the operating system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> str:
    """The machine and the versions, in a line."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return ", ".join(
        (
            f"{cpu_model()}, {os.cpu_count()} cores",
            f"Python {platform.python_version()}",
            f"torch {importlib.metadata.version('torch')}",
            f"OMP_NUM_THREADS={threads}" if threads else "OMP_NUM_THREADS not set",
            f"load {os.getloadavg()[0]:.1f}",
        )
    )


def in_fresh_process(
    module: str, arguments: Mapping[str, Any], *, timeout_s: float = 600.0
) -> dict[str, Any]:
    """Run `python -m module --worker ARGUMENTS`, so that no cache of autopar or torch survives.

    The result is what the module passes to `answer`.

    Raises:
        RuntimeError: it failed; the message has the end of its stderr.
    """
    return _answer_of([module, "--worker", json.dumps(dict(arguments))], 20, timeout_s)


def on_ranks(module: str, count: int, *arguments: str) -> dict[str, Any]:
    """Run `python -m module --rank ARGUMENTS` on local processes. The result is what rank 0 passes
    to `answer`.

    Raises:
        RuntimeError: it failed; the message has the end of its stderr.
    """
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    return _answer_of([*launch, module, "--rank", *arguments], 60)


def _answer_of(
    command: Sequence[str], lines: int, timeout_s: float | None = None
) -> dict[str, Any]:
    """The answer of `python -m command`. The error has that many `lines` of its stderr."""
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-lines:])
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{tail}")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def answer(values: Mapping[str, Any]) -> None:
    """Pass values from a worker to `in_fresh_process`, or from rank 0 to `on_ranks`."""
    print(json.dumps(dict(values)), flush=True)


def peak_rss_mib() -> float:
    """The peak resident set of this process."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as a JSON list."""
    from autopar.files import write_atomically

    write_atomically(path, json.dumps([row.as_dict() for row in rows], indent=1) + "\n")


def _shown(value: float) -> str:
    """Two decimals, fewer of large numbers, and a power of ten for tiny ones."""
    if 0 < abs(value) < 0.005:
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


def finish(title: str, rows: Sequence[Row], headline: str, json_file: Path | None) -> int:
    """Print rows and headline, and write the JSON. The exit code is 1 if a target is missed."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("case", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for column in ("value", "unit", "target", ""):
        side: Literal["left", "right"] = "left" if column in ("unit", "") else "right"
        table.add_column(column, justify=side, no_wrap=True)
    for i, row in enumerate(rows):
        new = i == 0 or rows[i - 1].case != row.case
        table.add_row(
            row.case if new else "",
            row.metric,
            _shown(row.value),
            row.unit,
            "" if row.target is None else f"<= {row.target:g}",
            {None: "", True: "ok", False: "MISSED"}[row.ok],
            end_section=i + 1 < len(rows) and rows[i + 1].case != row.case,
        )
    console.print(table)
    if json_file is not None:
        write_rows(json_file, rows)
    console.print(headline, markup=False, soft_wrap=True)
    return 1 if any(row.ok is False for row in rows) else 0
