"""Complex values between four Gloo processes: every collective, conversions, and whole steps."""

import pytest
import torch

from tests.dist import complex_tasks as tasks

pytestmark = pytest.mark.dist

DTYPES = [torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
def test_collectives_treat_complex_values_as_their_parts(pool, dtype):
    for found in pool.run(tasks.collectives, dtype):
        assert set(found) == set(tasks.COLLECTIVES)
        assert all(found.values()), found


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_and_their_gradients(pool, dtype):
    for found in pool.run(tasks.conversions, dtype):
        assert all(found.values()), found


@pytest.mark.parametrize(
    "layouts",
    [
        {},
        {"view_as_complex": "RRS0", "view_as_complex_1": "RS0R"},
        {"_conj": "S0RR", "view_as_complex_1": "RRS0"},
    ],
)
def test_rotary_positions_by_complex_numbers(pool, layouts):
    for worst, found in pool.run(tasks.rotary, "4", {"constraints": layouts}):
        assert worst < 1e-9
        assert found


def test_complex_values_between_stages(pool):
    for worst, _ in pool.run(tasks.rotary, "pipe=2,data=2", {"microbatches": 2}):
        assert worst < 1e-9
