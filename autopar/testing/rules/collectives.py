"""The collectives that a rank runs, counted, against those that its lowering declares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from autopar.cluster.link import PASSES
from autopar.comm.groups import find_group
from autopar.ir.aliasing import tensors_of
from autopar.sharding.lowerings.declared import Declared


@dataclass(frozen=True, order=True)
class Run:
    """One kind of collective: its name, the mesh axis, and elements on the side not split."""

    kind: str
    axis: int
    elements: int

    def __str__(self) -> str:
        return f"{self.kind} of {self.elements} elements on axis {self.axis}"


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[Run] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "autopar" and func._opname in PASSES:
            names = [a.name for a in func._schema.arguments]
            group = (dict(zip(names, args, strict=False)) | (kwargs or {}))["group"]
            sides = (sum(t.numel() for t in tensors_of(side)) for side in (args, result))
            axis = find_group(str(group)).axis
            assert axis is not None, "lowerings communicate along mesh axes"
            self.runs[Run(func._opname, axis, max(sides))] += 1
        return result


@contextmanager
def counted() -> Iterator[Counter[Run]]:
    """Count the collectives that this thread runs."""
    with _Count() as mode:
        yield mode.runs


def undeclared(
    declared: Declared, forward: Counter[Run], backward: Counter[Run], *, carries: bool
) -> Iterator[str]:
    """Differences between the collectives that a rank ran and those that the lowering declares.

    Args:
        carries: whether the first operand takes a gradient; else the backward runs none.
    """
    expected: dict[str, Counter[Run]] = {"forward": Counter(), "backward": Counter()}
    for c in declared.collectives:
        run = Run(c.kind, c.axis, c.elements)
        expected["forward"][run] += c.forward
        expected["backward"][run] += c.backward if carries else 0
    for phase, runs in (("forward", forward), ("backward", backward)):
        if runs != expected[phase]:
            yield f"the {phase} declares {_listed(expected[phase])} and runs {_listed(runs)}"


def _listed(runs: Counter[Run]) -> str:
    return ", ".join(f"{count} {run}" for run, count in sorted(runs.items()) if count) or "none"
