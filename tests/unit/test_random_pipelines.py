"""Random cuts, schedules, microbatches and layouts on simulated ranks: those of one device.

`python -m benchmarks.random_pipelines` draws more of them, with larger models and meshes.
"""

import pytest

from tests.random_pipelines import Draw, largest_error


def _name(draw: Draw) -> str:
    return f"{draw.name} {draw.mesh} {draw.schedule} {draw.microbatches}"


@pytest.mark.parametrize("draw", [Draw.of(seed, small=True) for seed in range(12)], ids=_name)
def test_random_pipelines_equal_a_single_device(draw):
    assert largest_error(draw) < 1e-9
