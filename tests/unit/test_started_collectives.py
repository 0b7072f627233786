"""Collectives that run beside compute: nothing reads what they write, or writes what they read,
before they are waited for."""

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.comm import async_collectives  # noqa: F401  (defines the operators)
from autopar.passes.copy_parts import copy_parts
from autopar.passes.fill_concatenations import fill_concatenations
from autopar.passes.overwrite import overwrite
from autopar.passes.verify import VerifyError, propagate_shapes, verify

aten, ops = torch.ops.aten, torch.ops.autopar
GROUP = "1"


def graph_of(build: Callable[[fx.Graph, fx.Node], fx.Node | tuple]) -> fx.GraphModule:
    """A graph of one argument of [6, 4]."""
    graph = fx.Graph()
    output = build(graph, graph.placeholder("x"))
    graph.output(output if isinstance(output, tuple) else (output,))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    with FakeTensorMode():
        return propagate_shapes(gm, [torch.empty(6, 4)])


def reduced(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(ops.start_all_reduce.default, (x, "sum", GROUP))


def joined(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """A view of a sum that is shown before it is waited for, in a concatenation."""
    whole = reduced(graph, graph.call_function(aten.sin.default, (x,)))
    view = graph.call_function(aten.view.default, (whole, [4, 6]))
    graph.call_function(ops.wait_in_place.default, (whole,))
    other = graph.call_function(aten.cos.default, (x,))
    flat = graph.call_function(aten.view.default, (other, [4, 6]))
    return graph.call_function(aten.cat.default, ([view, flat], 0))


def test_parts_of_concatenations_are_copied_behind_the_wait() -> None:
    gm = fill_concatenations(graph_of(joined))
    gm.graph.lint()
    assert not gm.graph.find_nodes(op="call_function", target=aten.cat.default)
    nodes = list(gm.graph.nodes)
    (wait,) = gm.graph.find_nodes(op="call_function", target=ops.wait_in_place.default)
    copies = gm.graph.find_nodes(op="call_function", target=aten.copy_.default)
    assert len(copies) == 2
    assert all(nodes.index(copy) > nodes.index(wait) for copy in copies)
    verify(gm)


def test_a_part_that_is_read_too_early_is_a_fault() -> None:
    def early(graph: fx.Graph, x: fx.Node) -> fx.Node:
        whole = reduced(graph, x)
        read = graph.call_function(aten.sin.default, (whole,))
        graph.call_function(ops.wait_in_place.default, (whole,))
        return read

    with pytest.raises(VerifyError, match="before its collective is finished"):
        verify(graph_of(early))


def test_a_part_of_what_is_still_written_stays_a_view() -> None:
    def first_rows(graph: fx.Graph, x: fx.Node) -> fx.Node:
        whole = reduced(graph, graph.call_function(aten.sin.default, (x,)))
        rows = graph.call_function(aten.slice.Tensor, (whole, 0, 0, 2))
        graph.call_function(ops.wait_in_place.default, (whole,))
        return rows

    gm = graph_of(first_rows)
    copy_parts(gm, forward=set(gm.graph.nodes))
    assert not gm.graph.find_nodes(op="call_function", target=aten.clone.default)
    verify(gm)


@pytest.mark.parametrize("waits_first", [True, False])
def test_what_is_sent_is_not_written_over_before_the_wait(waits_first: bool) -> None:
    def exchanged(graph: fx.Graph, x: fx.Node) -> tuple[fx.Node, ...]:
        row = graph.call_function(aten.sin.default, (x,))
        flat = graph.call_function(aten.view.default, (row, [24]))
        received = graph.call_function(ops.start_exchange.default, (flat, [24], [24], GROUP))
        if waits_first:
            graph.call_function(ops.wait_in_place.default, (received,))
        read = graph.call_function(aten.exp.default, (row,))
        if not waits_first:
            graph.call_function(ops.wait_in_place.default, (received,))
        return read, received

    gm = overwrite(graph_of(exchanged))
    written = gm.graph.find_nodes(op="call_function", target=aten.exp_.default)
    assert len(written) == waits_first
