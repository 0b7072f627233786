"""The solver against brute force: optimal, feasible, and honest about its bound."""

from itertools import product

import numpy as np
import pytest

from autopar.errors import InfeasibleError
from autopar.solver import Edge, Problem, solve
from autopar.solver.elimination import Elimination
from autopar.solver.ilp import solve_ilp
from autopar.solver.reductions import drop_dominated, share


def random_problem(seed: int, *, nodes: int = 5, budget: float = np.inf) -> Problem:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, nodes)
    time = tuple(rng.integers(0, 50, n).astype(float) for n in sizes)
    memory = tuple(rng.integers(0, 50, n).astype(float) for n in sizes)
    edges = []
    for a, b in product(range(nodes), repeat=2):
        if a < b and rng.random() < 0.5:
            cost = rng.integers(0, 50, (sizes[a], sizes[b])).astype(float)
            extra = rng.integers(0, 20, cost.shape).astype(float) if rng.random() < 0.5 else None
            edges.append(Edge(a, b, cost, extra))
    return Problem(time, memory, tuple(edges), budget)


def brute_force(problem: Problem) -> tuple[float, float]:
    """Least time within the budget, and least memory."""
    every = [problem.evaluate(c) for c in product(*(range(len(t)) for t in problem.time_us))]
    fits = [t for t, m in every if m <= problem.budget_bytes]
    return min(fits, default=np.inf), min(m for _, m in every)


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force_without_a_budget(seed):
    problem = random_problem(seed)
    solution = solve(problem)
    assert solution.time_us == pytest.approx(brute_force(problem)[0])
    assert solution.gap == pytest.approx(0.0)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("tightness", [0.2, 0.5, 0.8])
def test_equals_brute_force_within_a_budget(seed, tightness):
    loose = random_problem(seed)
    leanest = brute_force(loose)[1]
    fastest = solve(loose).memory_bytes
    budget = leanest + tightness * max(0.0, fastest - leanest)
    problem = Problem(loose.time_us, loose.memory_bytes, loose.edges, budget)
    solution = solve(problem)
    assert solution.memory_bytes <= budget
    assert solution.time_us == pytest.approx(brute_force(problem)[0])
    assert solution.bound_us <= solution.time_us * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_too_small_a_budget_names_the_smallest(seed):
    loose = random_problem(seed)
    leanest = brute_force(loose)[1]
    problem = Problem(loose.time_us, loose.memory_bytes, loose.edges, leanest - 1)
    with pytest.raises(InfeasibleError, match="smallest budget") as error:
        solve(problem)
    assert error.value.smallest_bytes == leanest


@pytest.mark.parametrize("seed", range(20))
def test_min_marginals_equal_brute_force(seed):
    problem = random_problem(seed)
    marginals = Elimination(*problem.weighted(0.3)).min_marginals()
    for v, i in ((v, i) for v, t in enumerate(problem.time_us) for i in range(len(t))):
        best = min(
            sum(np.array(problem.evaluate(c)) * (1, 0.3))
            for c in product(*(range(len(t)) for t in problem.time_us))
            if c[v] == i
        )
        assert marginals[v][i] == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_dominance_keeps_the_optimum(seed):
    problem = random_problem(seed)
    small, inverse = drop_dominated(problem)
    assert brute_force(small)[0] == brute_force(problem)[0]
    choices = tuple(0 for _ in small.time_us)
    assert small.evaluate(choices) == problem.evaluate(inverse(choices))


@pytest.mark.parametrize("seed", range(20))
def test_sharing_equals_the_restricted_problem(seed):
    rng = np.random.default_rng(seed)
    sizes = [3, 3, 2, 3]
    problem = Problem(
        tuple(rng.integers(0, 50, n).astype(float) for n in sizes),
        tuple(np.zeros(n) for n in sizes),
        tuple(
            Edge(a, b, rng.integers(0, 50, (sizes[a], sizes[b])).astype(float))
            for a, b in [(0, 1), (1, 2), (2, 3), (0, 3), (1, 3)]
        ),
    )
    small, inverse = share(problem, [7, 7, 8, 7])
    agreeing = [c for c in product(*map(range, sizes)) if c[0] == c[1] == c[3]]
    assert solve(small).time_us == min(problem.evaluate(c)[0] for c in agreeing)
    choices = inverse(solve(small).choices)
    assert problem.evaluate(choices)[0] == solve(small).time_us


@pytest.mark.parametrize("backend", ["HiGHS", "CBC"])
@pytest.mark.parametrize("seed", range(5))
def test_backends_agree(seed, backend):
    problem = random_problem(seed, budget=120.0)
    expected = brute_force(problem)[0]
    if not np.isfinite(expected):
        with pytest.raises(ValueError, match="infeasible"):
            solve_ilp(problem, time_limit=30, backend=backend)
        return
    choices, bound = solve_ilp(problem, time_limit=30, backend=backend)
    assert problem.evaluate(choices)[0] == pytest.approx(expected)
    assert bound <= expected * (1 + 1e-6)


def test_bad_costs_are_refused():
    with pytest.raises(ValueError, match="numbers"):
        Problem((np.array([np.nan]),), (np.zeros(1),), ())
    with pytest.raises(ValueError, match="forbidden"):
        Problem((np.array([np.inf]),), (np.zeros(1),), ())
