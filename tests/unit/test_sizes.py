"""Formulas for sizes, and graphs that take sizes as inputs."""

import pytest
import torch
import torch.fx as fx
from torch import nn

from autopar.ir.size_formulas import SizeFormulas, show_sizes, varying_dims
from autopar.ir.sized_graph import NotAlikeError, SizedGraph, merged
from autopar.tracer import ColoTracer


class Cut(nn.Module):
    """Halves, windows and a branch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        y = x[:, : n // 2] if n > 8 else x
        return y.reshape(-1, 4).sum(1)[: min(n, 20)]


def shapes(n: int) -> list[tuple[int, ...]]:
    return [(6, n, 4)]


def formulas(n: int = 12, module: nn.Module | None = None) -> SizeFormulas:
    graph = ColoTracer(dynamic={0: [1]}).trace(module or Cut(), (torch.zeros(6, n, 4),))
    found = SizeFormulas.of(graph)
    assert found is not None
    return found


def test_integers_are_multiples_of_sizes():
    # half of the size six times, and a third of the size
    pairs = {(36, 42), (4, 6)}
    found = formulas().values({(36, 48)}, shapes(12), shapes(16), shapes(18))
    assert found == {(36, 48): 54}
    assert formulas().values(pairs, shapes(12), shapes(14), shapes(16)) is None  # (4, 6) is none


@pytest.mark.parametrize("new", [8, 4, 1, 0])
def test_the_other_side_of_a_branch_is_refused(new):
    assert formulas().values({(36, 48)}, shapes(12), shapes(16), shapes(new)) is None


def test_a_constant_of_both_programs_that_would_change_is_refused():
    found = formulas(24)
    assert found.values({(72, 84)}, shapes(24), shapes(28), shapes(30)) == {(72, 84): 90}
    assert found.values({(72, 84)}, shapes(24), shapes(28), shapes(18)) is None  # min(n, 20)


def test_formulas_that_disagree_are_refused():
    """12 and 16 are also twice n // 2: for an odd size these differ."""
    assert formulas().values({(12, 16)}, shapes(12), shapes(16), shapes(13)) is None


def test_other_inputs_are_refused():
    found = formulas()
    assert found.values(set(), shapes(12), shapes(16), [(5, 14, 4)]) is None
    assert found.values(set(), shapes(12), shapes(16), [(6, 14)]) is None


def test_fixed_sizes_have_no_formulas():
    graph = ColoTracer().trace(Cut(), (torch.zeros(6, 12, 4),))
    assert SizeFormulas.of(graph) is None
    assert varying_dims(graph, [shapes(12), shapes(16)]) == {0: [1]}
    assert varying_dims(graph, [shapes(12), [(6, 12)]]) == {}


def test_two_programs_show_sizes_in_which_they_differ():
    first, second = [(4, 12, 64)], [(4, 16, 1024)]
    assert show_sizes(first, second, [(4, 24, 64)])
    assert show_sizes(first, second, [(4, 16, 2048)])
    assert not show_sizes(first, second, [(2, 24, 64)])  # both are for 4 rows
    assert not show_sizes(first, second, [(4, 1, 64)])
    assert not show_sizes(first, [(4, 1, 64)], [(4, 12, 128)])
    assert not show_sizes(first, second, [(4, 12)])


def test_a_graph_takes_sizes_as_inputs():
    def build(n: int) -> fx.GraphModule:
        return fx.symbolic_trace(lambda x, y: (x.view(n, 3, -1)[:n], y.expand(n, 4), 2 * n, 7))

    sized = SizedGraph.of(build(4), build(6))
    assert sized.sizes == ((4, 6), (8, 12))
    x, y = torch.arange(60.0), torch.zeros(4)
    for n in (2, 4, 5):
        expected = build(n)(x, y)
        for given in (sized.gm(x, y, n, 2 * n), sized.at({(4, 6): n, (8, 12): 2 * n})(x, y)):
            for a, b in zip(given, expected, strict=True):
                assert a.shape == b.shape if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda x: x + 1.0, lambda x: x + 2.0),
        (lambda x: x + 1, lambda x: x * 1),
        (lambda x: x.sum(0), lambda x: x.sum()),
        (lambda x: x.flatten(), lambda x: x.flatten().relu()),
        (lambda x: (x, x), lambda x: [x, x, x]),
    ],
)
def test_graphs_that_differ_in_more_are_told_apart(first, second):
    with pytest.raises(NotAlikeError):
        SizedGraph.of(fx.symbolic_trace(first), fx.symbolic_trace(second))


def test_flags_are_no_sizes():
    with pytest.raises(NotAlikeError):
        merged(True, False, lambda pair: pair)
    assert merged({"a": (1, [2, slice(3)])}, {"a": (1, [4, slice(5)])}, lambda pair: pair) == {
        "a": (1, [(2, 4), slice(None, (3, 5))])
    }
