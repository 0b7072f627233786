"""Collectives between CPU processes against Gloo's."""

import pytest

from tests.dist.engine_tasks import largest_difference_of_collectives

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("mesh", [(4,), (2, 2)])
def test_direct_collectives_are_those_of_gloo(pool, mesh):
    assert max(pool.run(largest_difference_of_collectives, mesh)) < 1e-12
