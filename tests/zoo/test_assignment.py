"""The stand-in for SciPy's solver: as cheap as the best of all assignments."""

import itertools

import numpy as np
import pytest

from tests.zoo.assignment import linear_sum_assignment


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (2, 5), (4, 4), (5, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_no_assignment_is_cheaper(shape: tuple[int, int], ties: bool) -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        cost = draw.integers(0, 3, shape) if ties else draw.normal(size=shape)
        rows, columns = linear_sum_assignment(cost)
        assert len(rows) == len(set(rows)) == len(set(columns)) == min(shape)
        assert sorted(rows) == list(rows)
        flat = cost if shape[0] <= shape[1] else cost.T
        best = min(
            sum(flat[i, j] for i, j in enumerate(chosen))
            for chosen in itertools.permutations(range(flat.shape[1]), flat.shape[0])
        )
        assert cost[rows, columns].sum() == pytest.approx(best)
