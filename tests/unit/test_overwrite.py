"""Results written over operands that die: what is written where, and that nothing else sees it."""

import pytest
import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.ir.aliasing import storages
from tests.lowering import lowered
from tests.memory import Step, step_of


def writes(gm: fx.GraphModule) -> list[fx.Node]:
    schemas = [(n, getattr(n.target, "_schema", None)) for n in gm.graph.nodes]
    return [n for n, schema in schemas if schema is not None and schema.is_mutable]


def gradients(step: Step) -> list[torch.Tensor]:
    return [p.grad for p in step.trained if p.grad is not None]


@pytest.mark.parametrize("name", ["mlp", "gpt2", "resnet", "vit"])
def test_a_backward_runs_twice_over_what_is_kept(name):
    step = step_of(name)
    without = frozenset({"overwrite", "fill_concatenations"})
    apart = lowered(step.gm, step.arguments, disable=without)
    most, expected, _ = step.run(apart)
    assert not writes(apart.step.forward) + writes(apart.step.backward)
    run = lowered(step.gm, step.arguments)
    assert writes(run.step.forward)
    assert writes(run.step.backward)
    peak, *_ = step.run(run)
    assert peak <= most
    loss = run(*step.arguments)[step.mutated]
    for last in (False, True):
        for p in step.trained:
            p.grad = None
        loss.backward(retain_graph=not last)
        for found, wanted in zip(gradients(step), expected, strict=True):
            assert torch.equal(found, wanted)


class Kept(fx.Interpreter):
    """Runs a program and keeps what every node gives."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node):
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.values[n] = value
        return value


@pytest.mark.parametrize("name", ["gpt2", "resnet", "mixtral"])
def test_storages_are_those_of_a_run(name):
    step = step_of(name)
    run = lowered(step.gm, step.arguments)
    kept = Kept(run.step.forward)
    with torch.no_grad():
        kept.run(*step.arguments)
    said = storages(run.step.forward.graph)
    made = [n for n in kept.values if said[n] is None or said[n][0].op != "placeholder"]
    real = {n: kept.values[n].untyped_storage()._cdata for n in made}
    assert len({said[n] for n in made}) == len(set(real.values())) > 10
    assert len({(said[n], real[n]) for n in made}) == len(set(real.values()))


def test_what_is_scattered_into_itself_is_not_written_over() -> None:
    """The sum is scattered into its other term, which is also the source."""

    def function(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        return torch.zeros_like(y).scatter_add(1, index, y) + y

    torch.manual_seed(0)
    x, index = torch.randn(4, 6, requires_grad=True), torch.rand(4, 6).argsort(1)
    gm = make_fx(lambda *given: (function(*given),))(x.detach(), index)
    (found,) = lowered(gm, (x, index))(x, index)
    assert torch.equal(found, function(x, index))
