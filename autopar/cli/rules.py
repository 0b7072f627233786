"""What `autopar rules check` and `autopar rules list` do and print."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autopar.report.text import terminal_width
from autopar.sharding.rule import Row
from autopar.sharding.rules.pointwise import LINEAR
from autopar.sharding.rules.registry import DERIVED, ROWS
from autopar.testing.rules import record
from autopar.testing.rules.check import OpReport, matching, prove
from autopar.testing.rules.samples import has_sampler, table_ops
from autopar.testing.rules.search import OpFindings, search_all

_WIDTH = 160


def checked(
    pattern: str | None, cases: int, seed: int, jobs: int, say: Callable[[str], None]
) -> list[OpReport]:
    """Prove the ops that match the pattern.

    Raises:
        ValueError: none does.
    """
    names = matching(pattern)
    began = time.perf_counter()
    ran = failed = ops = 0
    last_line = 0.0

    def progress(report: OpReport) -> None:
        nonlocal ran, failed, ops, last_line
        ran, failed, ops = ran + report.cases, failed + report.failed, ops + 1
        seconds = time.perf_counter() - began
        if seconds - last_line > 2 or ops == len(names):
            last_line = seconds
            say(f"{ops} of {len(names)} ops, {ran} cases, {failed} wrong, {seconds:.0f} s ...")

    return prove(names, cases, seed, jobs, progress)


def print_checked(reports: Sequence[OpReport]) -> None:
    """Print a line per op, then the failures."""
    console = Console(highlight=False, width=terminal_width(_WIDTH))
    table = Table(box=None, pad_edge=False)
    table.add_column("op", no_wrap=True)
    for column in ("cases", "kinds", "rows", "worst error", "wrong"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in reports:
        table.add_row(
            r.name, str(r.cases), f"{len(r.covered)}/{len(r.possible)}",
            f"{len(r.rows)}/{r.alternatives}", f"{r.worst:.1e}", str(r.failed or ""),
        )  # fmt: skip
    console.print(table)
    for r in reports:
        for failure in r.failures:
            console.print(f"\n{failure}", markup=False, soft_wrap=True)
    unreached = {
        f"{r.name} row {i}" for r in reports for i in range(r.alternatives) if i not in r.rows
    }
    if unreached:
        console.print(f"\nnever reached: {', '.join(sorted(unreached))}", markup=False)
    cases, failed = sum(r.cases for r in reports), sum(r.failed for r in reports)
    seconds = sum(r.seconds for r in reports)
    console.print(
        f"\n{cases} cases of {len(reports)} ops, {failed} wrong; "
        f"{cases / max(seconds, 1e-9):.0f} cases per second and process",
        markup=False,
    )


def discovered(pattern: str | None, seed: int, jobs: int, say: Callable[[str], None]) -> str:
    """Correct strategies that rules omit, and why; for an op without a rule, a proposed row.

    Raises:
        ValueError: the pattern names no op that calls can be drawn of.
    """
    if pattern is not None and pattern not in table_ops() and has_sampler(pattern):
        names = [pattern]
    else:
        names = matching(pattern)

    def done(f: OpFindings) -> None:
        say(
            f"{f.name}: {f.strategies} strategies, {len(f.missing)} missing, "
            f"{len(f.explained)} explained"
        )

    findings = search_all(names, seed, jobs, done)
    return "\n".join([*_explained(findings), *_missing(findings), _total(findings), ""])


def _explained(findings: Sequence[OpFindings]) -> list[str]:
    """Strategies omitted on purpose: the reason, then the strategies of each op."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for f in findings:
        for strategy, reason in f.explained:
            by_reason.setdefault(reason, {}).setdefault(f.name, []).append(strategy)
    lines = []
    for reason, ops in by_reason.items():
        lines += [f"left out: {reason}"]
        lines += [f"  {name}: {'; '.join(strategies)}" for name, strategies in ops.items()] + [""]
    return lines


def _missing(findings: Sequence[OpFindings]) -> list[str]:
    lines = ["missing:", ""]
    for f in findings:
        if f.missing:
            lines += [f.name, *(f"  {line}" for line in f.missing), ""]
    return lines if len(lines) > 2 else []


def _total(findings: Sequence[OpFindings]) -> str:
    return (
        f"{len(findings)} ops, {sum(f.strategies for f in findings)} strategies found, "
        f"{sum(len(f.missing) for f in findings)} missing, "
        f"{sum(len(f.explained) for f in findings)} explained"
    )


def print_rules(pattern: str | None, proofs_file: Path | None = None) -> None:
    """Print the table, a line per op and alternative.

    Args:
        proofs_file: as `record.save` writes it; the table then says what is proved.

    Raises:
        ValueError: the pattern names no op, or the file is no record.
        OSError: the file cannot be read.
    """
    names = matching(pattern) if pattern else list(table_ops())
    proofs = None if proofs_file is None else record.load(proofs_file)
    table = Table(box=None, pad_edge=False)
    for column in ("op", "rule", "linear", "lowering", *(["status"] if proofs is not None else [])):
        table.add_column(column, no_wrap=column in ("op", "status"), overflow="fold")
    for name in names:
        for i, line in enumerate(_lines(name)):
            status = [record.status(name, proofs)] if proofs is not None and not i else []
            table.add_row("" if i else name, *line, *status)
    Console(highlight=False, width=terminal_width(_WIDTH)).print(table)


def _lines(name: str) -> list[tuple[str, str, str]]:
    """Notation, linear sets and lowering of each alternative."""
    if name in DERIVED:
        return [(f"from shapes; {example(name)}", "", "")]
    rows = ROWS.get(name)
    if rows is None:
        return [("*d, ... -> *d", _sets(LINEAR.get(name, ())), "")]
    return [_line(row) for row in (rows if isinstance(rows, tuple) else (rows,))]


def _line(row: Row) -> tuple[str, str, str]:
    lowering = "" if row.lowering is None else row.lowering.__name__
    return row.notation, _sets(row.linear), lowering + (" (always)" if row.always else "")


def _sets(linear: Sequence[Sequence[int]]) -> str:
    return " ".join("{" + ",".join(map(str, group)) + "}" for group in linear)


def example(name: str) -> str:
    """A derived rule as it is for one call: `[8, 6] (a b) -> [48] (a)`."""
    import random

    from autopar.testing.rules.draw import Draw
    from autopar.testing.rules.one_op import one_op
    from autopar.testing.rules.samples import draw_sample, find_op

    op = find_op(name)
    assert op is not None
    for seed in range(20):
        draw = Draw(random.Random(f"{seed} {name}"))
        try:
            one = one_op(draw_sample(op, draw), draw)
            rule, known = one.rule
        except (RuntimeError, IndexError, NotImplementedError, ValueError):
            continue
        if known and rule.factors:
            break
    else:
        return "never split"
    sides = []
    for tensors, patterns in ((one.inputs, rule.inputs), (one.outputs, rule.outputs)):
        texts = []
        for tensor, dims in zip(tensors, patterns, strict=True):
            if tensor is not None and dims is not None:
                names = (d or f"[{n}]" for d, n in zip(dims, tensor.shape, strict=True))
                texts.append(" ".join(names))
        sides.append(", ".join(texts))
    return f"{one.sample}: {' -> '.join(sides)}"
