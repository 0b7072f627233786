"""Parameters that one pipeline stage owns, and of which the ranks of others hold no rows."""

import pytest
import torch

from tests.dist import owned_checkpoint_tasks as checkpoints
from tests.dist import owned_tasks as tasks

pytestmark = pytest.mark.dist

MESHES = "data=2,pipe=2", "pipe=2,data=1,tensor=2"
EXACT = 1e-9


@pytest.fixture(scope="module")
def gaps(pool):
    return {mesh: pool.run(tasks.compare, mesh) for mesh in MESHES}


@pytest.mark.parametrize("script, optimizer", tasks.CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_values_are_those_of_one_process(gaps, mesh, script, optimizer):
    for found in gaps[mesh]:
        gap = found[f"{script}, {optimizer}"]
        assert isinstance(gap, float) and gap < EXACT, gap


@pytest.mark.parametrize("mesh", MESHES)
def test_conversions_between_owners_and_shards(pool, mesh):
    for found in pool.run(checkpoints.conversions, mesh):
        assert max(found.values()) == 0, found


@pytest.fixture(scope="module")
def folders(pool, tmp_path_factory):
    """Checkpoints by the mesh that saved them, and what is in them."""
    meshes = ("pipe=2,data=2", "data=4")
    folders = {mesh: tmp_path_factory.mktemp("saved") for mesh in meshes}
    return {mesh: (path, pool.run(checkpoints.save, path, mesh)) for mesh, path in folders.items()}


def test_checkpoints_have_each_element_once_under_the_models_names(folders):
    for _, answers in folders.values():
        for found in answers:
            assert found == {"saved": ([], []), "beside": ([], [])}


@pytest.mark.parametrize(
    "saved, loaded",
    [("pipe=2,data=2", mesh) for mesh in tasks.LAYOUTS] + [("data=4", "pipe=2,data=2")],
)
def test_a_run_goes_on_on_another_mesh(pool, folders, saved, loaded):
    for found in pool.run(checkpoints.resume, folders[saved][0], loaded):
        assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("mesh", ["pipe=2,data=2", "pipe=4"])
def test_state_dicts_of_whole_tensors(pool, mesh):
    for found in pool.run(checkpoints.whole_states, mesh):
        assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("mesh", ["data=2,pipe=2", "pipe=2,data=1,tensor=2"])
def test_models_start_without_values(pool, tmp_path, mesh):
    for found in pool.run(checkpoints.starts, tmp_path, mesh):
        assert max(found.values()) == 0, found


def test_random_values_are_those_of_a_model_without_stages(pool):
    staged, *others = pool.run(checkpoints.drawn, "pipe=4")
    for other in others:
        assert all(torch.equal(staged[name], other[name]) for name in staged)
    assert staged["orthonormal"]
    (plain, *_) = pool.run(checkpoints.drawn, "data=4")
    for name in ("token", "twin", "bias", "token exponential"):
        assert torch.equal(staged[name], plain[name])


def test_refusals_say_what_to_do(pool):
    words = {
        "from_local": ["EngineError", "S(0)", "O(0, 1)", "pass shape= and stride="],
        "no such stage": ["stage 9", "(data=2, pipe=2)", "2 stages", "stage=None"],
        "split by stages": ["S1R@1", "axis 1", "the pipe axis"],
        "scalar": ["scalar", "stage 0", "stage=None"],
        "a number of a part": ["full_tensor().item()", "on all ranks"],
    }
    for messages in pool.run(checkpoints.refusals, "data=2,pipe=2"):
        for name, message in messages.items():
            assert all(word in message for word in words[name]), (name, message)
