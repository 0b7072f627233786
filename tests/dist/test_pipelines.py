"""Training in pipelines of four processes: what a single device computes."""

import numpy as np
import pytest

from tests.dist import pipeline_tasks as tasks
from tests.dist.pool import assert_rank_1_stops_rank_0
from tests.pipelines import MODELS

pytestmark = pytest.mark.dist

EXACT = 1e-9
BOTH, FOUR, TENSOR = "pipe=2,data=2", "pipe=4", "pipe=2,tensor=2"
ROWS = {"up.weight": "S1R", "down.weight": "RS1"}
HIDDEN = {f"gpt2.transformer.h.{k}.mlp.c_fc.weight": "RS1" for k in range(2)}
INDEPENDENT = {"microbatch": "independent"}
SIZES = {"sizes": [3, 3, 2]}

# Model, mesh, microbatches, schedule, options of the engine, and how it is trained. Together they
# have each model, each kind of mesh, each schedule, and 1 to 8 microbatches; random ones are in
# tests/unit/test_random_pipelines.py.
CASES = [
    ("gpt2", BOTH, 4, "1f1b", {}, {"clip": 0.05}),
    ("gpt2", FOUR, 8, "zb-h1", {}, {}),
    ("gpt2", TENSOR, 2, "interleaved", {"constraints": HIDDEN}, {}),
    ("llama", FOUR, 4, "gpipe", {}, {"steps": 2}),
    ("vit", TENSOR, 2, "1f1b", {}, {}),
    ("t5", FOUR, 4, "zb-h1", {}, {"steps": 2}),
    ("unet", BOTH, 3, "zb-h1", {}, {}),
    ("experts", TENSOR, 5, "zbv", {}, {}),
    ("experts", FOUR, 1, "gpipe", {}, {}),
    ("mlp", TENSOR, 8, "dualpipev", {"constraints": ROWS}, {"optimizer": "sgd"}),
    ("mlp", "data=2,pipe=2", 7, "1f1b", {}, {"clip": 0.02}),
    ("thrice", BOTH, 4, "1f1b", {}, {"samples": [8, 5, 12], "optimizer": "sgd"}),
    ("crossings", BOTH, 2, "zb-h1", {}, {"evaluate": True}),
    ("frozen", FOUR, 4, "zb-h1", {}, {}),
    ("normed", BOTH, 3, "zbv", INDEPENDENT, SIZES | {"evaluate": True}),
    ("counted", FOUR, 3, "interleaved", INDEPENDENT, SIZES),
    ("mlp", BOTH, 4, "1f1b", {"memory": "400KiB"}, {"steps": 1}),
    ("tied", BOTH, 4, "1f1b", {"stages": "layers.3"}, {"steps": 1}),
]


@pytest.mark.sample(0.25)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]} {c[2]} {c[3]}")
def test_training_equals_a_single_device(pool, case):
    name, mesh, _, schedule, options, _ = case
    for found in pool.run(tasks.train, *case):
        assert max(found["differences"].values()) < MODELS[name].tolerance, found
        ranks, several = 4 if mesh == FOUR else 2, schedule in ("interleaved", "zbv", "dualpipev")
        assert found["stages"] % ranks == 0 and (found["stages"] > ranks) == several
        if "constraints" in options:
            assert set(options["constraints"]) <= set(found["split"])
        owners = {o for o in found["owners"].values() if o is not None}
        assert len(owners) > 1 or mesh != FOUR


def test_what_no_stage_uses_and_scalars_are_on_all_ranks(pool):
    for found in pool.run(tasks.train, "thrice", FOUR, 2, "gpipe", {}, {"steps": 1}):
        owners = found["owners"]
        assert [n for n, o in owners.items() if o is None] == ["scale", "unused.weight",
                                                              "unused.bias"]  # fmt: skip
        assert owners["shared.weight"] == 0 and owners["head.weight"] in (2, 3)


@pytest.mark.parametrize("mesh", [BOTH, FOUR])
def test_large_results_are_brought_from_their_stage_when_they_are_read(pool, mesh):
    for found in pool.run(tasks.late_results, mesh):
        assert max(found.values()) < EXACT, found


@pytest.mark.sample(0.5)
@pytest.mark.parametrize(("mesh", "schedule"), [(BOTH, "1f1b"), (FOUR, "zb-h1")])
def test_dropout(pool, mesh, schedule):
    ranks = pool.run(tasks.dropout, mesh, schedule)
    found = ranks[0]
    for other in ranks[1:]:
        assert all(np.array_equal(found[name], other[name]) for name in found)
    for name in ("", "again "):
        a, b = found[f"{name}a"], found[f"{name}b"]
        assert not np.array_equal(a, b)  # stages draw anew
        assert len({tuple(row) for row in a}) == 8  # and microbatches do
        when = "again" if name else "at once"
        for parameter in ("first", "second"):
            assert np.allclose(found[f"{parameter} {when}"], (a * b).sum(0))
    assert not np.array_equal(found["a"], found["again a"])


def test_losses_and_ways_of_training(pool):
    for found in pool.run(tasks.losses_and_loops):
        assert max(found.values()) < EXACT, found


@pytest.mark.sample(0.25)
@pytest.mark.parametrize(
    ("saved", "loaded"), [(BOTH, "data=4"), (FOUR, BOTH), ("data=4", "data=2,pipe=2")]
)
def test_checkpoints_go_on_on_another_mesh(pool, tmp_path, saved, loaded):
    for found in pool.run(tasks.resumed, str(tmp_path / "saved"), saved, loaded):
        assert max(found.values()) < EXACT, found


def test_refusals_are_the_same_on_all_ranks_and_say_what_to_do(pool):
    words = {
        "mixes": ["NotSeparableError", "batch_norm", "microbatch='independent'"],
        "buffer": ["PlanError", "buffer mean", "stages="],
        "schedule": ["PlanError", "'zb'", "1f1b"],
        "evaluates": ["PlanError", "forward-only", "choose"],
        "operators": ["ConstraintError", "linear_9", "linear_4"],
        "local": ["EngineError", "batch='local'", "batch='global'"],
        "differ": ["EngineError", "different batches"],
    }
    first, *others = pool.run(tasks.refusals)
    for name, parts in words.items():
        assert all(part in first[name] for part in parts), (name, first[name])
        assert all(other[name] == first[name] for other in others), name


@pytest.mark.parametrize(
    ("name", "schedule", "microbatches"), [("frozen", "1f1b", 3), ("thrice", "zbv", 3)]
)
def test_the_memory_that_a_refusal_names_is_enough(pool, name, schedule, microbatches):
    """The planner's, or that of the stage which needs most; microbatches are of two sizes."""
    for found in pool.run(tasks.within_named_memory, name, BOTH, microbatches, schedule):
        assert found["refusals"] <= 2 and found["difference"] < EXACT


def test_an_error_of_one_rank_is_one_of_all(pool):
    messages = pool.run(tasks.fails_on_one_rank)
    assert all("no way here" in message for message in messages), messages


def test_a_rank_that_dies_stops_the_others(two):
    assert_rank_1_stops_rank_0(two, tasks.one_rank_dies)
