"""Einsums and tensor dots under autocast: dtypes and values of eager PyTorch."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from autopar.errors import CaptureError
from autopar.tracer.tracer import ColoTracer


class Product(nn.Module):
    """Of an input and a weight."""

    def __init__(self, function: Callable[..., torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


def einsum(equation: str) -> Callable[..., torch.Tensor]:
    return lambda *operands: torch.einsum(equation, *operands)


def captured(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    graph = ColoTracer().trace(model, (x,))
    with torch.no_grad():
        (result,) = graph.gm(*model.parameters(), x)
    return result


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bd,edh->ebh", (3, 6, 5)), ("b d, h d -> b h", (4, 6)), ("bd,bd", (4, 6)),
        ("...d,dh->...h", (6, 5)), ("bd,bd->bd", (4, 6)), ("bd,e->bde", (3,)),
        ("bd,zh->bh", (1, 5)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_einsum_is_cast_where_eager_casts(equation, shape, given):
    torch.manual_seed(0)
    model, x = Product(einsum(equation), *shape), torch.randn(4, 6).to(given)
    if given is torch.float64:
        model.double()
    with torch.autocast("cpu", torch.bfloat16):
        expected, result = model(x).detach(), captured(model, x)
    assert result.dtype is expected.dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.tensordot(x, w, 1),
        lambda x, w: torch.tensordot(x, w, dims=([1], [0])),
        lambda x, w: torch.einsum("bd,de->be", [x, w]),
        lambda x, w: torch.einsum(x, [0, 3], w, [3, 1], [1, 0]),
        lambda x, w: torch.einsum(x, [..., 27], w, [27, 1]),
    ],
    ids=["tensordot", "dims", "a list", "numbers", "numbers without a result"],
)
def test_other_forms_are_cast(function):
    model, x = Product(function, 6, 5), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected, result = model(x).detach(), captured(model, x)
    assert result.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_einsum_of_three_is_refused_under_autocast_alone():
    model = Product(lambda x, w: torch.einsum("bd,de,ef->bf", x, w, w), 6, 6)
    x = torch.randn(4, 6)
    torch.testing.assert_close(captured(model, x), model(x).detach())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CaptureError, match="two operands"):
        captured(model, x)
