"""Lazy modules take their sizes and values from the first batch, as in eager PyTorch."""

import pytest
import torch
from torch import nn

from autopar.errors import EngineError
from autopar.runtime.lazy_modules import initialize_lazy_modules


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.Linear(16, 8),
        nn.LazyLinear(4),
    )  # fmt: skip


X = torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)


def test_values_are_those_of_the_first_forward():
    eager, ours = model(), model()
    calls = []
    ours[3].register_forward_hook(lambda *_: calls.append(1))
    kept = list(ours.parameters())
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    torch.manual_seed(1)
    with torch.no_grad():
        eager(X)
    torch.manual_seed(1)
    initialize_lazy_modules(ours, (X,), {})
    assert not calls  # the forward has not run
    assert int(ours[1].num_batches_tracked) == 0
    pairs = zip(ours.named_parameters(), eager.named_parameters(), strict=True)
    for k, ((name, p), (_, q)) in enumerate(pairs):
        assert torch.equal(p, q), name
        assert p is kept[k] is optimizer.param_groups[0]["params"][k]
    assert [type(m) for m in ours] == [type(m) for m in eager]
    torch.testing.assert_close(ours.eval()(X), nn.Sequential(*ours)(X))


def test_a_module_that_no_batch_comes_to_is_refused():
    lazy = nn.Linear(4, 4)
    lazy.aside = nn.LazyLinear(2)
    with pytest.raises(EngineError, match=r"aside\.weight of a lazy module.*before auto_engine"):
        initialize_lazy_modules(lazy, (torch.zeros(2, 4),), {})


def test_a_forward_that_needs_values_is_refused():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.LazyLinear(2)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(EngineError, match=r"a\.weight of a lazy module has no shape yet.*\("):
        initialize_lazy_modules(Branches(), (torch.zeros(2, 4),), {})
