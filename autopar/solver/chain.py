"""Rotor: which stages of a chain to keep, to checkpoint or to recompute, by dynamic programming.

A chain of stages 0..n-1 runs forward and then backward. A stage's forward runs in one of three
ways: F_all keeps one of the stage's options for its backward, F_ck keeps the stage's input to start
again from, F_none keeps nothing. Schedules are persistent: what is kept stays until it is used.

    C(i, j, m)   least cost of forward and backward of the stages i..j, whose input is there and
                 does not count, in m slots of memory
    C(i, j, m) = min  F_all:  cost_ik + sum of forward_i..d-1 + C(d, j, m - kept_ik - input_d)
                              for options k of the stages i..d-1 with forward_ik, backward_ik <= m
                      F_ck:   sum of forward_i..c-1 + C(c, j, m - input_c)
                              + C(i, c-1, m - gradient_c)          for i < c <= j

after Herrmann, Beaumont, Eyraud-Dubois et al., "Optimal checkpointing for heterogeneous chains"
(2019), with several options per stage. While the stages below c run again, the gradient of c's
input waits. Bytes are rounded up to slots and the budget down, so that what fits in slots fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ChainOption:
    """One way to keep a stage for its backward.

    Args:
        kept: memory from forward to backward, without the stage's input and output.
        forward: the most that is alive while the forward runs, without its input.
        backward: the most that is alive while the backward runs, with the gradient that comes in
            and what was kept, without the stage's input and output.
        cost: of what the backward computes again.
        span: how many stages it is for, from its own on; between them nothing else is kept.
    """

    kept: float
    forward: float
    backward: float
    cost: float
    span: int = 1


@dataclass(frozen=True)
class ChainStage:
    """A stage of the chain.

    Args:
        input: memory of what it takes from the stage before.
        gradient: memory of the gradient of what it hands on.
        forward_cost: of running it again.
        forward: the most that is alive while it runs and keeps nothing but its result.
        options: at least one.
    """

    input: float
    gradient: float
    forward_cost: float
    forward: float
    options: tuple[ChainOption, ...]


@dataclass(frozen=True)
class Keep:
    """F_all: the stage, or as many as the option spans, keep an option."""

    stage: int
    option: int


@dataclass(frozen=True)
class Checkpoint:
    """F_ck: stages `first` up to `then` run without keeping anything; the input of `then` is kept,
    from there on all is `later`, and afterwards `again` does the stages before it."""

    first: int
    then: int
    later: tuple[Keep | Checkpoint, ...]
    again: tuple[Keep | Checkpoint, ...]


Plan = tuple[Keep | Checkpoint, ...]


class ChainTable:
    """C of a chain for all budgets up to `memory`.

    Args:
        memory: the largest budget, in the units of the stages.
        slots: into which it is divided.
    """

    def __init__(self, stages: Sequence[ChainStage], memory: float, slots: int = 500) -> None:
        self.stages, self.memory, self.slots = tuple(stages), memory, slots
        self._unit = memory / slots
        n, width = len(stages), slots + 1
        self._total = np.concatenate([[0.0], np.cumsum([s.forward_cost for s in stages])])
        self._cost = np.full((n, n, width), np.inf)
        self._choice = np.zeros((n, n, width), dtype=np.int16)
        # C(c, j) with the input of c paid, by j and c; C(i, c-1) with the gradient paid, by i and c
        self._later = np.full((n, n, width), np.inf)
        self._again = np.full((n, n, width), np.inf)
        self._fill()

    def cost(self, memory: float) -> float:
        """Least cost within a budget; infinite if there is none."""
        return float(self._cost[0, len(self.stages) - 1, self._within(memory)])

    def budgets(self) -> list[float]:
        """The smallest budget for every cost there is, from the largest down."""
        costs = self._cost[0, len(self.stages) - 1]
        first = [m for m in range(self.slots + 1) if costs[m] < (costs[m - 1] if m else np.inf)]
        return [m * self._unit for m in reversed(first)]

    def plan(self, memory: float) -> Plan:
        """A cheapest plan within a budget.

        Raises:
            ValueError: there is none.
        """
        m = self._within(memory)
        if not np.isfinite(self._cost[0, len(self.stages) - 1, m]):
            raise ValueError(f"no schedule of the chain fits {memory:.0f}")
        return self._read(0, len(self.stages) - 1, m)

    def _within(self, memory: float) -> int:
        # a budget that is a whole number of slots may come back a rounding error below it
        return min(self.slots, math.floor(memory / self._unit * (1 + 1e-12)))

    def _up(self, memory: float) -> int:
        return math.ceil(memory / self._unit * (1 - 1e-12))

    def _fill(self) -> None:
        n = len(self.stages)
        total = self._total
        for length in range(n):
            for i in range(n - length):
                j = i + length
                best, choice = self._keep(i, j)
                if length:
                    through = (
                        self._later[j, i + 1 : j + 1]
                        + self._again[i, i + 1 : j + 1]
                        + (total[i + 1 : j + 1] - total[i])[:, None]
                    )
                    which = through.argmin(0)
                    least = np.take_along_axis(through, which[None], 0)[0]
                    better = least < best
                    best = np.where(better, least, best)
                    choice = np.where(better, -(which + i + 1), choice)
                self._cost[i, j], self._choice[i, j] = best, choice
                self._store(i, j)

    def _keep(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """F_all with the best option."""
        stage = self.stages[i]
        best = np.full(self.slots + 1, np.inf)
        choice = np.zeros(self.slots + 1, dtype=np.int16)
        for k, option in enumerate(stage.options):
            cost = np.zeros(self.slots + 1)
            backward, end = option.backward, i + option.span
            if end > j + 1:
                continue
            if end == j + 1:  # the gradient that comes in is paid by whoever runs this stage again
                backward -= self.stages[j].gradient
            else:
                cost = _paid(self._cost[end, j], self._up(option.kept + self.stages[end].input))
            cost = cost + (self._total[end] - self._total[i] + option.cost)
            cost[: self._up(max(option.forward, backward, 0.0))] = np.inf
            better = cost < best
            best, choice = np.where(better, cost, best), np.where(better, k, choice)
        return best, choice

    def _store(self, i: int, j: int) -> None:
        """What longer pieces read of C(i, j)."""
        self._later[j, i] = _paid(self._cost[i, j], self._up(self.stages[i].input))
        if j + 1 < len(self.stages):
            again = _paid(self._cost[i, j], self._up(self.stages[j].gradient))
            inputs = [0.0, *(s.input for s in self.stages[i + 1 : j + 1])]
            running = (s.forward + x for s, x in zip(self.stages[i : j + 1], inputs, strict=True))
            again[: self._up(max(running))] = np.inf
            self._again[i, j + 1] = again

    def _read(self, i: int, j: int, m: int) -> Plan:
        plan: list[Keep | Checkpoint] = []
        while True:
            choice = int(self._choice[i, j, m])
            if choice < 0:
                c = -choice
                later = self._read(c, j, m - self._up(self.stages[c].input))
                again = self._read(i, c - 1, m - self._up(self.stages[c - 1].gradient))
                return (*plan, Checkpoint(i, c, later, again))
            plan.append(Keep(i, choice))
            option = self.stages[i].options[choice]
            i += option.span
            if i > j:
                return tuple(plan)
            m -= self._up(option.kept + self.stages[i].input)


def _paid(cost: np.ndarray, slots: int) -> np.ndarray:
    """The cost for a budget of which some slots are used."""
    paid = np.full(cost.shape, np.inf)
    if slots < len(cost):
        paid[slots:] = cost[: len(cost) - slots]
    return paid
