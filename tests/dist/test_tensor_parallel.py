"""A preset of tensor parallelism on processes: float64 equality with a single device."""

import pytest

from tests.sequences import error

pytestmark = pytest.mark.dist


def test_a_preset_equals_a_single_device(pool):
    """Table, attention, MLP and head in 2D, for three steps of AdamW."""
    for worst in pool.run(error, "two blocks", "2x2", "tp2d"):
        assert worst < 1e-10
