"""Every plan that the search space allows is correct: float64 equality with a single device."""

import functools

import numpy as np
import pytest

from autopar import autoplan
from autopar.planner.planner import Planned, make_plan
from tests.clusters import eager_to_shard
from tests.dist.training import errors_of_plans
from tests.models import CASES
from tests.planning import random_choices

pytestmark = pytest.mark.dist

MESHES = ["4", "2x2", "1x4"]
# how many random plans; most on the mesh that has plans of all kinds
PLANS = {"2x2": 4, "4": 2, "1x4": 2}
TOLERANCE = 1e-9


@functools.cache
def planned(name: str, mesh: str) -> Planned:
    case = CASES[name]
    return autoplan(case.build(), (), case.batch(0), cluster=eager_to_shard(mesh))


@pytest.mark.sample(0.2)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", list(CASES))
def test_solver_plan_equals_single_device(pool, name, mesh):
    plan = planned(name, mesh).plan.to_json()
    for errors in pool.run(errors_of_plans, name, mesh, [(plan, "sgd"), (plan, "adamw")], True):
        assert max(errors) < TOLERANCE


# those of larger models run on simulated ranks (tests/unit/test_simulated_mesh.py)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_random_plans_equal_single_device(pool, name, mesh, thorough):
    space = planned(name, mesh).space
    seeds = range(PLANS[mesh] * (3 if thorough else 1))
    plans = [
        (
            make_plan(space, random_choices(space, np.random.default_rng(seed)), name).to_json(),
            ["sgd", "adamw"][seed % 2],
        )
        for seed in seeds
    ]
    errors = np.array(pool.run(errors_of_plans, name, mesh, plans))
    largest = zip(seeds, errors.max(axis=0), strict=True)
    wrong = {seed: error for seed, error in largest if not error < TOLERANCE}
    assert not wrong, f"random plans (seed: error) {wrong}"
