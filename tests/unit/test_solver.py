"""The solver against brute force: optimal, within the rows, and honest about its bound."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from autopar.errors import InfeasibleError
from autopar.solver import PairCost, Problem, Row, solve
from autopar.solver.contraction import Contraction, _product
from autopar.solver.cutting_planes import CutPool
from autopar.solver.ilp import solve_ilp
from autopar.solver.linear_program import LinearProgram
from autopar.solver.messages import minimize_core
from autopar.solver.problem import Branch
from autopar.solver.reductions import RestrictedDomains, TiedVariables
from autopar.solver.restricted_mip import combine, solve_restricted
from autopar.solver.subproblem import Subproblem


def evaluate(problem: Problem, choices: Sequence[int]) -> tuple[float, float]:
    """Time in microseconds with slacks, and the largest excess over a hard row."""
    slacks: dict[str, float] = {}
    excess = -math.inf
    for row in problem.rows:
        usage = problem.usage(row, choices)
        if row.slack:
            slacks[row.slack] = max(slacks.get(row.slack, 0.0), usage)
        else:
            excess = max(excess, usage)
    return problem.choices_us(choices) + sum(slacks.values()), excess


def budget_row(memory, edge_memory, budget):
    return Row("memory", budget, dict(enumerate(memory)), edge_memory)


def random_problem(seed: int, *, nodes: int = 5, budget: float = np.inf, soft: int = 0) -> Problem:
    """Memory as one hard row where a budget is given, and `soft` soft rows of one slack."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, nodes)
    time = tuple(rng.integers(0, 50, n).astype(float) for n in sizes)
    memory = tuple(rng.integers(0, 50, n).astype(float) for n in sizes)
    edges, edge_memory = [], {}
    for a, b in product(range(nodes), repeat=2):
        if a < b and rng.random() < 0.5:
            cost = rng.integers(0, 50, (sizes[a], sizes[b])).astype(float)
            if rng.random() < 0.5:
                edge_memory[len(edges)] = rng.integers(0, 20, cost.shape).astype(float)
            edges.append(PairCost(a, b, cost))
    rows = [
        Row(
            f"soft {i}",
            float(rng.integers(0, 60)),
            {v: rng.integers(-30, 50, n).astype(float) for v, n in enumerate(sizes)},
            slack="soft",
        )
        for i in range(soft)
    ]
    if np.isfinite(budget):
        rows.append(budget_row(memory, edge_memory, budget))
    return Problem(time, tuple(edges), tuple(rows))


def every(problem: Problem) -> list[tuple[float, float]]:
    """Time and excess of all assignments."""
    return [evaluate(problem, c) for c in product(*(range(len(t)) for t in problem.time_us))]


def brute_force(problem: Problem) -> float:
    """Least time within the rows."""
    return min((t for t, excess in every(problem) if excess <= 0), default=np.inf)


def budgets(seed: int, soft: int = 0) -> tuple[float, float]:
    """The least memory of any assignment, and of the fastest."""
    priced = random_problem(seed, budget=0.0, soft=soft)
    outcomes = every(priced)
    return min(m for _, m in outcomes), min(outcomes)[1]


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force_without_a_budget(seed):
    problem = random_problem(seed)
    solution = solve(problem)
    assert solution.time_us == pytest.approx(brute_force(problem))
    assert solution.gap == pytest.approx(0.0)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("soft", [0, 3])
@pytest.mark.parametrize("tightness", [0.2, 0.5, 0.8])
def test_equals_brute_force_within_rows(seed, soft, tightness):
    leanest, fastest = budgets(seed, soft)
    problem = random_problem(seed, budget=leanest + tightness * (fastest - leanest), soft=soft)
    solution = solve(problem, gap=1e-6)
    time_us, excess = evaluate(problem, solution.choices)
    assert excess <= 0
    assert solution.time_us == pytest.approx(time_us)
    assert solution.time_us == pytest.approx(brute_force(problem))
    assert solution.bound_us <= solution.time_us * (1 + 1e-9)
    assert solution.gap <= 1e-6


@pytest.mark.parametrize("layer", ["elimination", "messages", "restricted MIP"])
@pytest.mark.parametrize("seed", range(10))
def test_no_layer_is_needed_for_the_optimum(seed, layer):
    leanest, fastest = budgets(seed, 3)
    problem = random_problem(seed, budget=leanest + 0.4 * (fastest - leanest), soft=3)
    solution = solve(problem, gap=1e-6, disable=frozenset({layer}))
    assert solution.time_us == pytest.approx(brute_force(problem))
    assert solution.gap <= 1e-6


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("gap", [0.02, 0.2])
@pytest.mark.parametrize("program", [0, 4000])
def test_the_bound_is_one_however_large_a_gap_is_good_enough(seed, gap, program, monkeypatch):
    """By branching alone, and with integer programs."""
    module = sys.modules[solve.__module__]  # the package has the function under its name
    monkeypatch.setattr(module, "SMALL_PROGRAM", program)
    monkeypatch.setattr(sys.modules[solve_restricted.__module__], "MAX_PROGRAM", program)
    leanest, fastest = budgets(seed, 3)
    budget = leanest + 0.4 * (fastest - leanest)
    problem = random_problem(seed, nodes=6, budget=budget, soft=3)
    if not np.isfinite(brute_force(problem)):
        with pytest.raises(InfeasibleError):
            solve(problem, gap=gap)
        return
    solution = solve(problem, gap=gap)
    best = brute_force(problem)
    assert solution.bound_us <= best + 1e-6
    assert best - 1e-6 <= solution.time_us
    assert solution.gap <= gap + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_rows_made_when_needed_are_as_good_as_rows_listed(seed):
    leanest, fastest = budgets(seed, 3)
    listed = random_problem(seed, budget=(leanest + fastest) / 2, soft=3)

    def separate(choices):
        kinds = {}
        for row in listed.rows:
            used = listed.usage(row, choices)
            if used > max(0.0, kinds.get(row.slack, (0.0,))[0]):
                kinds[row.slack] = (used, row)
        return [row for _, row in kinds.values()]

    solution = solve(replace(listed, rows=()), separate=separate, gap=1e-6)
    assert solution.time_us == pytest.approx(brute_force(listed))


@pytest.mark.parametrize("seed", range(10))
def test_out_of_time_the_best_assignment_has_its_gap(seed):
    """Given no time at all, the first that fits, and a bound that is one."""
    leanest, fastest = budgets(seed, 2)
    problem = random_problem(seed, nodes=6, budget=(leanest + fastest) / 2, soft=2)
    best = brute_force(problem)
    if not np.isfinite(best):
        with pytest.raises(InfeasibleError):
            solve(problem)
        return
    solution = solve(problem, gap=1e-6, time_limit=0.0)
    time_us, excess = evaluate(problem, solution.choices)
    assert excess <= 0
    assert solution.time_us == pytest.approx(time_us)
    assert solution.bound_us <= best + 1e-6
    assert solution.gap == pytest.approx(1 - solution.bound_us / time_us)


@pytest.mark.parametrize("seed", range(30))
def test_branching_as_on_another_problem_gives_bounds(seed, monkeypatch):
    """However different the other one is."""
    module = sys.modules[solve.__module__]
    monkeypatch.setattr(module, "SMALL_PROGRAM", 0)
    monkeypatch.setattr(sys.modules[solve_restricted.__module__], "MAX_PROGRAM", 0)
    leanest, fastest = budgets(seed, 3)
    problem = random_problem(seed, budget=leanest + 0.4 * (fastest - leanest), soft=3)
    best = brute_force(problem)
    if not np.isfinite(best):
        with pytest.raises(InfeasibleError):
            solve(problem)
        return
    rng = np.random.default_rng(seed)
    other = replace(
        problem, time_us=tuple(t + rng.integers(0, 30, t.shape) for t in problem.time_us)
    )
    tree = solve(other, gap=1e-6).tree
    if tree is None:  # prices were enough
        tree = Branch({}, {}, (Branch({0: np.array([0])}, {}), Branch({0: np.arange(1, 9)}, {})))
    solution = solve(problem, gap=1e-6, tree=tree)
    assert solution.time_us == pytest.approx(best)
    assert solution.bound_us <= best + 1e-6
    assert solution.gap <= 1e-6
    few = solve(problem, gap=1e-6, tree=tree, subproblems=2)
    assert few.bound_us <= best + 1e-6
    assert few.time_us >= best - 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_what_was_met_is_combine(seed):
    """The best of what consists of choices met, if it is better than those by the gap."""
    leanest, fastest = budgets(seed, 2)
    problem = random_problem(seed, budget=(leanest + fastest) / 2, soft=2)
    every_one = product(*(range(len(t)) for t in problem.time_us))
    fitting = [c for c in every_one if evaluate(problem, c)[1] <= 0]
    assert fitting

    def mix(starts, **how):
        how = {"gap": 1e-6, "enough_us": -np.inf, "rounds": 6, **how}
        choices = combine(
            problem, starts, separate=lambda choices: (), prices={}, expired=lambda: False,
            say=lambda line: None, **how,
        )  # fmt: skip
        return evaluate(problem, choices)[0]

    fitting.sort(key=lambda c: evaluate(problem, c)[0])
    assert mix(fitting) == pytest.approx(brute_force(problem))
    slowest = evaluate(problem, fitting[-1])[0]
    assert mix(fitting[-1:]) == pytest.approx(slowest)
    some = fitting[-3:]
    combinations = product(*(sorted(set(column)) for column in zip(*some, strict=True)))
    best = min(t for t, excess in (evaluate(problem, c) for c in combinations) if excess <= 0)
    fast = min(problem.choices_us(c) for c in some)
    assert best - 1e-6 <= mix(some) <= evaluate(problem, some[0])[0]
    if fast == evaluate(problem, some[0])[0]:
        assert mix(some, gap=0.5) >= best


@pytest.mark.parametrize("seed", range(20))
def test_any_messages_give_a_bound(seed):
    """Those of other costs too."""
    rng = np.random.default_rng(seed)
    unary = [rng.random(4) for _ in range(5)]
    ends = [(a, b) for b in range(5) for a in range(b)]

    def costs():
        return [(a, b, rng.random((4, 4))) for a, b in ends]

    before, pairs = minimize_core(unary, costs()), costs()
    result = minimize_core(unary, pairs, before.messages)
    total = {
        c: sum(u[i] for u, i in zip(unary, c, strict=True))
        + sum(t[c[a], c[b]] for a, b, t in pairs)
        for c in product(range(4), repeat=5)
    }
    assert result.bound <= min(total.values()) + 1e-9
    assert result.cost == pytest.approx(min(total.values()))
    for v, marginals in enumerate(result.marginals):
        for i, marginal in enumerate(marginals):
            assert marginal <= min(cost for c, cost in total.items() if c[v] == i) + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_the_fallback_gives_a_start(seed, monkeypatch):
    """The search starts from a slow assignment that fits, if it finds none itself in time."""
    module = sys.modules[solve.__module__]
    leanest, fastest = budgets(seed, 2)
    problem = random_problem(seed, budget=(leanest + fastest) / 2, soft=2)
    every_one = product(*(range(len(t)) for t in problem.time_us))
    fitting = [c for c in every_one if evaluate(problem, c)[1] <= 0]
    slowest = max(fitting, key=lambda c: evaluate(problem, c)[0])
    calls = []

    def out_of_time(*arguments, **options):
        raise InfeasibleError("out of time", budget_bytes=1, smallest_bytes=2, proven=False)

    monkeypatch.setattr(module, "solve", out_of_time)  # the one that minimizes the excess
    result = solve(problem, fallback=lambda: calls.append(slowest) or calls)
    assert result.time_us == pytest.approx(brute_force(problem))
    if calls:  # the fastest of all does not fit
        with pytest.raises(InfeasibleError, match="out of time"):
            solve(problem)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("unit", [1.0, 1e9])
def test_too_small_a_budget_names_the_smallest(seed, unit):
    """In bytes by the thousand million too, where solvers round."""
    leanest, _ = budgets(seed, 2)
    problem = random_problem(seed, budget=leanest - 1, soft=2)
    large = tuple(
        replace(
            row,
            limit=unit * row.limit,
            nodes={v: unit * t for v, t in row.nodes.items()},
            edges={e: unit * t for e, t in row.edges.items()},
        )
        if not row.slack
        else row
        for row in problem.rows
    )
    with pytest.raises(InfeasibleError, match="within the limits") as error:
        solve(replace(problem, rows=large))
    assert error.value.smallest_bytes == pytest.approx(unit * leanest)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("nodes", [5, 7])
def test_contraction_equals_brute_force(seed, nodes):
    problem = random_problem(seed, nodes=nodes)
    result = Contraction(problem.time_us, problem.pairs())
    assert result.cost == pytest.approx(result.bound, rel=1e-9)
    assert result.cost == pytest.approx(brute_force(problem))
    assert problem.choices_us(result.choices) == pytest.approx(result.cost)
    times = {c: problem.choices_us(c) for c in product(*(range(len(t)) for t in problem.time_us))}
    for v, marginals in enumerate(result.min_marginals()):
        for i, marginal in enumerate(marginals):
            best = min(time for c, time in times.items() if c[v] == i)
            assert marginal <= best + 1e-9
            if not result.messages:
                assert marginal == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [20, 60])
def test_large_min_plus_products_are_rounded_down(seed, size):
    """By less than a millionth; small ones are exact."""
    rng = np.random.default_rng(seed)
    first, second = (1e6 + 1e5 * rng.random((size, size)) ** 8 for _ in range(2))
    first[rng.random(first.shape) < 0.3] = np.inf
    first[:, 0] = np.inf
    exact = (first[:, :, None] + second[:, None, :]).min(axis=0)
    product = _product(first, second)
    assert (product <= exact).all()
    np.testing.assert_allclose(product, exact, rtol=1e-6 if size**3 > 100_000 else 0)


@pytest.mark.parametrize("seed", range(10))
def test_a_gap_that_is_too_large_to_branch_on_is_left_as_it_is(seed):
    leanest, fastest = budgets(seed, 3)
    problem = random_problem(seed, budget=leanest + 0.4 * (fastest - leanest), soft=3)
    best = brute_force(problem)
    solution = solve(problem, gap=1e-6, branching_gap=0.0, mip_rounds=0)
    assert solution.tree is None
    assert solution.bound_us <= best + 1e-6
    assert solution.time_us >= best - 1e-6
    assert solve(problem, gap=1e-6, branching_gap=1.0).gap <= 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_wide_cores_are_bounded_and_mostly_solved(seed):
    """Every node beside every other: nothing can be eliminated."""
    rng = np.random.default_rng(seed)
    unary = [rng.random(5) for _ in range(6)]
    pairs = [(a, b, rng.random((5, 5))) for a in range(6) for b in range(a)]
    for _a, _b, table in pairs[::3]:
        table[rng.random((5, 5)) < 0.2] = np.inf
    result = Contraction(unary, pairs)
    best = min(
        sum(u[i] for u, i in zip(unary, c, strict=True)) + sum(t[c[a], c[b]] for a, b, t in pairs)
        for c in product(range(5), repeat=6)
    )
    assert result.bound <= best + 1e-9
    assert result.cost == pytest.approx(best)
    assert result.cost == pytest.approx(result.bound, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_restricted_domains_cost_the_same(seed):
    leanest, fastest = budgets(seed, 2)
    problem = random_problem(seed, budget=(leanest + fastest) / 2, soft=2)
    rng = np.random.default_rng(seed)
    sizes = [len(t) for t in problem.time_us]
    restricted = RestrictedDomains(
        problem, [np.sort(rng.permutation(n)[: 1 + n // 2]) for n in sizes]
    )
    for c in product(*(range(len(t)) for t in restricted.problem.time_us)):
        assert evaluate(restricted.problem, c) == evaluate(problem, restricted.expand(c))


@pytest.mark.parametrize("seed", range(20))
def test_fixing_keeps_better_assignments(seed):
    """Every assignment that is faster than the best known is still there."""
    leanest, fastest = budgets(seed, 2)
    problem = random_problem(seed, budget=(leanest + fastest) / 2, soft=2)
    pool = CutPool(problem, None)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        pool.visit(tuple(int(rng.integers(len(t))) for t in problem.time_us))
    pool.visit(
        min(
            product(*(range(len(t)) for t in problem.time_us)),
            key=lambda c: evaluate(problem, c)[1],
        )
    )
    assert pool.choices is not None
    root = Subproblem(pool, [np.arange(len(t)) for t in problem.time_us])
    root.maximize(gap=1e-6, steps=20, done=lambda: False)
    fixed = root.fixed()  # finds one more, perhaps
    better = [
        c
        for c in product(*(range(len(t)) for t in problem.time_us))
        if evaluate(problem, c)[1] <= 0 and evaluate(problem, c)[0] < pool.time_us - 1e-6
    ]
    assert all(fixed.contains(c) for c in better)
    assert root.bound <= brute_force(problem) + 1e-6
    for half in fixed.branches():
        assert half.bound <= brute_force(problem) + 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_tied_variables_equal_the_restricted_problem(seed):
    rng = np.random.default_rng(seed)
    sizes = [3, 3, 2, 3]

    def tables(edges):
        return [rng.integers(0, 50, (sizes[a], sizes[b])).astype(float) for a, b in edges]

    ends = [(0, 1), (1, 2), (2, 3), (3, 0), (1, 3)]
    row = Row(
        "memory", 200.0, {v: rng.integers(0, 50, n).astype(float) for v, n in enumerate(sizes)},
        dict(enumerate(tables(ends))),
    )  # fmt: skip
    problem = Problem(
        tuple(rng.integers(0, 50, n).astype(float) for n in sizes),
        tuple(PairCost(a, b, t) for (a, b), t in zip(ends, tables(ends), strict=True)),
        (row,),
    )
    tied = TiedVariables(problem, [7, 7, 8, 7])
    agreeing = [c for c in product(*map(range, sizes)) if c[0] == c[1] == c[3]]
    for c in agreeing:
        assert tied.expand(tied.contract(c)) == c
        assert evaluate(tied.problem, tied.contract(c)) == pytest.approx(evaluate(problem, c))
    within = [t for t, excess in (evaluate(problem, c) for c in agreeing) if excess <= 0]
    if within:
        assert solve(tied.problem).time_us == pytest.approx(min(within))


@pytest.mark.parametrize("backend", ["HiGHS", "CBC"])
@pytest.mark.parametrize("seed", range(8))
def test_backends_agree(seed, backend):
    problem = random_problem(seed, budget=110.0, soft=2)
    expected = brute_force(problem)
    if not np.isfinite(expected):
        with pytest.raises(ValueError, match="infeasible"):
            solve_ilp(problem, time_limit=30, backend=backend)
        return
    choices, bound = solve_ilp(problem, time_limit=30, backend=backend)
    assert evaluate(problem, choices)[0] == pytest.approx(expected)
    assert bound <= expected * (1 + 1e-6)


def test_bad_costs_are_refused():
    with pytest.raises(ValueError, match="numbers"):
        Problem((np.array([np.nan]),))
    with pytest.raises(ValueError, match="forbidden"):
        Problem((np.array([np.inf]),))
    with pytest.raises(ValueError, match="do not match"):
        Problem((np.zeros(2),), rows=(Row("memory", 1.0, {0: np.zeros(3)}),))


@pytest.mark.parametrize("backend", ["HiGHS", "CBC"])
def test_terms_of_a_variable_add_up(backend):
    """An operator with several results is in a row once per result."""
    program = LinearProgram()
    x, y = program.variable(cost=-1.0, upper=1.0), program.variable(cost=-2.0, upper=1.0)
    program.row([(x, 0.5), (y, 1.0), (x, 0.5)], upper=1.5)
    program.row([(x, 1.0), (x, -1.0), (y, 1.0)], upper=0.75)
    solution = program.minimize(backend=backend)
    assert solution.status == "optimal"
    assert solution.values == pytest.approx([0.75, 0.75])
