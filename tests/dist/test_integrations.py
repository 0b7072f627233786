"""Training libraries on engines give what they give on one process."""

import pytest

from tests.integrations.compare import differences, tolerance

pytestmark = pytest.mark.dist


# `benchmarks.integrations` has all actions, all libraries, and both on 2 and 2x2
@pytest.mark.parametrize(("tool", "mesh", "first"), [("trainer", "2", 3), ("lightning", "2", 2)])
def test_actions_give_what_one_process_gives(tool, mesh, first, tmp_path):
    gaps = differences(tool, mesh, tmp_path, first=first)
    assert len(gaps) == first
    wrong = {action: gap for action, gap in gaps.items() if not gap <= tolerance(tool, action)}
    assert not wrong
