"""Other people's measured training steps against autopar's predictions.

    python -m benchmarks.published_steps --data FILE

The file is a JSON list of measured steps (`benchmarks/published_rows.py` says which keys); its path
may also stand in the environment variable AUTOPAR_PUBLISHED_STEPS. Each row that the search space
covers is written as a baseline (data, tensor, sequence and pipeline parallelism, ZeRO,
microbatches, recomputation, precision) and predicted by the planner's cost model, for the devices,
networks and frameworks of `autopar/cluster/`. Their numbers were fitted to a seeded random half of
each data set; errors are those of the other half. With `--all`, no row counts as fitted: for a file
of other rows.

Per data set it prints the mean absolute percentage error, the bias (mean of the signed errors), and
for groups of rows that do the same work on as many GPUs Kendall's tau and the regret: how much
slower the configuration that is predicted to be fastest was measured than the fastest one. Rows
that are not covered are counted with the reason.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console
from benchmarks.published_rows import NotCovered, group_of, halves, load, measured_s, run_of

VARIABLE = "AUTOPAR_PUBLISHED_STEPS"
SEED = 22
# mean error of all data sets, and of ranking those of vTrain
ERROR, TAU, MEDIAN_REGRET, WORST_REGRET, MEMORY, ACTIVATIONS = 10.0, 0.8, 2.0, 10.0, 10.0, 5.0
RANKED = ("vTrain-single", "vTrain-multi")


@dataclass(frozen=True)
class Compared:
    """A row with its prediction.

    Args:
        fitted: numbers were fitted to it.
        peak, activations: predicted over measured memory, where that is published.
    """

    row: Mapping[str, Any]
    fitted: bool
    measured_s: float
    predicted_s: float
    peak: float | None
    activations: float | None

    @property
    def error(self) -> float:
        """Percent, signed."""
        return 100 * (self.predicted_s / self.measured_s - 1)


def compare(
    rows: Sequence[Mapping[str, Any]], fitted: Sequence[bool]
) -> tuple[list[Compared], Counter[tuple[str, str]]]:
    """Predictions of the rows that are covered; and how often which reason kept others out, by data
    set."""
    from rich.progress import track

    from autopar.errors import AutoparError
    from benchmarks.published_plans import predict

    compared: list[Compared] = []
    left_out: Counter[tuple[str, str]] = Counter()
    pairs = list(zip(rows, fitted, strict=True))
    for row, fit in track(pairs, "predicting", console=console, transient=True):
        try:
            run, measured = run_of(row), measured_s(row)
            found = predict(run)
        except (NotCovered, AutoparError) as error:
            left_out[row["dataset"], str(error).split("\n")[0]] += 1
            continue
        compared.append(
            Compared(
                row, fit, measured, found.step_s,
                _ratio(found.peak_gib, row.get("peak_memory_gib")),
                _ratio(found.activation_gib, _activations(row)),
            )
        )  # fmt: skip
    return compared, left_out


def _ratio(predicted: float, measured: float | None) -> float | None:
    return predicted / measured if measured and predicted else None


def _activations(row: Mapping[str, Any]) -> float | None:
    """Published activation memory of what the row ran."""
    selective = str(row.get("recompute", "")).startswith("selective")
    return row.get("act_gib_seq_sel") if selective else None


def figures(name: str, every: Sequence[Compared]) -> Iterator[Row]:
    """The rows of one data set: those that nothing was fitted to, and the error of the others."""
    compared = [c for c in every if not c.fitted]
    fitted = [abs(c.error) for c in every if c.fitted]
    if fitted:
        yield Row(name, "rows of the fitted half", len(fitted), "")
        yield Row(name, "mean absolute error, fitted half", fmean(fitted), "%")
    if not compared:
        return
    errors = [c.error for c in compared]
    yield Row(name, "rows", len(compared), "")
    yield Row(name, "mean absolute error", fmean(map(abs, errors)), "%", ERROR)
    yield Row(name, "bias", fmean(errors), "%")
    yield Row(name, "largest error", max(map(abs, errors)), "%")
    ranks = name in RANKED
    groups: dict[tuple[Any, ...], list[Compared]] = defaultdict(list)
    for c in compared:
        groups[group_of(c.row)].append(c)
    several = [g for g in groups.values() if len(g) > 1]
    if several:
        yield Row(name, "groups of equal work", len(several), "")
        # an average over pairs, so that groups of two do not count as much as groups of twenty
        pairs = [len(g) * (len(g) - 1) / 2 for g in several]
        tau = sum(n * kendall(g) for n, g in zip(pairs, several, strict=True)) / sum(pairs)
        yield Row(name, "1 - Kendall's tau", 1 - tau, "", 1 - TAU if ranks else None)
        yield from _regrets(name, "", several, ranks)
        whole: dict[tuple[Any, ...], list[Compared]] = defaultdict(list)
        for c in every:
            whole[group_of(c.row)].append(c)
        if fitted:
            groups_of_all = [g for g in whole.values() if len(g) > 1]
            yield from _regrets(name, ", both halves", groups_of_all, ranks)
    for what, target, ratios in (
        ("peak memory", MEMORY, [c.peak for c in compared if c.peak]),
        ("activation memory", ACTIVATIONS, [c.activations for c in compared if c.activations]),
    ):
        if ratios:
            error = 100 * fmean(abs(ratio - 1) for ratio in ratios)
            yield Row(name, f"error of {what}", error, "%", target)


def _regrets(
    name: str, which: str, groups: Sequence[Sequence[Compared]], ranks: bool
) -> Iterator[Row]:
    regrets = [regret(g) for g in groups]
    typical, worst = (MEDIAN_REGRET, WORST_REGRET) if ranks else (None, None)
    yield Row(name, f"median regret{which}", median(regrets), "%", typical)
    yield Row(name, f"worst regret{which}", max(regrets), "%", worst)


def kendall(group: Sequence[Compared]) -> float:
    """Kendall's tau of predicted and measured times; pairs that are equal in either count as 0."""
    agree = total = 0
    for k, a in enumerate(group):
        for b in group[:k]:
            measured, predicted = a.measured_s - b.measured_s, a.predicted_s - b.predicted_s
            agree += (measured * predicted > 0) - (measured * predicted < 0)
            total += 1
    return agree / total


def regret(group: Sequence[Compared]) -> float:
    """Percent by which the configuration that is predicted to be fastest was measured slower than
    the fastest."""
    chosen = min(group, key=lambda c: c.predicted_s)
    return 100 * (chosen.measured_s / min(c.measured_s for c in group) - 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, default=os.environ.get(VARIABLE))
    parser.add_argument("--only", default="", help="parts of names of data sets, with commas")
    parser.add_argument("--all", action="store_true", help="nothing was fitted to these rows")
    parser.add_argument("--rows", type=Path, help="write every row with its prediction here")
    parser.add_argument("--plots", type=Path, help="write the scatter plots into this folder")
    parser.add_argument("--worst", type=int, default=0, help="print so many of the largest errors")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error(f"name the file of measured steps with --data, or in {VARIABLE}; {_FORMAT}")
    try:
        rows = load(Path(options.data))
    except ValueError as error:
        parser.error(str(error))
    fitted = [False] * len(rows) if options.all else halves(rows, SEED)
    pairs = zip(rows, fitted, strict=True)
    chosen = [(row, fit) for row, fit in pairs if _named(row, options.only)]
    if options.quick:
        by_name: dict[str, list[Any]] = defaultdict(list)
        for pair in chosen:
            by_name[pair[0]["dataset"]].append(pair)
        chosen = [pair for pairs in by_name.values() for pair in pairs[:4]]
    console.print(common.machine(), markup=False)
    compared, left_out = compare([r for r, _ in chosen], [f for _, f in chosen])
    if options.rows is not None:
        _write(options.rows, compared)
    if options.plots is not None:
        _plot(options.plots, [c for c in compared if not c.fitted])
    names = dict.fromkeys(c.row["dataset"] for c in compared)
    table = [r for n in names for r in figures(n, [c for c in compared if c.row["dataset"] == n])]
    for (name, reason), count in sorted(left_out.items()):
        console.print(f"not covered: {count:4d} of {name}: {reason}", markup=False, soft_wrap=True)
    by_error = sorted(compared, key=lambda c: -abs(c.error))
    for c in by_error[: options.worst]:
        console.print(f"{c.error:+6.1f}%  {_words(c.row)}", markup=False, soft_wrap=True)
    headline = f"{len(compared)} rows predicted, {sum(left_out.values())} not covered"
    if other := [abs(c.error) for c in compared if not c.fitted]:
        headline += f"; mean absolute error of {len(other)} others {fmean(other):.1f}%"
    return common.finish("Published steps", table, headline, options.json)


_FORMAT = "it is a JSON list of objects, whose keys benchmarks/published_rows.py describes"


def _words(row: Mapping[str, Any]) -> str:
    keys = (
        "dataset", "model", "n_gpus", "global_batch", "micro_batch", "seq_len", "tp", "pp", "dp",
        "recompute", "activation_checkpointing", "step_time_s", "derived_step_time_s",
    )  # fmt: skip
    return ", ".join(f"{k} {str(row[k])[:24]}" for k in keys if row.get(k) is not None)


def _named(row: Mapping[str, Any], only: str) -> bool:
    return any(part in row["dataset"] for part in only.split(","))


def _plot(folder: Path, compared: Sequence[Compared]) -> None:
    """Two plots: of vTrain's rows, and of all others."""
    from benchmarks.published_plots import write

    for file, ranked in (("accuracy_vtrain.svg", True), ("accuracy_others.svg", False)):
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for c in compared:
            if (c.row["dataset"] in RANKED) == ranked:
                points[c.row["dataset"]].append((c.measured_s, c.predicted_s))
        if points:
            write(points, folder / file)


def _write(path: Path, compared: Sequence[Compared]) -> None:
    from autopar.files import write_atomically

    data = [
        dict(c.row) | {"fitted": c.fitted, "predicted_s": c.predicted_s, "peak_ratio": c.peak}
        for c in compared
    ]
    write_atomically(path, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
