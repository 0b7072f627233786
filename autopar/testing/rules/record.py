"""A file of what was proved: per op the number of cases, the largest error, and a digest of the
rule.

The digest tells a rule that has changed since its proof from one that has not.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from autopar.files import write_atomically
from autopar.sharding.rules import pointwise
from autopar.sharding.rules.registry import DERIVED, ROWS
from autopar.testing.rules.check import OpReport


@dataclass(frozen=True)
class Proof:
    """An op's entry: how many cases held, their largest error, and of which rule."""

    cases: int
    worst: float
    digest: str


def load(path: Path) -> dict[str, Proof]:
    """The record by op."""
    return {name: Proof(**entry) for name, entry in json.loads(path.read_text()).items()}


def save(reports: Iterable[OpReport], path: Path) -> None:
    """Enter the ops whose cases all hold, remove those of which one does not, keep the others."""
    proofs = load(path) if path.exists() else {}
    for report in reports:
        proofs.pop(report.name, None)
        if report.cases and not report.failed:
            proofs[report.name] = Proof(report.cases, report.worst, digest(report.name))
    body = ",\n".join(f' "{n}": {json.dumps(asdict(p))}' for n, p in sorted(proofs.items()))
    write_atomically(path, f"{{\n{body}\n}}\n")


def status(name: str, record: Mapping[str, Proof]) -> str:
    """`proved (N cases, 3e-14)`, `changed since proof` or `not proved`."""
    proof = record.get(name)
    if proof is None:
        return "not proved"
    if proof.digest != digest(name):
        return "changed since proof"
    return f"proved ({proof.cases} cases, {proof.worst:.0e})"


def digest(name: str) -> str:
    """Of everything that an op's rule is made of: notation, linear sets, and the source of its
    lowering, of its conditions and of the function that derives it."""
    parts: list[str] = []
    if name in DERIVED:
        parts += sources(DERIVED[name])
    elif name in ROWS:
        for row in ROWS[name]:
            parts += [row.notation, repr(row.linear), repr(row.always)]
            for function in filter(None, (row.lowering, row.when)):
                parts += sources(function)
    else:
        parts += [repr(pointwise.LINEAR.get(name, ())), *sources(pointwise.bind_pointwise)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def sources(function: Callable[..., Any]) -> list[str]:
    """Source of a function and of all functions of the rule table that it calls."""
    by_name: dict[str, str] = {}
    _collect(function, by_name)
    return [by_name[key] for key in sorted(by_name)]


def _collect(function: Any, by_name: dict[str, str]) -> None:
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType):
        return
    # the table of linear sets is entered by op, and `Row` is the notation itself
    inside = function.__module__.startswith("autopar.sharding.")
    if not inside or function.__module__ == "autopar.sharding.rule":
        return
    closed = [c.cell_contents for c in function.__closure__ or ()]
    key = f"{function.__module__}.{function.__qualname__}"
    kinds = str | int | float | bool | tuple | torch._ops.OpOverload
    plain = [repr(c) for c in closed if isinstance(c, kinds)]
    if key in by_name:
        return
    by_name[key] = "\n".join([inspect.getsource(function), *plain])
    for used in closed:
        _collect(used, by_name)
    names = _names(function.__code__)
    for name in names:
        value = function.__globals__.get(name)
        members = [value]
        if isinstance(value, ModuleType):
            members = [getattr(value, attribute, None) for attribute in names]
        for member in members:
            if isinstance(member, FunctionType):
                _collect(member, by_name)


def _names(code: CodeType) -> set[str]:
    """Globals and attributes that a function uses, and those within it."""
    inner = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*inner)
