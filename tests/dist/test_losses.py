"""Losses as training loops use them: those of a single device."""

import pytest

from tests.dist import loss_tasks as tasks

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
def test_losses_are_those_of_a_single_device(pool, mesh, form, loop, options):
    assert max(pool.run(tasks.train, mesh, form, loop, options)) < 1e-9
