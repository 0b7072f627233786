"""Einsums and tensor dots under autocast: dtypes and values of eager PyTorch."""

import pytest
import torch
from torch import nn

from autopar.errors import CaptureError
from autopar.tracer.tracer import ColoTracer


class Einsum(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.equation, x, self.weight)


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
    model, x = Einsum(equation, shape), torch.randn(4, 6).to(given)
    if given is torch.float64:
        model.double()
    with torch.autocast("cpu", torch.bfloat16):
        expected, result = model(x).detach(), captured(model, x)
    assert result.dtype is expected.dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_tensordot_is_cast():
    class Dot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensordot(x, self.weight, 1)

    model, x = Dot(), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected, result = model(x).detach(), captured(model, x)
    assert result.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_einsum_of_three_is_refused_under_autocast_alone():
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bd,de,ef->bf", x, self.weight, self.weight)

    model, x = Three(), torch.randn(4, 6)
    torch.testing.assert_close(captured(model, x), model(x).detach())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CaptureError, match="two operands"):
        captured(model, x)
