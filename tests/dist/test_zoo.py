"""A family of the zoo on real processes, through `auto_engine`."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("timm")

from tests.dist.training import family_error

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(("name", "mesh"), [("mixtral", "2x2")])
def test_families_train_as_on_one_device(pool, name, mesh):
    """Loss and every gradient shard; 1e-6 where the model computes in float32 whatever its type."""
    for error, tolerance in pool.run(family_error, name, mesh):
        assert error <= tolerance
