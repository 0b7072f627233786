"""Training libraries on engines give what they give on one process."""

import pytest

from tests.dist.pool import Pool
from tests.integrations import run
from tests.integrations.compare import gaps, tolerance

pytestmark = pytest.mark.dist


# `benchmarks.integrations` has all actions, all libraries, and both on 2 and 2x2
@pytest.mark.parametrize(("tool", "mesh", "first"), [("trainer", "2", 3), ("lightning", "2", 2)])
def test_actions_give_what_one_process_gives(tool, mesh, first, tmp_path):
    folders = tmp_path / "alone", tmp_path / "distributed"
    for ranks, folder, on in ((1, folders[0], []), (2, folders[1], ["--mesh", mesh])):
        folder.mkdir()
        pool = Pool(ranks, launched=True)
        pool.run(run.main, [tool, str(folder), "--first", str(first), *on])
        pool.close()
    found = gaps(*folders, 2)
    assert len(found) == first
    wrong = {action: gap for action, gap in found.items() if not gap <= tolerance(tool, action)}
    assert not wrong
