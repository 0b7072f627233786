"""Split collectives: what they compute, and where a schedule places them."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import autopar.comm.collectives  # noqa: F401, registers the operators
from autopar.comm import world as world_of_engines
from autopar.comm.groups import find_group, register_mesh
from autopar.ir.spec import chunk
from autopar.schedule.budget import plan_memory
from autopar.schedule.build import schedule_of
from autopar.schedule.order import in_order
from autopar.schedule.prefetch import prefetched
from autopar.schedule.program import SIDE, Op, Program, Resource, Schedule, Split, eager_schedule
from autopar.schedule.simulate import check, peak_bytes, timeline
from autopar.schedule.splits import SPLITS, halves_of
from autopar.schedule.streams import step_us
from tests.lockstep import Lockstep

GATHER, REDUCE = "autopar.all_gather.default", "autopar.reduce_scatter.default"
BLOCKS = 3


def step(*, staged: bool = False, chained: bool = False) -> Program:
    """Blocks that gather their parameter, in forward as in backward, and reduce its gradient.

    Bytes: a parameter 40, an activation 10. Times: a gather 10, a reduction 10; compute 10 to 20.

    Args:
        staged: gathers have a buffer of their own.
        chained: a parameter is gathered twice, and copied in between.
    """
    ops: list[Op] = []
    nbytes: list[int] = []
    collectives: list[int] = []

    def storage(n: int) -> int:
        nbytes.append(n)
        return len(nbytes) - 1

    def op(kind: str, reads: tuple, n: int, us: float, resource=Resource.COMPUTE) -> int:
        ops.append(Op(f"{kind}{len(ops)}", kind, reads, (storage(n),), 1.0, us, resource=resource))
        if resource is not Resource.COMPUTE:
            collectives.append(len(ops) - 1)
        return ops[-1].makes[0]

    shards = [storage(0) for _ in range(BLOCKS)]
    forward_ops: list[int] = []
    gathered, activations, x = [], [], storage(0)
    for shard in shards:
        if chained:
            shard = op("copy", (op(GATHER, (shard,), 5, 3, Resource.COMMUNICATION),), 5, 1)
        gathered.append(op(GATHER, (shard,), 40, 10, Resource.COMMUNICATION))
        x = op("norm", (x,), 10, 10)
        x = op("product", (x, gathered[-1]), 10, 10)
        activations.append(x)
    forward_ops = list(range(len(ops)))
    grad, gradients = tangent, [] = storage(0), []
    for weight, activation in zip(reversed(gathered), reversed(activations), strict=True):
        of_weight = op("product", (grad, activation), 40, 20)
        grad = op("product", (grad, weight), 10, 20)
        gradients.append(op(REDUCE, (of_weight,), 5, 10, Resource.COMMUNICATION))
    splits = {}
    order = tuple(range(len(forward_ops), len(ops)))
    for i in collectives:
        collective = ops[i]
        own = staged or collective.kind == REDUCE
        buffer = storage(40) if own else collective.makes[0]
        splits[i] = Split(len(ops), len(ops) + 1)
        ops.append(replace(collective, name=f"start{i}", makes=(buffer,), beside=True))
        makes = collective.makes if own else ()
        ops.append(Op(f"finish{i}", "finish", (buffer,), makes, 0.0, 0.0, replays=False))
    return Program(
        tuple(ops), tuple(forward_ops), tuple(nbytes), frozenset(), frozenset(gradients),
        frozenset((tangent,)), order=order, splits=splits,
    )  # fmt: skip


def resharded(program: Program) -> Schedule:
    """Every block gathers its parameter right before it is used in the backward."""
    gathered = {s for i in program.forward for s in program.ops[i].makes if i in program.splits}
    return schedule_of(program, program.needed - gathered)


def computed(program: Program, schedule: Schedule) -> dict[int, Any]:
    """What every gradient is computed from; nothing is read while it is in flight."""
    values: dict[int, Any] = {}
    in_flight: dict[int, Any] = {}
    for i in (*schedule.forward, *schedule.backward):
        op, collective = program.ops[i], program.started.get(i, program.halves.get(i, i))
        finishes = i in program.halves and i not in program.started
        assert finishes or in_flight.keys().isdisjoint(op.reads)
        assert in_flight.keys().isdisjoint(op.makes)
        value = (
            in_flight.pop(op.reads[0])
            if finishes
            else (collective, *(values.get(s, s) for s in op.reads))
        )
        if i in program.started:
            in_flight[op.makes[0]] = value
        else:
            values |= dict.fromkeys(program.ops[collective].makes, value)
    assert not in_flight
    return {s: values[s] for s in program.gradients}


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("chained", [False, True])
def test_gathers_start_ahead_in_both_directions_where_there_is_room(staged, chained):
    program = step(staged=staged, chained=chained)
    schedule = resharded(program)
    split = prefetched(program, schedule, 1e9)
    check(program, split)
    assert computed(program, split) == computed(program, schedule)
    names = [[program.ops[i].name for i in part] for part in (split.forward, split.backward)]
    for part, count in zip(names, (BLOCKS - 1, BLOCKS), strict=True):
        starts = [n for n in part if n.startswith("start") and f"finish{n[5:]}" in part]
        far = [n for n in starts if part.index(f"finish{n[5:]}") > part.index(n) + 1]
        assert len(far) >= count  # nothing is ahead of the first one in the forward
    # hidden is all but the first gather, and the last reduction, which nothing follows; and one
    # of the two gathers in a chain, if the backward has one operator ahead of them
    first, second = (13, 3) if chained else (10, 0)
    assert timeline(program, split).waited_us[Resource.COMMUNICATION] == first + second + 10
    assert step_us(program, split) == step_us(program, schedule) - 5 * first + second - 2 * 10
    # the same communication in the same order
    calls = [program.started.get(i, i) for i in (*split.forward, *split.backward)]
    of = [i for i in calls if i in program.splits]
    assert [i for i in of if program.ops[i].kind == REDUCE] == [
        i for i in schedule.backward if program.ops[i].kind == REDUCE
    ]


def test_no_further_than_the_budget():
    program = step(chained=True)
    schedule = resharded(program)
    least = peak_bytes(program, schedule)
    assert prefetched(program, schedule, least - 1) == schedule
    times = [step_us(program, schedule)]
    for budget in range(least, least + 100, 10):
        split = prefetched(program, schedule, budget)
        check(program, split)
        assert computed(program, split) == computed(program, schedule)
        assert peak_bytes(program, split) <= budget
        times.append(step_us(program, split))
    assert times == sorted(times, reverse=True) and times[-1] < times[0]
    blocking = replace(program, beside=frozenset())
    assert prefetched(blocking, schedule, 1e9) == schedule


def test_hidden_gathers_are_repeated_at_no_cost():
    """Kept parameters do not fit; re-gathers cost nothing if compute hides them."""
    program = step()
    kept = peak_bytes(program, eager_schedule(in_order(program)))
    beside, blocking = (
        plan_memory(replace(program, beside=resources), kept - 30)
        for resources in (SIDE, frozenset())
    )
    for plan in (beside, blocking):
        assert plan.peak_bytes <= kept - 30 and plan.schedule.recomputed(program)
    assert beside.added_us == beside.exposed_us == 0 and blocking.added_us > 0


def in_two(whole: Any, arguments: tuple) -> Any:
    """A collective as a start and a finish, as in a graph."""
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        value = whole(*fakes)
    graph = torch.fx.Graph()

    def placeholder(fake: torch.Tensor) -> torch.fx.Node:
        node = graph.placeholder("x")
        node.meta["val"] = fake
        return node

    nodes = pytree.tree_map_only(torch.Tensor, placeholder, fakes)
    node = graph.call_function(whole, nodes)
    node.meta["val"] = value
    target, finish = halves_of(node)
    buffer = target(*arguments)
    if finish is None:
        torch.ops.autopar.wait_in_place(buffer)
        return buffer
    return finish[0](buffer, *finish[1])


def call(kind: str, x: torch.Tensor, dim: int, size: int, group: str) -> tuple[Any, tuple]:
    """A collective and arguments for it; `size` is the global extent of the dim."""
    many = kind.endswith("many")
    dims = ([dim] * 2, [size] * 2) if many else (dim, size)
    rest = dims if "gather" in kind else dims[:1] if "scatter" in kind else ("sum",)
    whole = getattr(torch.ops.autopar, kind).default
    if kind == "exchange":  # everything to the next rank
        of = find_group(group)
        sent, received = ([0] * of.size for _ in range(2))
        sent[(of.index + 1) % of.size] = received[(of.index - 1) % of.size] = x.numel()
        return whole, (x.flatten(), sent, received, group)
    return whole, ([x, x + 1] if many else x, *rest, group)


KINDS = sorted({target._opname for target in SPLITS})


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_two_operators_are_the_collective(kind, size):
    """To the bit, on three ranks, along every dim, evenly split or not."""
    world = Lockstep((3,))
    for dim in (0, 1):
        calls = []
        for (rank,), (name,) in world.names.items():
            torch.manual_seed(rank)
            shape = [4, 5]
            shape[dim] = chunk(size, 3, rank)[1] if "gather" in kind else size
            x = torch.randn(shape, dtype=torch.float64)
            calls.append(call(kind, x, dim, size, name))
        expected = world.run([partial(whole, *arguments) for whole, arguments in calls])
        results = world.run([partial(in_two, *each) for each in calls])
        for actual, reference in zip(results, expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=pytest.mark.gpu)],
)
def test_two_operators_on_a_process_group(device, backend):
    """Of one rank, which is all that a machine with one GPU has."""
    world_of_engines.stop()  # of an engine of another test
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        (name,) = register_mesh((1,), (0,), [dist.group.WORLD.group_name], "unused")
        for kind in KINDS:
            for dim in (0, 1):
                x = torch.randn(300, 500, device=device)
                whole, arguments = call(kind, x, dim, x.shape[dim], name)
                expected = whole(*arguments)
                torch.testing.assert_close(in_two(whole, arguments), expected, rtol=0, atol=0)
    finally:
        dist.destroy_process_group()
