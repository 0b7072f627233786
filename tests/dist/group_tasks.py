"""Collectives between CPU processes, one way against another; run on the ranks of a pool."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from autopar.errors import EngineError
from autopar.runtime import peers, shared_memory
from autopar.runtime.direct import DirectGroup
from autopar.runtime.groups import Group, ProcessGroup
from autopar.runtime.shared_memory import SharedGroup


def shared(
    group: dist.ProcessGroup, name: str = "shared", timeout_s: float | None = None
) -> SharedGroup:
    """On a host that it can be on."""
    met = peers.meet(group, SharedGroup.memory_bytes(group.size()), timeout_s)
    assert met is not None
    return SharedGroup(name, group, met)


def largest_difference(shape: tuple[int, ...]) -> float:
    """Between ours and Gloo, at once and started: one element, uneven parts, above and below one
    round."""
    group = init_device_mesh("cpu", shape).get_group(0)
    gloo = ProcessGroup("gloo", group)
    torch.manual_seed(dist.get_rank())
    worst = 0.0
    for ours in (DirectGroup("direct", group), shared(group)):
        for n in (1, 1000, 2**18 + 3):
            x, parts = torch.randn(n, dtype=torch.float64), torch.randn(gloo.size, n).double()
            flags = x > 0
            for a, b in (
                (gloo.all_reduce(x, "sum"), ours.all_reduce(x, "sum")),
                (gloo.all_reduce(x, "max"), ours.all_reduce(x, "max")),
                (gloo.all_reduce(flags, "sum"), ours.all_reduce(flags, "sum")),
                (gloo.all_gather(x), ours.all_gather(x)),
                (gloo.reduce_scatter(parts), ours.reduce_scatter(parts)),
                (gloo.all_to_all(parts), ours.all_to_all(parts)),
            ):
                assert a.shape == b.shape
                worst = max(worst, (a.double() - b.double()).abs().max().item())
            for g in (gloo, ours):  # in place, three under way while others run
                a, b, c = x.clone(), parts.clone(), parts.clone()
                waits = [
                    g.start_all_reduce(a, "max"),
                    g.start_all_gather(b),
                    g.start_reduce_scatter(c),
                ]
                between = g.all_reduce(x, "sum")
                for wait in reversed(waits):
                    wait()
                for found, expected in (
                    (a, gloo.all_reduce(x, "max")), (b, gloo.all_gather(parts[g.index])),
                    (c[g.index], gloo.reduce_scatter(parts)), (between, gloo.all_reduce(x, "sum")),
                ):  # fmt: skip
                    worst = max(worst, (found - expected).abs().max().item())
            total = ours.all_reduce(x, "sum")
            every = ours.all_gather(total)
            assert all(torch.equal(total, other) for other in every)  # to the last bit
        ours.close()
    return worst


def shared_memory_is_messages(shape: tuple[int, ...]) -> bool:
    """Every dtype and way, to the last bit, in so little memory that it is used again and again."""
    group = init_device_mesh("cpu", shape).get_group(0)
    direct = DirectGroup("direct", group)
    k, me = direct.size, direct.index
    torch.manual_seed(dist.get_rank())
    with mock.patch.multiple(
        shared_memory, MESSAGE_BYTES=64, _ROW_BYTES=4096, _ROUND_BYTES=1024
    ):
        ours, other = shared(group), shared(group, "other")
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
            for n in (0, 1, 7, 300, 5000):
                x, parts = _values((n,), dtype), _values((n, k), dtype).t()  # not contiguous
                for call in (
                    lambda g, x=x: g.all_reduce(x, "sum"),
                    lambda g, x=x: g.all_reduce(x.view(-1, 1), "max"),
                    lambda g, x=x: g.reduce_row([x[:9], x[9:]], "sum"),
                    lambda g, x=x: g.all_gather(x),
                    lambda g, parts=parts: g.reduce_scatter(parts),
                ):
                    assert torch.equal(call(ours), call(direct)), (dtype, n)
                assert torch.equal(ours.all_to_all(parts), direct.all_gather(parts)[:, me])
                if n:
                    assert _started(ours, other, x, parts) == _started(direct, direct, x, parts)
        flags = _values((300,), torch.float32) > 0
        for call in (
            lambda g: g.all_reduce(flags, "sum"),
            lambda g: g.all_reduce(flags, "max"),
            lambda g: g.reduce_row([flags], "sum"),
            lambda g: g.all_gather(flags),
        ):
            assert torch.equal(call(ours), call(direct))
        for g in (ours, other):
            g.close()
    return True


def _values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (100 * torch.randn(shape)).to(dtype)


def _started(one: Group, two: Group, x: torch.Tensor, parts: torch.Tensor) -> list[list[float]]:
    """On two groups, several under way, waited for in another order than started."""
    b, c = (parts.clone(memory_format=torch.contiguous_format) for _ in range(2))
    a, d = x.clone(), x[:3].clone()
    waits = [
        one.start_all_reduce(a, "sum"),
        two.start_all_gather(b),
        one.start_reduce_scatter(c),
        one.start_all_reduce(d, "max"),
    ]
    between = two.all_reduce(x, "max")
    for k in (3, 0, 1, 2):
        waits[k]()
    return [t.tolist() for t in (a, b, c[one.index], d, between)]


def more_than_fits_in_sockets() -> float:
    """All start more small ones than there is room for, before any waits."""
    ours = shared(dist.group.WORLD)
    xs = [torch.full((1000,), float(k + ours.index)) for k in range(200)]
    waits = [ours.start_all_reduce(x, "max") for x in xs]
    for wait in reversed(waits):
        wait()
    ours.close()
    return max((x - (k + ours.size - 1)).abs().max().item() for k, x in enumerate(xs))


def without_one(how: str) -> str:
    """What ranks 0 to 2 are told where the last one hangs up, does not come, or comes with another
    tensor."""
    ours = shared(dist.group.WORLD, timeout_s=0.5 if how == "late" else None)
    x = torch.ones(10_000)
    said = ""
    if dist.get_rank() < 3:
        for _ in range(2):  # the second time at once
            begin = time.perf_counter()
            try:
                ours.all_reduce(x, "sum")
            except EngineError as error:
                said = str(error)
        assert time.perf_counter() - begin < 0.3
    elif how == "gone":
        ours.close()
    elif how == "odd":
        with contextlib.suppress(EngineError):
            ours.all_reduce(x[1:], "sum")
    dist.barrier()
    ours.close()
    return said


def falls_back(how: str) -> bool:
    """Whether all do without shared memory where one of them cannot."""

    def cannot(*args: object) -> None:
        raise OSError("not here")

    odd = dist.get_rank() == 2
    patches: dict[str, Callable[[], object]] = {
        "environment": lambda: mock.patch.dict(os.environ, AUTOPAR_SHARED_MEMORY="0"),
        "listen": lambda: mock.patch.object(peers._Meeting, "listen", cannot),
        "call": lambda: mock.patch.object(peers._Meeting, "call", cannot),
        "share": lambda: mock.patch.object(peers._Meeting, "share", cannot),
    }
    with patches[how]() if odd else mock.patch.dict(os.environ):
        return peers.meet(dist.group.WORLD, 2**20) is None


def forked_children_hang_up() -> int:
    """The exit code of one that looks whether it still holds a connection."""
    ours = shared(dist.group.WORLD)
    links = list(ours._peers._links.values())
    child = os.fork()
    if not child:
        os._exit(sum(link.fileno() >= 0 for link in links))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ours.all_reduce(torch.ones(3), "sum").tolist() == [ours.size] * 3
    ours.close()
    return code
