"""The time-memory front: monotone, within its budgets, and down to the smallest."""

import itertools
import math
from types import SimpleNamespace

import pytest

import autopar.planner.pareto
from autopar import ShardingPlan, autoplan
from autopar.errors import InfeasibleError
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.pareto import POINTS, Front, front, with_budget
from autopar.planner.planner import Planned
from autopar.planner.search import search
from autopar.report.text import render
from tests.clusters import eager_to_shard
from tests.unit.test_constraints import BATCH, Net


@pytest.fixture(scope="module")
def net() -> Planned:
    return autoplan(Net(), (), BATCH, cluster=eager_to_shard("2x2"))


@pytest.fixture(scope="module")
def whole(net) -> Front:
    return front(net.space)


def test_less_memory_never_costs_less_time(whole):
    points = whole.points
    assert len(points) == POINTS
    assert math.isinf(points[0].budget_bytes)
    for more, less in itertools.pairwise(points):
        assert more.budget_bytes > less.budget_bytes
        assert more.step_us <= less.step_us
        assert more.bound_us <= less.bound_us
    assert len({p.step_us for p in points}) > 2
    assert points[-1].step_us > points[0].step_us


def test_points_are_plans_that_cost_what_they_say_and_fit(net, whole):
    for point, choices in zip(whole.points, whole.choices, strict=True):
        memory = estimate_memory(net.space, choices).total_bytes
        assert memory == pytest.approx(point.memory_bytes)
        assert memory <= point.budget_bytes * (1 + 1e-9)
        assert estimate_time(net.space, choices).step_us == pytest.approx(point.step_us)
        assert point.bound_us <= point.step_us
        assert "% of the parameters)" in point.words


def test_the_last_budget_is_the_smallest(net, whole):
    smallest = whole.points[-1].budget_bytes
    with pytest.raises(InfeasibleError):
        search(with_budget(net.space, 0.98 * smallest), time_limit=60)


def test_the_budget_of_the_space_plays_no_part(net, whole):
    other = front(with_budget(net.space, 1.0), points=3)
    assert other.points[0].step_us == pytest.approx(whole.points[0].step_us, rel=1e-3)
    assert other.points[-1].budget_bytes == pytest.approx(whole.points[-1].budget_bytes, rel=2e-3)
    assert net.space.cluster.memory_bytes is None


def test_monotone_whatever_the_search_returns(net, monkeypatch):
    """A search that is worst where there is most room: plans of smaller budgets stand in."""
    lean = front(net.space, points=2).choices[-1]

    def lazy(space, **options):
        found = search(space, **options)
        if space.cluster.budget_bytes > 1e15:
            return found
        return SimpleNamespace(choices=lean, bound_us=0.0) if lean else found

    monkeypatch.setattr(autopar.planner.pareto, "search", lazy)
    steps = [p.step_us for p in front(net.space, points=6).points]
    assert steps == sorted(steps)


def test_a_front_needs_two_ends(net):
    with pytest.raises(ValueError, match="two points or more, not 1"):
        front(net.space, points=1)


def test_reports_show_the_front(net, whole, tmp_path):
    from dataclasses import replace

    from autopar.report.html import render_html

    plan = replace(net.plan, pareto_front=whole.points)
    text, page = render(plan), render_html(plan)
    assert "Time and memory" in text
    assert "none" in text.partition("Time and memory")[2]
    assert "Time against memory" in page
    assert "Time against memory" not in render_html(net.plan)
    again = ShardingPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
