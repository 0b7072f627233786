"""One program serves batches of sizes that vary; `batch_dim` says which dim holds samples."""

import pytest

from tests.dist import size_tasks as tasks

pytestmark = pytest.mark.dist

ALIKE = "large logits", "batches too", "decoder"  # as long as the others together


@pytest.mark.sample(0.4)
@pytest.mark.parametrize(
    ("name", "mesh", "batch"),
    [*((n, "2x2", "global") for n in tasks.MODELS if n not in ALIKE), ("decoder", "2", "local")],
)
def test_sizes_vary(pool, pair, name, mesh, batch):
    for answer in (pair if mesh == "2" else pool).run(tasks.varying_sizes, mesh, batch, name):
        assert answer["results"] < 1e-12
        assert answer["gap"] < 1e-12
        assert answer["programs"] <= answer["bound"]


def test_samples_are_in_other_dims(pool):
    for answer in pool.run(tasks.batch_dims, "4"):
        assert answer["gap"] < 1e-12
        assert answer["results"] < 1e-12
        assert "names ['z']" in answer["messages"]["{'z': 0}"]
        assert "shape [16]" in answer["messages"]["{'y': 2}"]
