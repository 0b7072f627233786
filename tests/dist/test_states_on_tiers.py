"""States on the host and on a drive equal those in memory, on two ranks."""

import pytest

from tests.dist import tier_tasks as tasks

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("place, overlaps", [("host", True), ("nvme", False)])
def test_states_off_the_device_are_the_same(pair, tmp_path, place, overlaps):
    directory = str(tmp_path) if place == "nvme" else None
    for found in pair.run(tasks.trained, "2", overlaps, directory):
        assert max(found["errors"]) < 1e-12, found
        assert found["states_on"] == place
        assert found["measured"] == pytest.approx(found["peak"], rel=1e-3, abs=64)
        assert found["peak"] < 4 * found["parameters"], found  # with gradients and moments
        assert bool(found["ahead"]) == overlaps
        assert found["stored"] == (4 if directory else 0)
        assert bool(found["beside"]) == overlaps, found
