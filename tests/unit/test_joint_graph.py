"""Joint graphs: those of AOTAutograd, which traces what ours does not."""

import copy

import pytest
import torch
import torch.fx as fx

from autopar.comm.steps import linear
from autopar.compile import compile_first_rank, plan_step
from autopar.passes import joint
from autopar.passes.drop_views import drop_views
from tests.clusters import eager_to_shard
from tests.lowering import graphs_of, lowered
from tests.models import CASES, LanguageModel


def described(gm: fx.GraphModule) -> list[tuple]:
    """Every node with its value and its part of the step, without views that change nothing."""
    gm = drop_views(copy.deepcopy(gm))
    gm.graph.eliminate_dead_code()
    number = {node: k for k, node in enumerate(gm.graph.nodes)}

    def one(node: fx.Node) -> tuple:
        given = {k: v for k, v in node.kwargs.items() if v is not None}
        read = fx.node.map_arg((node.args, given), lambda n: f"%{number[n]}")
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            value = tuple(value.shape), value.stride(), value.dtype
        target = node.target if node.op == "call_function" else None
        stacks = map(node.meta.get, ("nn_module_stack", "fwd_nn_module_stack"))
        module = [list((stack or {}).values()) for stack in stacks]
        forward = node.meta.get("partitioner_tag") == "is_forward" and target is not None
        return target, str(read), str(value), str(module), forward

    return [one(node) for node in gm.graph.nodes]


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("name", [*CASES, "dropout"])
def test_graphs_are_those_of_aot_autograd(monkeypatch, name, schedule):
    graphs = []
    ours = joint._traced

    def both(function, arguments, tangents):
        gm = ours(function, arguments, tangents)
        theirs = joint._functionalized(function, arguments)
        graphs.append((described(gm), described(theirs)))
        return gm

    case = CASES["gpt2" if name == "dropout" else name]
    model = LanguageModel(layers=1, dropout=0.1).double() if name == "dropout" else case.build()
    planned = plan_step(model, (), case.batch(0), cluster=eager_to_shard("2x2"), schedule=schedule)
    monkeypatch.setattr(joint, "_traced", both)
    compile_first_rank(planned)
    ((one, other),) = graphs
    assert len(one) > 50
    for mine, theirs in zip(one, other, strict=True):
        assert mine == theirs


def doubled_columns(x: torch.Tensor) -> torch.Tensor:
    """Its derivative writes into a part of a tensor."""

    def transpose(gradient: torch.Tensor) -> torch.Tensor:
        whole = gradient.new_zeros(gradient.shape[0], 6)
        whole[:, 1:3] = 2 * gradient
        return whole

    return linear(x, lambda v: 2 * v[:, 1:3], transpose)


def test_a_derivative_that_writes_has_a_functional_graph():
    graph = fx.Graph()
    sine = graph.call_function(torch.ops.aten.sin.default, (graph.placeholder("x"),))
    columns = graph.call_function(doubled_columns, (sine,))
    graph.output((graph.call_function(torch.ops.aten.exp.default, (columns,)),))
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert not any(map(joint._writes, joint.trace_joint(copy.deepcopy(gm), [x]).gm.graph.nodes))
    (given,) = torch.autograd.grad(lowered(gm, [x])(x)[0].sum(), x)
    (expected,) = torch.autograd.grad(doubled_columns(x.sin()).exp().sum(), x)
    assert torch.equal(given, expected) and expected.any()


def test_hooks_on_saved_tensors_are_not_traced():
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.ops.aten.exp.default(torch.ops.aten.sin.default(x)),)

    x = torch.randn(4, requires_grad=True)
    plain = graphs_of(fx.symbolic_trace(Net()), [x])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cosh(), lambda t: t.sinh()):
        hooked = graphs_of(fx.symbolic_trace(Net()), [x])
    for one, other in ((plain.forward, hooked.forward), (plain.backward, hooked.backward)):
        assert str(one.graph) == str(other.graph)
    assert "sinh" not in str(hooked.backward.graph)
