"""The state of optimizers, against what they keep."""

import pytest
import torch
from torch import nn

from autopar.cli.common import OPTIMIZERS as NAMES
from autopar.planner.optimizer_state import OPTIMIZERS, named_state_ratio


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_kept(name, dtype):
    model = nn.Sequential(nn.Linear(20, 30), nn.Conv1d(4, 6, 3), nn.LayerNorm(30)).to(dtype)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [
        v for e in optimizer.state.values() for v in e.values() if isinstance(v, torch.Tensor)
    ]
    held = sum(v.nbytes for v in tensors if v.ndim)
    ratio = named_state_ratio(name, model.to("meta"))
    assert ratio * sum(p.nbytes for p in model.parameters()) == pytest.approx(held)


def test_the_command_line_knows_them():
    assert set(NAMES) == set(OPTIMIZERS)
