"""The engine as users meet it: ways of training, dropout, bad input, a rank that dies."""

import numpy as np
import pytest

from autopar import autoplan
from tests.clusters import eager_to_shard
from tests.dist import engine_tasks as tasks
from tests.dist import memory_tasks
from tests.dist.pool import assert_rank_1_stops_rank_0
from tests.models import CASES

pytestmark = pytest.mark.dist


@pytest.mark.sample(0.7)
@pytest.mark.parametrize(
    ("mesh", "kind", "how"),
    [
        ("2x2", "plain", "global"),
        ("2x2", "outside", "global"),
        ("4", "accumulated", "global"),
        ("2x2", "evaluated", "global"),
        ("2x2", "resumed", "global"),
        ("4", "clipped", "global"),
        ("2x2", "reshaped", "global"),
        ("2x2", "constrained", "global"),
        ("2x2", "plain", "local"),
        ("4", "outside", "local"),
    ],
)
def test_training_equals_a_single_device(pool, mesh, kind, how):
    assert max(pool.run(tasks.train, mesh, kind, how)) < 1e-9


def test_one_rank_alone_may_copy_an_engine(pool):
    assert pool.run(tasks.copied_on_rank_zero) == [0.0] * 4


def test_training_goes_on_while_a_state_is_saved(pool, tmp_path):
    assert pool.run(tasks.resumed_from_asynchronous_save, str(tmp_path / "saved")) == [0.0] * 4


@pytest.mark.parametrize("mesh", ["4", "2x2"])
def test_dropout_is_equal_on_replicas_and_differs_between_shards(pool, mesh):
    ranks = pool.run(tasks.dropout, mesh)
    first, second = ranks[0]["first"], ranks[0]["second"]
    assert any("d" in name for name in ranks[0]["choices"]["native_dropout"].split())
    for other in ranks[1:]:
        assert np.array_equal(first, other["first"])
        assert np.array_equal(second, other["second"])
    assert set(np.unique(first)) == {0.0, 2.0}
    assert abs(first.mean() - 1) < 0.1
    assert not np.array_equal(first, second)
    halves = [*np.split(first, 2, axis=0), *np.split(first, 2, axis=1)]
    assert not np.array_equal(halves[0], halves[1])
    assert not np.array_equal(halves[2], halves[3])
    # the gradient saw the same mask as the result
    assert np.allclose(ranks[0]["grad"], second.sum(axis=0))
    assert np.array_equal(ranks[0]["eval"], np.ones((64, 64)))


def test_dropout_in_a_language_model(pair):
    losses = pair.run(tasks.language_model_dropout, "2")
    assert all(np.allclose(losses[0], other, rtol=1e-12) for other in losses[1:])
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("optimizer", ["EngineError", "not the model's", "model.parameters()"]),
        ("mesh", ["MeshError", "2x4", "8 processes", "has 4", "torchrun"]),
        ("budget", ["InfeasibleError", "at least", "4 KiB", "more devices"]),
    ],
)
def test_bad_input_is_explained_and_changes_nothing(pool, kind, words):
    for answer in pool.run(tasks.refused, kind):
        assert all(word in answer["message"] for word in words), answer["message"]
        assert answer["untouched"]


@pytest.mark.parametrize(
    ("kind", "case", "mesh", "words"),
    [
        ("plan", "vit", "2x2", ["PlanError", "another graph", "plan again"]),
        ("plan mesh", "mlp", "4", ["PlanError", "mesh 4", "2x2"]),
    ],
)
def test_a_plan_for_something_else_is_refused(pool, kind, case, mesh, words):
    example = CASES[case]
    plan = autoplan(example.build(), (), example.batch(0), cluster=eager_to_shard(mesh)).plan
    for answer in pool.run(tasks.refused, kind, plan.to_json()):
        assert all(word in answer["message"] for word in words), answer["message"]
        assert answer["untouched"]


def test_local_batches_must_agree(pool):
    for message in pool.run(tasks.local_sizes):
        assert "equal shapes on all ranks" in message
        assert "drop_last" in message


@pytest.mark.parametrize("budget", [None, "1100KiB"])
def test_predicted_memory_is_near_the_measured(pool, budget):
    for answer in pool.run(memory_tasks.memory, "2x2", budget):
        assert answer["parameters"] == pytest.approx(1, rel=0.05)
        assert answer["optimizer"] == pytest.approx(1, rel=0.05)
        # gradients and activations are summed though the ones replace the others
        assert 0.9 < answer["predicted"] / answer["measured"] < 1.35


@pytest.mark.sample(0.7)
@pytest.mark.parametrize(
    ("name", "dropout", "share", "overlaps"),
    [("gpt2", 0.1, 0.6, True), ("gpt2", 0.5, 0.6, False), ("resnet", 0.0, 0.9, False)],
)
def test_what_is_computed_again_changes_nothing(pool, name, dropout, share, overlaps):
    ranks = pool.run(memory_tasks.recomputed, name, dropout, share, "2x2", overlaps)
    assert all(rank["error"] < 1e-9 for rank in ranks)
    assert all(rank["peak"] < rank["ample"] for rank in ranks)
    assert all(rank["again"] == ranks[0]["again"] for rank in ranks)
    assert ranks[0]["again"]
    for ahead in ranks[0]["ahead"]:  # in forward and in backward
        assert any("gather" in name for name in ahead) == overlaps
    if overlaps:  # buffers count, under way and inside of what runs whole
        peaks = [rank["peak"] for rank in ranks]
        assert [rank["measured"] for rank in ranks] == pytest.approx(peaks, abs=64)


def test_microbatches_within_a_budget(pool):
    """The smallest memory that a refusal names is enough, and so is more."""
    for rank in pool.run(memory_tasks.microbatches_within, "2x2"):
        assert rank["mb"] == 4 and rank["named"] <= 2
        assert rank["error"] < 1e-9
        assert max(rank["over"].values()) < 1.03


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("overlaps", [False, True])
def test_parameters_on_the_host(pool, overlaps):
    ranks = pool.run(memory_tasks.parameters_on_host, "2x2", overlaps)
    peaks = [rank["peak"] for rank in ranks]
    assert [rank["measured"] for rank in ranks] == pytest.approx(peaks, abs=64)
    for rank in ranks:
        assert rank["error"] < 1e-12
        assert rank["over"] == 0
        assert rank["on host"] == ranks[0]["on host"] != ()
        assert rank["away"]


def test_a_rank_that_dies_stops_the_others(two):
    assert_rank_1_stops_rank_0(two, tasks.one_rank_dies)


@pytest.mark.parametrize("how", ["global", "local"])
def test_batches_that_take_another_branch_are_captured_anew(pair, how):
    for rank in pair.run(tasks.branches, "2", how):
        assert rank["error"] < 1e-9
        assert rank["captures"][-1] == rank["captures"][2] >= 2  # and those seen again are known


def test_replicated_draws_are_equal_on_all_ranks(pool):
    ranks = pool.run(tasks.draws, "2x2")
    assert not np.array_equal(*ranks[0])
    for other in ranks[1:]:
        assert np.array_equal(ranks[0], other)


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("mesh", ["4", "2x2"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_lower_precision_is_that_of_a_single_device(pool, mesh, autocast):
    """To the accuracy of bfloat16, which has eight bits of mantissa."""
    assert max(pool.run(tasks.precision_error, mesh, autocast)) < 0.05
