"""Some families of the zoo on real processes, others every day, through `auto_engine`."""

import datetime

import pytest

pytest.importorskip("transformers")
pytest.importorskip("timm")

from tests.dist.training import family_error
from tests.zoo import hf, timm_rows

pytestmark = pytest.mark.dist

FAMILIES = [f.name for f in (*hf.FAMILIES, *timm_rows.FAMILIES)]
A_DAY = 2
# a prime step, so that libraries and kinds mix
TODAY = [
    FAMILIES[(datetime.date.today().toordinal() * A_DAY + i) * 17 % len(FAMILIES)]
    for i in range(A_DAY)
]


@pytest.mark.parametrize(("name", "mesh"), list(zip(TODAY, ["4", "2x2"], strict=True)))
def test_families_train_alike(pool, name, mesh):
    """Loss and every gradient shard; 1e-6 where the model computes in float32 whatever its type."""
    for error, tolerance in pool.run(family_error, name, mesh):
        assert error <= tolerance
