"""`auto_engine(..., compile=True)`: the same gradients, and the plan still in force."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config

from autopar import ClusterInfo, auto_engine
from autopar.cluster.link import Link
from autopar.comm import world as environment
from autopar.errors import InfeasibleError


class Block(nn.Module):
    """A block with dropout, which keeps much that can be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x):
        x = x + self.down(F.dropout(torch.tanh(self.up(x)), 0.3, self.training))
        return x.square().mean()


@pytest.fixture(autouse=True)
def _quick_compiler() -> Iterator[None]:
    """Scalar kernels: without a search for the vectors of this machine, by trial compilations."""
    with config.patch({"cpp.simdlen": 0}):
        yield


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left() -> Iterator[None]:
    yield
    environment.stop()


def gradients(memory: float, **options) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Block().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, _ = auto_engine(model, optimizer, "1", memory=memory, **options)
    engine(torch.randn(64, 16, dtype=torch.float64)).backward()
    return [p.grad.to_local().clone() for p in model.parameters()]


def test_same_gradients_and_what_is_computed_again_runs_again():
    with pytest.raises(InfeasibleError) as error:
        gradients(1000)
    smallest = error.value.smallest_bytes
    expected = gradients(2**30)
    graphs = []

    def look(graph: torch.fx.Graph) -> None:
        graphs.append(Counter(str(n.target) for n in graph.nodes if n.op == "call_function"))

    with config.patch(post_grad_custom_post_pass=look, force_disable_caches=True):
        found = gradients(smallest, compile=True)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    forward, backward = graphs
    products = {"aten.mm.default", "aten.addmm.default"}
    assert sum(forward[p] for p in products) == 2
    # two for each of the two layers but the first, whose input needs none; the rest runs again
    assert sum(backward[p] for p in products) > 3


class Wide(nn.Module):
    """A product whose result is large: where that is used, the first weight is idle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 96, bias=False)

    def forward(self, x):
        return self.head(self.up(x)).logsumexp(-1).mean()


def test_weights_on_the_host():
    cluster = replace(ClusterInfo.of("1"), host_link=Link(1e-9, 1e-15))

    def gradients(memory: float, **options) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Wide().double()
        engine, _ = auto_engine(model, None, cluster, memory=memory, **options)
        engine(torch.randn(48, 32, dtype=torch.float64)).backward()
        assert bool(engine.memory_plan.parameters_on_host) is bool(options)
        return [p.grad.to_local().clone() for p in model.parameters()]

    with pytest.raises(InfeasibleError) as error:
        gradients(1000)
    expected = gradients(2**30)
    environment.stop()
    found = gradients(error.value.smallest_bytes, compile=True)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_compiled_means_lowered():
    with pytest.raises(ValueError, match="leave lower=False out"):
        auto_engine(Block(), None, "1", lower=False, compile=True)
