"""What all benchmarks share: options, rows with targets, fresh processes, table, JSON, headline.

A benchmark collects `Row`s and ends with `finish`, which prints them as a table, writes them as
JSON where asked to, and prints the headline figure as the last line.
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

# in a pipe or a file as wide as it needs to be
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        case: what was run.
        metric: what was measured of it.
        value: in `unit`.
        unit: "s", "MiB", "%", ...
        target: the value should be at most this; None where there is no target.
    """

    case: str
    metric: str
    value: float
    unit: str
    target: float | None = None

    @property
    def ok(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else self.value <= self.target

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def turns(contestants: int, rounds: int) -> Iterator[list[int]]:
    """The order in which contestants take turns, for every round; the same in all processes.

    It is drawn, as what runs finds caches and heap as the one before has left them: in rotation,
    each would always run behind the same other one.
    """
    order = random.Random(0)
    for _ in range(rounds):
        yield order.sample(range(contestants), contestants)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="small and once, to see that it runs")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    return made


def cpu_model() -> str:
    """As the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> str:
    """What the figures were measured on."""
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
    """Run `python -m module --worker ARGUMENTS`: no cache of ours or of torch outlives it.

    The module answers by `answer`.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    return _answer_of([module, "--worker", json.dumps(dict(arguments))], 20, timeout_s)


def on_ranks(module: str, count: int, *arguments: str) -> dict[str, Any]:
    """Run `python -m module --rank ARGUMENTS` on local processes, of which rank 0 answers by
    `answer`.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    return _answer_of([*launch, module, "--rank", *arguments], 60)


def _answer_of(
    command: Sequence[str], lines: int, timeout_s: float | None = None
) -> dict[str, Any]:
    """What `python -m command` answers; where it fails, so many lines of what it said."""
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-lines:])
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{tail}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def answer(values: Mapping[str, Any]) -> None:
    """What a worker hands to `in_fresh_process`, and rank 0 to who called `on_ranks`."""
    print(json.dumps(dict(values)), flush=True)


def peak_rss_mib() -> float:
    """The largest resident set this process ever had."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The rows as a JSON list; the file is whole or does not change."""
    from autopar.files import write_atomically

    write_atomically(path, json.dumps([row.as_dict() for row in rows], indent=1) + "\n")


def finish(title: str, rows: Sequence[Row], headline: str, json_file: Path | None) -> int:
    """Print the rows and the headline, write the JSON; the exit code is 1 if a target is missed."""
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
            f"{row.value:.0f}" if abs(row.value) >= 100 else f"{row.value:.2f}",
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
