"""Running statistics, counters and other buffers change as in eager PyTorch."""

import pytest
import torch
from torch import nn

from tests.captures import ROWS, trains_as_eager


def batch_norm(m):
    m.norm = nn.BatchNorm1d(8, momentum=None)


def batch_norm_affineless(m):
    m.norm = nn.BatchNorm1d(8, momentum=None, affine=False)


def normed_twice(m, x):
    return m.norm(m.a(x)).square().mean() + m.norm(m.b(x)).mean()


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("setup", [batch_norm, batch_norm_affineless])
def test_a_cumulative_batch_norm_is_one_program(setup, engine):
    graph = trains_as_eager(normed_twice, setup, engine=engine, steps=3)
    assert engine or not graph.guards


def counted(m, x):
    m.mean += 1
    return m.a(x).square().mean() / (1 if m.mean.sum() > 100 else 2)


def test_checking_a_guard_changes_no_buffer():
    graph = trains_as_eager(counted)
    (guard,) = graph.guards
    mean = torch.full((8,), 11.5, dtype=torch.float64)
    for _ in range(3):
        assert guard.holds([ROWS], {"mean": mean})
    assert (mean == 11.5).all()
    assert not guard.holds([ROWS], {"mean": mean + 1})


def instance_norm(m):
    m.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True, momentum=0.3)


def instance_norm_in_evaluation(m):
    instance_norm(m)
    m.norm.eval()


def of_a_batch(m, x):
    return m.norm(m.norm(m.a(x).reshape(2, 4, 4)) + 1).square().mean()


def of_one_sample(m, x):
    return m.norm(m.a(x)).square().mean()


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("function", [of_a_batch, of_one_sample])
@pytest.mark.parametrize("setup", [instance_norm, instance_norm_in_evaluation])
def test_statistics_of_an_instance_norm(function, setup, engine):
    trains_as_eager(function, setup, engine=engine)


NAMES = ("code", "graph", "meta")


def reserved(m):
    for name in NAMES:
        m.register_buffer(name, torch.ones(8))


def codebook(m, x):
    with torch.no_grad():
        m.code.mul_(0.9).add_(m.a(x).detach().mean(0), alpha=0.1)
        m.graph.copy_(m.code / (m.meta.unsqueeze(1) + 1e-5)[0])
        m.meta[0] = 3
    return (m.a(x) * m.code * m.meta * m.graph).square().mean()


def reserved_modules(m):
    m.graph, m.meta = nn.Linear(8, 8), nn.BatchNorm1d(8)
    m.code = nn.Parameter(torch.ones(8))


def through_modules(m, x):
    with torch.no_grad():
        m.mean[0] = 3
    return (m.meta(m.graph(x)) * m.code * m.mean).square().mean()


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize(
    ("function", "setup"), [(codebook, reserved), (through_modules, reserved_modules)]
)
def test_buffers_and_modules_may_have_names_of_a_graph_module(function, setup, engine):
    trains_as_eager(function, setup, engine=engine)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("engine", [False, True])
def test_weights_computed_by_hooks(kind, engine):
    def setup(m):
        m.normed = kind(nn.Linear(8, 8).double())

    trains_as_eager(lambda m, x: m.normed(x).square().mean(), setup, engine=engine)
