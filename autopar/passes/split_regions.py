"""Writes regions of a program as slices: copies of their operators, one slice after another.

What slices take is cut from whole values, what they give is put together: slices of results are
concatenated, sums are added up as they come. The copies are ordinary operators, so that autograd,
the memory schedule and its simulation see the smaller values.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.errors import PlanError
from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import ModelGraph, NodeInfo, producer
from autopar.passes.regions import PIECES, Growth, Region, as_model_graph, separate_region
from autopar.passes.separable_form import separable_form
from autopar.passes.slice_graph import slice_graph
from autopar.passes.split_loss import SplitLoss, Taken
from autopar.passes.time_split import State, dim_of, even_sizes
from autopar.passes.verify import propagate_shapes
from autopar.plan_records import TimeSplit

aten = torch.ops.aten

# Marks operators that belong to a slice.
IN_SLICES = "autopar_in_slices"


def splittable(gm: fx.GraphModule, arguments: Sequence[torch.Tensor]) -> fx.GraphModule:
    """A copy of a program that regions are looked for in: with shapes, and means over targets as
    sums and counts.

    Args:
        arguments: tensors that it is called with; only their metadata is used.
    """
    graph = as_model_graph(with_shapes(gm, arguments))
    return separable_form(graph, graph.inputs).gm  # type: ignore[arg-type]


def with_shapes(gm: fx.GraphModule, arguments: Sequence[torch.Tensor]) -> fx.GraphModule:
    """A copy of a program whose nodes have fake tensors for values.

    Args:
        arguments: tensors that it is called with; only their metadata is used.
    """
    with FakeTensorMode():
        fakes = [
            torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)
            .requires_grad_(t.requires_grad)
            for t in arguments
        ]  # fmt: skip
        return propagate_shapes(copy_of(gm), fakes)


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a program with a graph of its own."""
    return fx.GraphModule(gm, copied(gm.graph))


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy, with the same values."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    new.output(new.graph_copy(graph, copies))
    for old, node in copies.items():
        node.meta = dict(old.meta)
    return new


def split_regions(
    gm: fx.GraphModule, arguments: Sequence[torch.Tensor], splits: Sequence[TimeSplit]
) -> fx.GraphModule:
    """The program with its regions in slices.

    Args:
        arguments: tensors that it is called with; only their metadata is used.

    Raises:
        PlanError: the program has no such region.
    """
    if not splits:
        return gm
    gm = splittable(gm, arguments)
    for split in splits:
        split_region(gm, region_of(gm, split), split)
    gm.recompile()
    return gm


def calls_in_order(gm: fx.GraphModule) -> list[fx.Node]:
    """Nodes between placeholders and output."""
    return [n for n in gm.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]


def region_of(gm: fx.GraphModule, split: TimeSplit) -> Region:
    """The region that a plan splits. It may come in fewer pieces than on the first rank, whose
    shards are the largest.

    Raises:
        PlanError: the program has no such region.
    """
    order = calls_in_order(gm)
    number = {node.name: k for k, node in enumerate(order)}
    if split.first in number and split.last in number:
        start, end = number[split.first], number[split.last]
        value = tensors_of(order[start].meta["val"])[0]
        extent = int(value.shape[split.dim]) if split.dim < value.ndim else 0
        for pieces in dict.fromkeys((split.pieces, extent, *PIECES)):
            if pieces < max(1, split.slices) or extent % pieces:
                continue
            growth = Growth(as_model_graph(gm), order, start, split.dim, pieces)
            while growth.began and growth.end < end and growth.advance():
                pass
            region = growth.region() if growth.began and growth.end == end else None
            if region is not None:
                return region
    raise PlanError(
        f"the plan splits {split.first} to {split.last} over time, and the program has no such "
        "region; make the plan again with this version of the model and of autopar"
    )


def split_region(gm: fx.GraphModule, region: Region, split: TimeSplit) -> None:
    """Write a region of a program in slices, in place."""
    separation, entries = separate_region(region)
    sizes = even_sizes(region.pieces, split.slices)
    parts = {size: slice_graph(separation, size) for size in dict.fromkeys(sizes)}
    given = [n for n in region.nodes if _is_given(n, region)]
    outputs: Any = separation.graph.output.args[0]
    states = [separation.state(x) for x in outputs]
    entered = dict(zip(separation.graph.placeholders.values(), entries, strict=True))
    writer = _Writer(
        gm.graph, entries, [entered[node] for (node, _), _ in separation.whole],
        [state for _, state in separation.whole], region.nodes[0].meta["autopar"],
    )  # fmt: skip
    with gm.graph.inserting_before(region.nodes[-1].next):
        if split.at_once:
            if states != ["P"] or given[0].meta["val"].ndim:
                raise PlanError(f"{split.last} is no sum over slices: no backward of it at once")
            results = _at_once(gm, writer, [parts[size] for size in sizes], sizes)
        else:
            results = writer.write([parts[size] for size in sizes], sizes, states, given)
    for node, new in zip(given, results, strict=True):
        node.replace_all_uses_with(new)
    for node in reversed(region.nodes):
        if node not in region.before:
            gm.graph.erase_node(node)


def _is_given(node: fx.Node, region: Region) -> bool:
    single = isinstance(node.meta["val"], torch.Tensor)
    return single and node not in region.before and producer(node) in region.given


@dataclass
class _Writer:
    """Writes the slices of a region.

    Args:
        entries: values from before that every slice takes whole, in the order of its graph.
        values, states: what slices take behind these: slices of them, or the whole again.
        info: origin of what belongs to no operator of the region.
    """

    graph: fx.Graph
    entries: Sequence[fx.Node]
    values: Sequence[fx.Node]
    states: Sequence[State]
    info: NodeInfo

    def lengths(self, node: fx.Node, dim: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """Of the slices of a value."""
        rows = node.meta["val"].shape[dim] // sum(sizes)
        return tuple(size * rows for size in sizes)

    def cut(self, sizes: Sequence[int]) -> list[list[fx.Node]]:
        """The slices of values that slices take: by value, then by slice."""
        cut: list[list[fx.Node]] = []
        for node, state in zip(self.values, self.states, strict=True):
            if state == "R":
                cut.append([node] * len(sizes))
                continue
            dim = dim_of(state)
            lengths: Any = list(self.lengths(node, dim, sizes))
            all_ = self.call(node, aten.split_with_sizes.default, node, lengths, dim)
            cut.append([self.call(node, operator.getitem, all_, k) for k, _ in enumerate(lengths)])
        return cut

    def write(
        self, parts: Sequence[ModelGraph], sizes: Sequence[int], states: Sequence[State],
        like: Sequence[fx.Node],
    ) -> list[fx.Node]:  # fmt: skip
        """All slices, and what they give together.

        Args:
            states, like: of the results.
        """
        cut = self.cut(sizes)
        made: list[list[fx.Node]] = [[] for _ in states]
        for number, part in enumerate(parts):
            taken = [*self.entries, *(slices[number] for slices in cut)]
            outputs = self.copy(part, taken)
            for k, (x, state) in enumerate(zip(outputs, states, strict=True)):
                made[k].append(self.wide(x) if state == "P" else x)
                if state == "P" and len(made[k]) > 1:
                    made[k] = [self.call(like[k], aten.add.Tensor, *made[k])]
        results = []
        for xs, state, node in zip(made, states, like, strict=True):
            if state == "P":
                (total,) = xs
                dtype = node.meta["val"].dtype
                if total.meta["val"].dtype != dtype:
                    total = self.call(node, aten._to_copy.default, total, dtype=dtype)
                results.append(total)
            else:
                results.append(self.call(node, aten.cat.default, xs, dim_of(state)))
        return results

    def wide(self, x: fx.Node) -> fx.Node:
        """A term of a sum, in float32 if it is of 2 bytes."""
        if x.meta["val"].dtype.itemsize != 2:
            return x
        return self.call(x, aten._to_copy.default, x, dtype=torch.float32)

    def copy(self, part: ModelGraph, taken: Sequence[fx.Node]) -> list[fx.Node]:
        """The operators of a slice."""
        placeholders = [n for n in part.nodes if n.op == "placeholder"]
        env = dict(zip(placeholders, taken, strict=True))
        for node in part.nodes:
            if node.op == "call_function":
                new = env[node] = self.graph.node_copy(node, env.__getitem__)
                new.meta = {k: v for k, v in node.meta.items() if k != "autopar_rule"}
                new.meta[IN_SLICES] = True
        outputs: Any = part.output.args[0]
        return [env[x] for x in outputs]

    def call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the place of a part of a node."""
        node = self.graph.call_function(target, args, kwargs)
        values: Any = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        if target is operator.getitem:
            node.meta["val"] = values[0][0][values[0][1]]
        else:
            with torch.no_grad():
                node.meta["val"] = target(*values[0], **values[1])
        node.meta["autopar"] = like.meta.get("autopar", self.info)
        return node


def _at_once(
    gm: fx.GraphModule, writer: _Writer, parts: Sequence[ModelGraph], sizes: Sequence[int]
) -> list[fx.Node]:  # fmt: skip
    """A call of the slices of a loss, forward and backward."""
    flat = list(dict.fromkeys((*writer.entries, *writer.values)))
    number = {x: k for k, x in enumerate(flat)}
    taken = [Taken(number[x]) for x in writer.entries]
    for x, state in zip(writer.values, writer.states, strict=True):
        dim = None if state == "R" else dim_of(state)
        lengths = () if dim is None else writer.lengths(x, dim, sizes)
        taken.append(Taken(number[x], dim, lengths))
    name = next(f"split_loss_{k}" for k in range(10**6) if not hasattr(gm, f"split_loss_{k}"))
    gm.add_module(name, SplitLoss([part.gm for part in parts], taken))
    node = gm.graph.call_module(name, tuple(flat))
    results: Any = parts[0].output.args[0]
    node.meta = {"val": results[0].meta["val"], "autopar": writer.info, IN_SLICES: True}
    return [node]
