"""The Pareto front of time and memory: monotone, within its budgets, and down to the smallest."""

import itertools
import math
from dataclasses import replace

import pytest

import autopar.planner.pareto
from autopar import ShardingPlan, autoplan
from autopar.errors import InfeasibleError
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.pareto import POINTS, ParetoFront, pareto_front
from autopar.planner.planner import Planned
from autopar.planner.search import search
from autopar.report.html import render_html
from autopar.report.text import render
from tests.clusters import eager_to_shard
from tests.planning import BATCH, Net


@pytest.fixture(scope="module")
def net() -> Planned:
    return autoplan(Net(), (), BATCH, cluster=eager_to_shard("2x2"))


@pytest.fixture(scope="module")
def full(net) -> ParetoFront:
    return pareto_front(net.space)


def test_less_memory_never_costs_less_time(full):
    points = full.points
    assert len(points) == POINTS
    assert math.isinf(points[0].budget_bytes)
    for more, less in itertools.pairwise(points):
        assert more.budget_bytes > less.budget_bytes
        assert more.step_us <= less.step_us
        assert more.bound_us <= less.bound_us
    assert len({p.step_us for p in points}) > 2
    assert points[-1].step_us > points[0].step_us


def test_points_are_plans_that_cost_what_they_say_and_fit(net, full):
    for point, choices in zip(full.points, full.choices, strict=True):
        memory = estimate_memory(net.space, choices).total_bytes
        assert memory == pytest.approx(point.memory_bytes)
        assert memory <= point.budget_bytes * (1 + 1e-9)
        assert estimate_time(net.space, choices).step_us == pytest.approx(point.step_us)
        assert point.bound_us <= point.step_us
        assert "% of the parameters)" in point.words


def test_the_last_budget_is_the_smallest(net, full):
    smallest = full.points[-1].budget_bytes
    with pytest.raises(InfeasibleError):
        search(net.space, budget_bytes=0.98 * smallest, time_limit=60)


def test_the_memory_of_the_cluster_does_not_matter(full):
    lean = autoplan(Net(), (), BATCH, cluster=eager_to_shard("2x2"), memory=3e5)
    other = pareto_front(lean.space, points=3)
    assert other.points[0].step_us == pytest.approx(full.points[0].step_us, rel=1e-3)
    assert other.points[-1].budget_bytes == pytest.approx(full.points[-1].budget_bytes, rel=2e-3)


def test_monotone_whatever_the_search_returns(net, monkeypatch):
    """A search that finds nothing good in smaller budgets: the plans of others stand in."""
    lean = pareto_front(net.space, points=2).choices[-1]

    def lazy(space, *, budget_bytes, **options):
        result = search(space, budget_bytes=budget_bytes, **options)
        unlimited = math.isinf(budget_bytes)
        return result if unlimited else replace(result, choices=lean, bound_us=0.0)

    monkeypatch.setattr(autopar.planner.pareto, "search", lazy)
    steps = [p.step_us for p in pareto_front(net.space, points=6).points]
    assert steps == sorted(steps)


def test_a_pareto_front_needs_two_ends(net):
    with pytest.raises(ValueError, match="two points or more, not 1"):
        pareto_front(net.space, points=1)


def test_reports_show_the_pareto_front(net, full, tmp_path):
    plan = replace(net.plan, pareto_front=full.points)
    text, page = render(plan), render_html(plan)
    assert "Time and memory" in text
    assert "none" in text.partition("Time and memory")[2]
    assert "Time against memory" in page
    assert "Time against memory" not in render_html(net.plan)
    again = ShardingPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
