"""Kelley's cutting planes (1960) for the Lagrangian dual of the rows.

For prices p >= 0 (those of one slack add up to at most one)

    D(p)  =  min over x of  t(x) + sum_r p_r (a_r(x) - limit_r)

is a lower bound on every assignment within the rows. Every x that was visited gives a plane above
D, so a small linear program proposes the prices at which the planes allow the highest bound. Its
dual mixes the visited assignments into a fractional one, which tells where to branch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.solver.linear_program import LinearProgram
from autopar.solver.problem import Choices, Problem, Row, Separate

# of a hard row, in steps per largest excess
MAX_PRICE = 1e6


@dataclass(frozen=True)
class CuttingPlane:
    """A visited assignment.

    Args:
        choices: of every node.
        choices_us: its time without slacks.
        usage: per row of the pool, by how much it exceeds the limit.
    """

    choices: Choices
    choices_us: float
    usage: list[float]


class CutPool:
    """What is known of a problem: rows, visited assignments, and the best of those within the rows.

    Args:
        problem: its rows are the first ones.
        separate: gives rows that choices violate, beyond those listed.
        disable: layers to switch off, see `solve.LAYERS`.
        better_than_us: slower assignments are of no use.

    Attributes:
        time_us, choices: of the best assignment; infinite and None before there is one.
    """

    def __init__(
        self,
        problem: Problem,
        separate: Separate | None,
        disable: frozenset[str] = frozenset(),
        better_than_us: float = math.inf,
    ) -> None:
        self.problem, self.disable, self.better_than_us = problem, disable, better_than_us
        self.rows: list[Row] = list(problem.rows)
        self.planes: dict[Choices, CuttingPlane] = {}
        self.time_us = math.inf
        self.choices: Choices | None = None
        self._separate = separate or (lambda choices: ())
        self._names = {row.name for row in self.rows}

    @property
    def target_us(self) -> float:
        """Assignments that are not faster are of no use."""
        return min(self.time_us, self.better_than_us)

    def add(self, row: Row) -> None:
        """Add a row, unless it is known."""
        if row.name in self._names:
            return
        self.problem.check(row)
        self._names.add(row.name)
        self.rows.append(row)
        for plane in self.planes.values():
            plane.usage.append(self.problem.usage(row, plane.choices))

    def visit(self, choices: Choices) -> None:
        """Add the rows that an assignment violates and its plane; keep it if it is the best."""
        if choices in self.planes:
            return
        for row in self._separate(choices):
            self.add(row)
        usage = [self.problem.usage(row, choices) for row in self.rows]
        plane = CuttingPlane(choices, self.problem.choices_us(choices), usage)
        self.planes[choices] = plane
        slacks: dict[str, float] = {}
        for row, used in zip(self.rows, usage, strict=True):
            if row.slack:
                slacks[row.slack] = max(slacks.get(row.slack, 0.0), used)
            elif used > 1e-9 * max(1.0, abs(row.limit)):
                return
        time = plane.choices_us + sum(slacks.values())
        if time < self.time_us:
            self.time_us, self.choices = time, choices

    def known_prices(self, prices: Mapping[str, float]) -> dict[str, float]:
        """Those of rows in the pool."""
        return {name: price for name, price in prices.items() if name in self._names}

    def hard_prices(self, price: float) -> dict[str, float]:
        """Equal prices for all hard rows, in steps per largest visited excess."""
        planes = list(self.planes.values())
        hard = [r for r, row in enumerate(self.rows) if not row.slack]
        return {self.rows[r].name: price * self._scale(r, planes) / len(hard) for r in hard}

    def best_prices(self, planes: Sequence[CuttingPlane]) -> tuple[float, dict[str, float]]:
        """The highest bound that some planes allow, and the prices at which they do."""
        rows, program = self.rows, LinearProgram()
        scale = [self._scale(r, planes) for r in range(len(rows))]
        p = [program.variable(upper=1.0 if row.slack else MAX_PRICE) for row in rows]
        ceiling = self.time_us
        if not math.isfinite(ceiling):
            ceiling = 10.0 * max(abs(plane.choices_us) for plane in planes) + 1.0
        value = program.variable(-1.0, lower=-math.inf, upper=ceiling)
        for plane in planes:
            terms = [(p[r], -u * scale[r]) for r, u in enumerate(plane.usage)]
            program.row([(value, 1.0), *terms], upper=plane.choices_us)
        for name in dict.fromkeys(row.slack for row in rows if row.slack):
            group = [(v, 1.0) for v, row in zip(p, rows, strict=True) if row.slack == name]
            program.row(group, upper=1.0)
        values = program.minimize().values
        prices = {
            row.name: max(0.0, float(values[v])) * s
            for row, v, s in zip(rows, p, scale, strict=True)
        }
        return float(values[value]), {name: price for name, price in prices.items() if price}

    def mixture(self, planes: Sequence[CuttingPlane]) -> np.ndarray:
        """Shares of the assignments, summing to one, in the cheapest mixture within the rows."""
        if not planes:
            return np.zeros(0)
        program = LinearProgram()
        penalty = 1e3 * max(abs(plane.choices_us) for plane in planes)
        excess = program.variable(penalty)  # of hard rows, if no mixture is within them
        share = [program.variable(plane.choices_us) for plane in planes]
        slacks = dict.fromkeys(row.slack for row in self.rows if row.slack)
        slack = {name: program.variable(1.0) for name in slacks}
        program.row([(s, 1.0) for s in share], lower=1.0, upper=1.0)
        for r, row in enumerate(self.rows):
            scale = max([1e-9, *(abs(plane.usage[r]) for plane in planes)])
            terms = [(s, plane.usage[r] / scale) for s, plane in zip(share, planes, strict=True)]
            beyond = (slack[row.slack], -1.0 / scale) if row.slack else (excess, -1.0)
            program.row([*terms, beyond], upper=0.0)
        shares = np.maximum(program.minimize().values[share], 0.0)
        return np.asarray(shares / max(shares.sum(), 1e-12))

    def _scale(self, r: int, planes: Sequence[CuttingPlane]) -> float:
        """Hard rows are in bytes: a unit of price is a step for the largest visited excess."""
        if self.rows[r].slack:
            return 1.0
        excess = max(abs(plane.usage[r]) for plane in planes)
        return max(max(abs(plane.choices_us) for plane in planes), 1e-9) / max(excess, 1e-9)
