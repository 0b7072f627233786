"""Parts that outlive what they were cut from are copied; other views stay views."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.testing.live_memory import LiveMemory
from tests.lowering import graphs_of, lowered

ROWS, WIDTH = 64, 32
CLONE = torch.ops.aten.clone.default


def values(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def program(function, arguments):
    with torch.no_grad():
        return make_fx(lambda *x: (function(*x),))(*(x.detach() for x in arguments))


def copies(function, arguments) -> int:
    """Of the forward and the backward graph."""
    step = graphs_of(program(function, arguments), arguments)
    graphs = [step.forward.graph] + ([step.backward.graph] if step.backward else [])
    return sum(len(g.find_nodes(op="call_function", target=CLONE)) for g in graphs)


def check_gradients(function, arguments) -> None:
    (result,) = lowered(program(function, arguments), arguments)(*arguments)
    expected = function(*arguments)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    for gradient, eager in zip(
        torch.autograd.grad(result.sum(), arguments),
        torch.autograd.grad(expected.sum(), arguments),
        strict=True,
    ):
        torch.testing.assert_close(gradient, eager, rtol=0, atol=1e-12)


def own_positions(x: Tensor, w: Tensor) -> Tensor:
    """A quarter of what is computed is kept for the backward, through further views."""
    own = (x + 1)[: ROWS // 4]
    return (own.view(-1, WIDTH).t().exp().t() @ w) * own


def transposed_part(x: Tensor, w: Tensor) -> Tensor:
    return F.elu((x + 1).t()[:8]) @ w.t()[:, :8]


def one_of_three(x: Tensor, w: Tensor) -> Tensor:
    a, _, _ = (x @ w).split(WIDTH // 3 + 1, dim=1)
    return (a * a).sum(1)


def shard_of_shard(x: Tensor, w: Tensor) -> Tensor:
    half = (x + w[:1])[: ROWS // 2]
    return half.sin()[: ROWS // 4] * half[: ROWS // 4]


CUT = {
    "positions": (own_positions, [(ROWS, WIDTH), (WIDTH, WIDTH)]),
    "transposed": (transposed_part, [(ROWS, WIDTH), (ROWS, ROWS)]),
    "one of three": (one_of_three, [(ROWS, WIDTH), (WIDTH, WIDTH)]),
    "a part of a part": (shard_of_shard, [(ROWS, WIDTH), (ROWS, WIDTH)]),
}


@pytest.mark.parametrize("name", CUT)
def test_a_part_that_is_saved_is_copied(name: str) -> None:
    function, shapes = CUT[name]
    arguments = values(*shapes)
    assert copies(function, arguments) >= 1
    check_gradients(function, arguments)


def test_a_part_that_is_saved_does_not_keep_the_whole() -> None:
    def head(x: Tensor) -> Tensor:
        own = (x + 1)[: ROWS // 4]
        return own * own

    arguments = values((ROWS, WIDTH))
    step = lowered(program(head, arguments), arguments)
    whole = arguments[0].nbytes
    with LiveMemory() as live:
        (result,) = step(*arguments)
        held = live.changes.copy()
    assert sum_of(held) == whole // 4 + result.nbytes


def sum_of(changes) -> int:
    """Bytes that live after a list of changes."""
    alive: dict[int, int] = {}
    for number, nbytes in changes:
        if nbytes < 0:
            alive.pop(number, None)
        else:
            alive[number] = nbytes
    return sum(alive.values())


def test_a_shard_of_a_gradient_does_not_keep_the_gradient() -> None:
    arguments = values((ROWS // 4, WIDTH), (8, ROWS))

    def cut(shard: Tensor, x: Tensor) -> Tensor:
        return x @ torch.cat([shard, *[shard.detach()] * 3])

    check_gradients(cut, arguments)
    step = lowered(program(cut, arguments), arguments)
    gradient = torch.autograd.grad(step(*arguments)[0].sum(), arguments[0])[0]
    assert gradient.untyped_storage().nbytes() == gradient.nbytes


def test_parts_that_are_all_read_stay_views() -> None:
    """Queries, keys and values of one product."""

    def attention(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (x @ w).chunk(3, dim=1)
        return (q @ k.t()).softmax(-1) @ v

    arguments = values((ROWS, WIDTH), (WIDTH, 3 * WIDTH))
    assert copies(attention, arguments) == 0
    check_gradients(attention, arguments)


def test_parts_of_arguments_and_of_what_is_kept_stay_views() -> None:
    def of_an_argument(x: Tensor, w: Tensor) -> Tensor:
        return x[: ROWS // 4] @ w

    def of_what_is_kept(x: Tensor, w: Tensor) -> Tensor:
        whole = (x @ w).exp()  # whose derivative reads the result
        return whole[: ROWS // 4] * whole[: ROWS // 4]

    arguments = values((ROWS, WIDTH), (WIDTH, WIDTH))
    for function in (of_an_argument, of_what_is_kept):
        assert copies(function, arguments) == 0
        check_gradients(function, arguments)


def test_a_result_that_is_a_part_is_copied() -> None:
    def of_the_last(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w)[-1:]

    arguments = values((ROWS, WIDTH), (WIDTH, WIDTH))
    (result,) = lowered(program(of_the_last, arguments), arguments)(*arguments)
    assert result.untyped_storage().nbytes() == result.nbytes
