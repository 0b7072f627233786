"""Precision policies on several ranks: layouts of all kinds, and layouts that change no sum."""

import numpy as np
import pytest
from safetensors.torch import save_file

from autopar import Precision, autoplan
from autopar.planner.planner import make_plan
from tests.clusters import eager_to_shard
from tests.dist import precision_tasks as tasks
from tests.dist.training import errors_of_plans
from tests.models import CASES
from tests.planning import random_choices

pytestmark = pytest.mark.dist

# float64 models that compute in float32: errors of layouts are far larger than its rounding
POLICIES = [
    Precision("float32", "float64", "float64", cast_inputs=True),
    Precision("float32", "float64", reductions=None),
]


@pytest.mark.parametrize(("name", "policy"), [("mlp", POLICIES[0]), ("mlp", POLICIES[1])])
def test_random_plans_equal_a_single_device(pool, name, policy):
    case = CASES[name]
    planned = autoplan(
        case.build(), (), case.batch(0), cluster=eager_to_shard("2x2"), precision=policy
    )
    plans = [(planned.plan.to_json(), "sgd")]
    for seed in range(2):
        choices = random_choices(planned.space, np.random.default_rng(seed))
        plans.append((make_plan(planned.space, choices, name).to_json(), "sgd"))
    errors = np.array(pool.run(errors_of_plans, name, "2x2", plans, True))
    assert errors.max() < 1e-5
    assert errors.max() > 1e-12, "the policy was not put in force"


@pytest.mark.parametrize("how", ["policy", "autocast"])
def test_layouts_that_change_no_sum_change_no_bit(pool, how):
    """Weights are stored split and gathered; every rank computes on the whole batch."""
    assert all(pool.run(tasks.bits_of_split_storage, how))


@pytest.mark.parametrize("how", ["policy", "autocast"])
def test_sums_over_ranks_keep_the_digits_of_float32(pool, how):
    """A large gradient on one rank and small ones on the others: in bfloat16 these are lost."""
    for gradient in pool.run(tasks.uneven_gradients, how):
        assert gradient == pytest.approx(256 + 3 * 0.5)


def test_so_do_those_of_microbatches_that_gather_weights(pool):
    """What each adds to the sum has the digits of compute."""
    for gradient in pool.run(tasks.uneven_gradients, "policy", 2):
        assert gradient == 2 * 258  # 257.5 in bfloat16; summed in it, 256


def test_a_scaler_skips_a_step_on_all_ranks(pool):
    """One rank's gradient overflows; all ranks keep their weights, and halve the scale."""
    for changed, scale in pool.run(tasks.overflow_on_one_rank):
        assert not changed
        assert scale == 2.0**15


def test_weights_are_read_in_the_dtype_at_rest(pool, tmp_path):
    state = tasks._model().bfloat16().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert pool.run(tasks.read_in_another_dtype, str(tmp_path)) == [("torch.float32", 0.0)] * 4
