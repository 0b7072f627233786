"""The Pareto front against the optimum: by brute force over what is kept, and by an exact integer
program over what is held and recomputed before every operator of the backward.

The integer program (after Checkmate, Jain et al. 2020; the order is given, and forward values may
be recomputed before any operator b_t of the backward, as often as one likes):

    hold_t,s   storage s of the forward is alive when b_t's turn comes; hold_0 is what is kept
    run_t,i    operator i of the forward is recomputed before b_t
    alive_t,i,s  s is alive while i would run there; i = end is b_t itself

    min  Σ cost_i run_t,i
    s.t. hold_t,s + run_t,maker(s) >= 1             b_t reads s
         hold_t,s + run_t,maker(s) >= run_t,i       i reads s
         hold_t,s + run_t,maker(s) >= hold_t+1,s
         alive_t,i,s >= there_t,i,s + use - 1       use: run_t,j with j >= i that reads s, b_t reads
                                                    s, or hold_t+1,s
         gradients_t + Σ bytes_s alive_t,i,s <= budget

where there_t,i,s = hold_t,s, and + run_t,maker(s) if maker(s) comes before i.
"""

import itertools
import warnings

import numpy as np
import pulp
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopar.schedule.build import schedule_of
from autopar.schedule.live_ranges import live_ranges
from autopar.schedule.pareto import ScheduleFront, undominated
from autopar.schedule.program import Program, eager_schedule
from autopar.schedule.simulate import peak_bytes
from tests.memory import Step, step_of, without_overwriting
from tests.models import CASES

WITHIN = 1.01


class Blocks(nn.Module):
    """Residual blocks and a loss."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
            for _ in range(count)
        )

    def forward(self, x, y=None):
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(x, y)


@pytest.fixture(scope="module")
def blocks() -> Program:
    """Of a few residual blocks, with results in memory of their own, as the integer program has
    it."""
    torch.manual_seed(0)
    program = Step(Blocks(3).double(), CASES["mlp"].batch(0)).program
    return without_overwriting(program)


def test_no_choice_of_what_is_kept_is_better():
    program = step_of("mlp").program
    front = ScheduleFront(program)
    values = [s for s in program.forward_storages if program.nbytes[s]]
    points = []
    for count in range(len(values) + 1):
        for kept in itertools.combinations(values, count):
            points.append(front.point("kept", schedule_of(program, kept)))
    best = undominated(points)
    for point, solved in zip(best, front.solve([p.peak_bytes for p in best]), strict=True):
        assert solved is not None
        assert solved.cost <= WITHIN * point.cost


def optimum(program: Program, budget: float) -> float:
    """The least cost within a budget."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return _optimum(program, budget)


def _optimum(program: Program, budget: float) -> float:
    ops, nbytes, maker = program.ops, program.nbytes, program.maker
    forward, backward = program.forward, program.backward
    values = sorted(program.forward_storages)
    scale = sum(ops[i].us for i in forward)
    problem = pulp.LpProblem("optimum", pulp.LpMinimize)

    def binary(name: str) -> pulp.LpVariable:
        return pulp.LpVariable(name, cat="Binary")

    hold = [{s: binary(f"h{t}_{s}") for s in values} for t in range(len(backward))]
    run = [{i: binary(f"r{t}_{i}") for i in forward} for t in range(len(backward))]
    problem += pulp.lpSum(ops[i].us / scale * run[t][i] for t in range(len(run)) for i in forward)
    before, during = _gradients(program)
    for t, b in enumerate(backward):
        last = {s: hold[t + 1][s] if t + 1 < len(hold) else 0 for s in values}
        readers = {s: [i for i in forward if s in ops[i].reads] for s in values}
        for s in values:
            there = hold[t][s] + run[t][maker[s]]
            problem += there >= (1 if s in ops[b].reads else last[s])
            for i in readers[s]:
                problem += there >= run[t][i]
        for i in (*forward, None):
            terms = []
            for s in filter(nbytes.__getitem__, values):
                there = hold[t][s]
                if i is None or maker[s] <= i:
                    there = there + run[t][maker[s]]
                uses = [run[t][j] for j in readers[s] if i is not None and j >= i]
                uses += [1] if s in ops[b].reads else [last[s]]
                if maker[s] == i:
                    uses.append(run[t][i])  # results are alive while they are made
                alive = pulp.LpVariable(f"a{t}_{i}_{s}", 0, 1)
                terms.append(nbytes[s] / budget * alive)
                for use in uses:
                    problem += alive >= there + use - 1
            fixed = during[t] if i is None else before[t]
            problem += pulp.lpSum(terms) <= 1 - fixed / budget
    _forward(program, problem, hold[0], budget)
    solver = pulp.HiGHS(msg=False, timeLimit=600, gapRel=1e-4)
    problem.solve(solver)
    if problem.sol_status == pulp.LpSolutionInfeasible:
        return np.inf
    assert problem.sol_status == pulp.LpSolutionOptimal
    return float(pulp.value(problem.objective)) * scale


def _forward(
    program: Program, problem: pulp.LpProblem, kept: dict[int, pulp.LpVariable], budget: float
) -> None:
    """The forward's own peak."""
    place = {i: k for k, i in enumerate(program.forward)}
    last = {s: place[program.maker[s]] for s in kept}
    for i in program.forward:
        last |= {s: place[i] for s in program.ops[i].reads if s in last}
    last |= {s: len(place) - 1 for s in program.results}
    for k in range(len(place)):
        made = [s for s in kept if place[program.maker[s]] <= k and program.nbytes[s]]
        problem += pulp.lpSum(
            program.nbytes[s] / budget * (1 if last[s] >= k else kept[s]) for s in made
        ) <= 1  # fmt: skip


def _gradients(program: Program) -> tuple[list[int], list[int]]:
    """Bytes of the backward's own values before each of its operators, and while it runs."""
    schedule = eager_schedule(program)
    first = len(schedule.forward)
    count = len(schedule.backward)
    before, during = [0] * count, [0] * count
    for s, start, end in live_ranges(program, schedule).each():
        if start >= first:
            for t in range(start - first, end - first + 1):
                during[t] += program.nbytes[s]
                before[t] += program.nbytes[s] if t > start - first else 0
    return before, during


@pytest.mark.parametrize("share", [0.5])
def test_within_one_percent_of_the_optimum(blocks, share):
    pytest.importorskip("highspy")
    front = ScheduleFront(blocks)
    eager, smallest = front.eager_bytes, front.smallest().peak_bytes
    budget = smallest + share * (eager - smallest)
    (solved,) = front.solve([budget])
    assert solved is not None and solved.peak_bytes <= budget
    assert solved.peak_bytes == peak_bytes(blocks, solved.schedule)
    best = optimum(blocks, budget)
    print(f"{share}: {solved.cost:.2f} us, optimum {best:.2f} us")
    assert solved.cost <= WITHIN * best + 1e-9
