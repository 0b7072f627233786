"""A seeded part of the promised families, sharded: the solver's plan and a random one.

`python -m benchmarks.coverage --required --mesh ...` runs all, more plans, and other meshes.
"""

import random

import pytest

from tests.zoo.family import Family
from tests.zoo.installed import INSTALLED
from tests.zoo.sharded import TOLERANCE, capture, plans_of, worst_difference

MESH = "2x2"
SAMPLE = random.Random(0).sample(INSTALLED, len(INSTALLED) // 4)
LOWERED = random.Random(1).sample(INSTALLED, len(INSTALLED) // 13)


@pytest.mark.sample(0.22)
@pytest.mark.parametrize("family", SAMPLE)
def test_plans_equal_a_single_device(family: Family) -> None:
    """Loss, results, buffers and every gradient shard on every rank, in float64."""
    captured = capture(family)
    sharded = plans_of(captured, MESH, random=1, time_limit=2.0)
    assert sharded.split, "the solver found nothing better than full replication"
    assert sharded.unruled_share < 0.01
    for number, plan in enumerate(sharded.plans):
        worst, size = worst_difference(captured, plan)
        assert size <= TOLERANCE, f"plan {number}: {worst}: {size:.1e}"


@pytest.mark.sample(0.25)
@pytest.mark.parametrize("family", LOWERED)
def test_lowered_plans_equal_a_single_device(family: Family) -> None:
    """The same of the graphs that the engine runs, on two ranks."""
    captured = capture(family)
    for number, plan in enumerate(plans_of(captured, "2", random=1, time_limit=2.0).plans):
        worst, size = worst_difference(captured, plan, lower=True)
        assert size <= TOLERANCE, f"plan {number}: {worst}: {size:.1e}"
