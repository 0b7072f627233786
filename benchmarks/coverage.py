"""How many of the libraries' models autopar captures: Hugging Face transformers and timm.

Each family is built tiny with random weights, runs forward and backward in eager mode, is traced,
and the captured graph runs with the same weights: loss, results, buffers and every gradient are
compared, on the batch it was traced with and on another of the same shapes. Workers take the
families one after the other; a crash or a hang costs the one family.

With `--mesh` every captured family is also planned for that mesh, and the solver's plan and some
random legal ones run on ranks simulated by threads: loss, results, buffers and every gradient shard
against one device, in float64.

What does not run in eager mode with its tiny configuration is "not built" and does not count.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import common
from benchmarks.common import console
from tests.zoo.examine import CAPTURED, GOOD, Outcome, examine, first_line

TIMEOUT_S = 240.0
# workers start afresh now and then: libraries keep what they compiled and imported
FAMILIES_PER_WORKER = 40


@dataclass(frozen=True)
class Task:
    """One family: a row of the zoo, or one that its library lists."""

    name: str
    library: str
    required: bool


def tasks(library: str | None, only: Sequence[str], quick: bool) -> list[Task]:
    """The required families, then the others."""
    from tests.zoo import auto, auto_timm, hf, timm_rows

    required = [Task(f.name, f.library, True) for f in (*hf.FAMILIES, *timm_rows.FAMILIES)]
    known = {row.name for row in hf.ROWS}
    listed = [Task(name, "hf", False) for name in auto.hf_types() if _python(name) not in known]
    known = {auto_timm.module_of(row.entry) for row in timm_rows.ROWS}
    listed += [Task(name, "timm", False) for name in auto_timm.modules() if name not in known]
    every = [t for t in (*required, *listed) if library in (None, t.library)]
    if only:
        return [t for t in every if t.name in only]
    return [t for t in every if t.required][::6] if quick else every


def _python(name: str) -> str:
    return name.replace("-", "_")


@dataclass(frozen=True)
class How:
    """What is done with each family.

    Args:
        dropout: with the libraries' own.
        mesh: to plan for; none if empty.
        random: plans to run besides the solver's.
        lower: run the plans' forward and backward graphs after the passes.
    """

    dropout: bool = False
    mesh: str = ""
    random: int = 0
    lower: bool = False


def attempt(task: Task, how: How) -> Outcome:
    """Try one, in this process."""
    from tests.zoo import auto, auto_timm, hf, timm_rows

    try:
        if task.required:
            rows = hf.FAMILIES if task.library == "hf" else timm_rows.FAMILIES
            family = next(f for f in rows if f.name == task.name)
        else:
            find = auto.hf_family if task.library == "hf" else auto_timm.family
            family = find(task.name)
        outcome = replace(examine(family, dropout=how.dropout), required=task.required)
        if how.mesh and outcome.status in GOOD:
            from tests.zoo.sharded import examine_plans

            outcome = examine_plans(outcome, family, how.mesh, how.random, lower=how.lower)
        return outcome
    except auto.NotBuilt as error:
        return Outcome(task.name, task.library, reason=str(error))
    except Exception as error:
        reason = first_line(error)
        return Outcome(task.name, task.library, "", task.required, "crashed", reason=reason)


def work(how: How) -> None:
    """Answer tasks from standard input, a line of JSON for each, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print
    os.dup2(1, 2)
    for line in sys.stdin:
        outcome = attempt(Task(**json.loads(line)), how)
        print(json.dumps(asdict(outcome)), file=answers, flush=True)


class Worker:
    """A process that tries one family after another."""

    def __init__(self, how: How) -> None:
        settings = json.dumps(asdict(how))
        command = [sys.executable, "-m", "benchmarks.coverage", "--worker", settings]
        self.done = 0
        self._process = subprocess.Popen(
            command, cwd=common.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, task: Task, timeout_s: float) -> Outcome:
        """Raises queue.Empty after the timeout, BrokenPipeError if the process has died."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(task)) + "\n")
        self._process.stdin.flush()
        line = self._answers.get(timeout=timeout_s)
        if not line:
            raise BrokenPipeError(f"exit code {self._process.wait()}")
        self.done += 1
        return Outcome(**json.loads(line))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def run(todo: Sequence[Task], *, jobs: int, how: How, timeout_s: float) -> Iterator[Outcome]:
    """Outcomes as they come."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in todo:
        waiting.put(task)
    finished: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=_serve, args=(waiting, finished, how, timeout_s), daemon=True)
        for _ in range(min(jobs, len(todo)))
    ]
    for thread in threads:
        thread.start()
    for _ in todo:
        yield finished.get()


def _serve(
    waiting: queue.SimpleQueue[Task],
    finished: queue.SimpleQueue[Outcome],
    how: How,
    timeout_s: float,
) -> None:
    worker = None
    while True:
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            break
        if worker is None:
            worker = Worker(how)
        failed = Outcome(task.name, task.library, required=task.required)
        try:
            outcome = worker.ask(task, timeout_s)
        except queue.Empty:
            outcome = replace(failed, status="timed out", reason=f"after {timeout_s:.0f} s")
        except BrokenPipeError as error:
            outcome = replace(failed, status="crashed", reason=str(error))
        finished.put(outcome)
        if outcome.status in ("timed out", "crashed") or worker.done == FAMILIES_PER_WORKER:
            worker.stop()
            worker = None
    if worker is not None:
        worker.stop()


def line_of(outcome: Outcome) -> str:
    """One line of progress."""
    o = outcome
    if o.status in CAPTURED:
        text = f"{o.nodes} nodes, {o.capture_s:.1f} s, error {o.error:.1e}"
        if o.plans or o.plan_reason:
            text += f"; {o.plans_equal} of {o.plans} plans equal, planned in {o.plan_s:.1f} s, "
            text += f"{o.unruled:.2%} without a rule {o.plan_reason[:200]}"
    else:
        text = o.reason[:140]
    return f"{o.library} {o.name}: {o.status}, {text}"


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """A row per family that was built."""
    table = Table(title="Coverage", title_justify="left", box=None, pad_edge=False)
    table.add_column("family", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    sharded = any(o.plans or o.plan_reason for o in outcomes)
    columns = ["nodes", "capture s", "max error", "guards"]
    columns += ["plan s", "plans run", "equal", "no rule"] if sharded else []
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for o in outcomes:
        if o.status == "not built":
            continue
        ran = o.status in CAPTURED and o.status not in ("does not run", "own draws")
        table.add_row(
            f"{o.library} {o.name}" + (" *" if o.required else ""),
            o.kind,
            str(o.nodes) if o.status in CAPTURED else "",
            f"{o.capture_s:.1f}" if o.status in CAPTURED else "",
            f"{o.error:.1e}" if ran else "",
            str(o.guards) if o.status in CAPTURED else "",
            *(_sharded_cells(o) if sharded else ()),
            o.status + (" (refuses the next batch)" if o.refused else ""),
        )
    return table


def _sharded_cells(o: Outcome) -> tuple[str, ...]:
    if not o.plan_s:
        return ("",) * 4
    return f"{o.plan_s:.1f}", str(o.plans), str(o.plans_equal), f"{o.unruled:.2%}"


def failures_of(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What went wrong, the most frequent reasons first, each with its families and lines."""
    groups: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for o in outcomes:
        if o.plan_reason:
            yield f"{o.library} {o.name}{' *' if o.required else ''}: {o.plan_reason}"
        if o.status not in GOOD:
            groups[o.status, re.sub(r"\d[\d.e+-]*|0x\w+|'[^']*'", "N", o.reason)[:90]].append(o)
    for (status, _), group in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        yield f"{status}, {len(group)}: {group[0].reason[:200]}"
        for o in group:
            where = f" at {o.source}: {o.snippet[:100]}" if o.source else ""
            yield f"    {o.library} {o.name}{' *' if o.required else ''}{where}"


def headline_of(outcomes: Sequence[Outcome]) -> str:
    """The figure."""

    def counted(chosen: Sequence[Outcome]) -> str:
        built = [o for o in chosen if o.status != "not built"]
        captured = sum(o.status in CAPTURED for o in built)
        equal = sum(o.status in GOOD for o in built)
        return f"{captured} / {len(built)} ({equal} equal)"

    parts = [
        f"{name} {counted(chosen)}"
        for name, chosen in {
            "required": [o for o in outcomes if o.required],
            "transformers": [o for o in outcomes if o.library == "hf"],
            "timm": [o for o in outcomes if o.library == "timm"],
        }.items()
        if chosen
    ]
    headline = f"captured {counted(outcomes)}; {'; '.join(parts)}"
    planned = [o for o in outcomes if o.plan_s]
    if planned:
        right = sum(o.plans_equal == o.plans > 0 for o in planned)
        ruled = sum(o.unruled < 0.01 for o in planned)
        split = sum(o.split for o in planned)
        headline += f"; planned {len(planned)}, all plans equal {right}, split {split}"
        headline += f", below 1% without a rule {ruled}"
    return headline


def main(arguments: Sequence[str] | None = None) -> int:
    """Try them; the exit code is 1 if a required family is not equal."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these families")
    parser.add_argument("--required", action="store_true", help="the families of tests/zoo alone")
    parser.add_argument("--library", choices=("hf", "timm"), help="of one library")
    parser.add_argument("--jobs", type=int, default=1, help="workers at a time")
    parser.add_argument("--dropout", action="store_true", help="with the libraries' dropout")
    parser.add_argument("--mesh", default="", help="also plan for this mesh, and run the plans")
    parser.add_argument("--plans", type=int, default=5, help="random plans to run with --mesh")
    parser.add_argument(
        "--lower", action="store_true", help="run the graphs that the engine runs, with --mesh"
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="per family, in seconds")
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    todo = tasks(options.library, options.only, options.quick)
    todo = [t for t in todo if t.required or not options.required]
    outcomes: list[Outcome] = []
    how = How(options.dropout, options.mesh, options.plans, options.lower)
    for outcome in run(todo, jobs=options.jobs, how=how, timeout_s=options.timeout):
        outcomes.append(outcome)
        console.print(
            f"{len(outcomes)}/{len(todo)} {line_of(outcome)}", markup=False, soft_wrap=True
        )
    order = {(task.library, task.name): i for i, task in enumerate(todo)}
    outcomes.sort(key=lambda o: order[o.library, o.name])
    console.print(table_of(outcomes))
    for line in failures_of(outcomes):
        console.print(line, markup=False, soft_wrap=True)
    if options.json is not None:
        _write(options.json, outcomes)
    console.print(headline_of(outcomes), markup=False, soft_wrap=True)
    return 1 if any(o.required and o.status not in GOOD for o in outcomes) else 0


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    from autopar.files import write_atomically

    values: list[dict[str, Any]] = [asdict(o) for o in outcomes]
    write_atomically(path, json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(How(**json.loads(sys.argv[2])))
    else:
        sys.exit(main())
