"""Losses that ranks do not wait for: right in every loop, and not waited for."""

import pytest

from tests.dist import async_result_tasks as tasks

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("mesh", "form", "loop", "options"),
    [
        ("4", "loss", "plain", {}),
        ("2x2", "loss", "read first", {}),
        ("4", "squares", "running", {}),
        ("2x2", "tuple", "accumulated", {}),
        ("4", "dict", "scaler", {}),
        ("2x2", "dataclass", "plain", {"memory": 2.0**30}),
    ],
)
def test_asynchronous_losses_are_those_of_a_single_device(pool, mesh, form, loop, options):
    for answer in pool.run(tasks.train, mesh, form, loop, options):
        assert answer["error"] < 1e-9
        assert answer["asynchronous"]


@pytest.mark.parametrize("mesh", ["4", "2x2"])
def test_a_rank_does_not_wait_for_the_losses_of_others(pool, mesh):
    assert all(pool.run(tasks.ahead_of_others, mesh))
