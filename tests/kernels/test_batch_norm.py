"""Batch norm by the vendor's library: the same results and gradients as what capturing makes."""

import pytest
import torch
import torch.fx as fx

from autopar.kernels.batch_norm import use_library
from autopar.passes.runner import run_passes

aten = torch.ops.aten
OPERATORS = (
    aten._native_batch_norm_legit_functional.default,
    aten._batch_norm_with_update_functional.default,
)


class Norms(torch.nn.Module):
    """Three outputs are used: the result and the new statistics."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training_norm = training

    def forward(self, x, weight, bias, mean, var):
        out, _, _, new_mean, new_var = OPERATORS[0](
            x, weight, bias, mean, var, self.training_norm, 0.1, 1e-5
        )
        return out, new_mean, new_var


def values(device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 5, device=device, requires_grad=True)
    weight, bias = (torch.randn(6, device=device, requires_grad=True) for _ in range(2))
    return [x, weight, bias, torch.zeros(6, device=device), torch.ones(6, device=device)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equals_what_was_captured(device):
    plain, ours = (fx.symbolic_trace(Norms(training=True)) for _ in range(2))
    run_passes(ours, [use_library])
    assert [n.target for n in ours.graph.find_nodes(op="call_function", target=OPERATORS[1])]
    arguments = values(device)
    expected, actual = plain(*arguments), ours(*arguments)
    torch.testing.assert_close(actual, expected)
    seed = torch.randn_like(expected[0])
    torch.testing.assert_close(
        torch.autograd.grad(actual[0], arguments[:3], seed),
        torch.autograd.grad(expected[0], arguments[:3], seed),
    )
    assert torch.equal(arguments[3], torch.zeros_like(arguments[3]))


def test_evaluation_is_left_alone():
    gm = run_passes(fx.symbolic_trace(Norms(training=False)), [use_library])
    assert gm.graph.find_nodes(op="call_function", target=OPERATORS[0])
