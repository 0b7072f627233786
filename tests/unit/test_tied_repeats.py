"""Tied blocks: all, all but the ends, every second; what each of them costs."""

import numpy as np
import pytest
import torch
from torch import nn

from autopar import ClusterInfo, autoplan
from autopar.planner.tied_repeats import block_positions, interleave, untie_ends
from autopar.solver import PairCost, Problem, Row, solve
from autopar.solver.reductions import TiedVariables


def test_every_second_copy_of_what_is_left_is_a_part():
    classes = [0, *[1] * 8, 2, *[3] * 7]
    where = [None, *(("h.", k) for k in range(8)), None, *(("h.", k) for k in range(1, 8))]
    divided = interleave(classes, where, 3)
    part = {c: i for i, c in enumerate(dict.fromkeys(divided[1:9]))}
    assert [part[c] for c in divided[1:9]] == [0, 1, 0, 2, 0, 1, 0, 2]
    assert len(set(divided)) == 2 + 3 + 3  # single nodes stay one class each
    for a, b in zip(divided, classes, strict=True):
        assert {c for d, c in zip(divided, classes, strict=True) if d == a} == {b}


def test_positions_are_the_numbers_that_differ():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(
                nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
                for _ in range(1)
            )

        def forward(self, x):
            for block in self.stages[0]:
                x = block(x)
            return x.sum()

    space = autoplan(Model(), (torch.zeros(8, 8),), cluster=ClusterInfo.of("2")).space
    positions = block_positions(space, space.problem().classes)
    position_of = {d.name: p for d, p in zip(space.decisions, positions, strict=True)}
    assert position_of["linear_2"] == ("stages.0.", 2)
    assert position_of["p_stages_0_3_0_weight"] == ("stages.0.", 3)
    assert position_of["sum_1"] is None


def chain(seed, copies):
    """A chain of equal nodes, with a row that binds; the copies of each class."""
    rng = np.random.default_rng(seed)
    time, memory = rng.integers(0, 50, 3).astype(float), rng.integers(0, 50, 3).astype(float)
    table = rng.integers(0, 20, (3, 3)).astype(float)
    row = Row("memory", float(memory.mean() * copies), dict.fromkeys(range(copies), memory))
    edges = tuple(PairCost(v, v + 1, table) for v in range(copies - 1))
    return Problem((time,) * copies, edges, (row,)), [0] * copies


@pytest.mark.parametrize("seed", range(20))
def test_relaxed_classes_are_never_slower_and_bounded(seed):
    problem, classes = chain(seed, 7)
    where = [("h.", k) for k in range(7)]
    tied = solve(TiedVariables(problem, classes).problem, gap=1e-6)
    ends = solve(TiedVariables(problem, untie_ends(classes)).problem, gap=1e-6)
    halves = interleave(untie_ends(classes), where, 2)
    divided = solve(TiedVariables(problem, halves).problem, gap=1e-6)
    free = solve(problem, gap=1e-6)
    steps = [s.time_us for s in (tied, ends, divided, free)]
    assert steps == sorted(steps, reverse=True)
    assert free.bound_us <= free.time_us


def test_the_record_says_what_tying_costs():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)))
    plan = autoplan(blocks, (torch.zeros(64, 64),), cluster=ClusterInfo.of("4")).plan
    steps = plan.solver.sharing_us
    assert list(steps)[:2] == ["all blocks tied", "first and last untied"]
    assert plan.solver.bounded in steps
    assert min(steps.values()) <= steps["all blocks tied"] * (1 + 1e-9)
    assert plan.solver.objective_us <= steps["all blocks tied"] * (1 + 1e-9)
