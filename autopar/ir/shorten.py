"""A model's graph without most of the copies of a repeated block."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from autopar.ir.graph import ModelGraph
from autopar.ir.repeats import INDEX, by_position, number_in

_FEWEST = 6  # equal copies, of which four stay


@dataclass(frozen=True)
class ShortGraph:
    """A graph with a gap in a list of blocks.

    Args:
        blocks: the name of the list, with its dot.
        before, after: numbers of the copies around the gap. The missing ones, and one more copy on
            either side, are like them.
        twins: by placeholder of the missing copies, that of the copy after the gap.
    """

    graph: ModelGraph
    blocks: str
    before: int
    after: int
    twins: Mapping[str, str]


def shortened(graph: ModelGraph, keys: Mapping[fx.Node, Hashable]) -> ShortGraph | None:
    """The graph with four of the copies of its longest list of equal blocks; None if no list has
    six equal copies in a row, or if something outside reads what is in them.

    Args:
        keys: of nodes; copies are equal if their nodes' keys are.
    """
    copies, blocks = _longest_list(graph)
    if len(copies) < _FEWEST:
        return None
    of = {node: number for number, nodes in copies.items() for node in nodes}
    first, last = _longest_run({n: list(_described(n, copies, of, keys)) for n in copies})
    if last - first + 1 < _FEWEST:
        return None
    before, after = first + 1, last - 1
    dropped = {node for number in range(before + 1, after) for node in copies[number]}
    across = dict(zip(copies[after - 1], copies[before], strict=True))
    new, twins = fx.Graph(), {}
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in dropped:
            continue
        sources = across if of.get(node) == after else {}
        read = {n: sources.get(n, n) for n in node.all_input_nodes}
        if not dropped.isdisjoint(read.values()):
            return None
        operands = {n: values[source] for n, source in read.items()}
        values[node] = new.node_copy(node, operands.__getitem__)
    for number in range(before + 1, after):
        for node, twin in zip(copies[number], copies[after], strict=True):
            if node.op == "placeholder":
                twins[str(node.target)] = str(twin.target)
    short = replace(
        graph,
        gm=fx.GraphModule(graph.gm, new),
        parameters={k: name for k, name in graph.parameters.items() if k not in twins},
        buffers={k: name for k, name in graph.buffers.items() if k not in twins},
    )
    return ShortGraph(short, blocks, before, after, twins)


def _longest_list(graph: ModelGraph) -> tuple[dict[int, list[fx.Node]], str]:
    """The nodes of every copy, in order, by the copy's number; and the name of their list."""
    owned = {**graph.parameters, **graph.buffers}
    names = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names.append(owned.get(str(node.target), ""))
        else:
            names.append(graph.info(node).module if "autopar" in node.meta else "")
    lists: dict[str, set[str]] = {}
    for name in names:
        for index in INDEX.finditer(name):
            lists.setdefault(name[: index.start()], set()).add(index[0])
    blocks = max(lists, key=lambda name: (len(lists[name]), -len(name)), default="")
    copies: dict[int, list[fx.Node]] = {}
    of_tensors = [node.op == "placeholder" for node in graph.nodes]
    for tensors in (True, False):
        chosen = [k for k, is_tensor in enumerate(of_tensors) if is_tensor == tensors]
        numbers = [number_in(blocks, names[k]) for k in chosen]
        numbers = numbers if tensors else by_position(numbers)
        for k, number in zip(chosen, numbers, strict=True):
            if number is not None and graph.nodes[k].op != "output":
                copies.setdefault(number, []).append(graph.nodes[k])
    return copies, blocks


def _longest_run(described: Mapping[int, Sequence[Any]]) -> tuple[int, int]:
    """The first and the last number of the longest row of equal copies."""
    best = first = min(described)
    longest = 1
    for number, following in pairwise(sorted(described)):
        if following != number + 1 or described[number] != described[following]:
            first = following
        elif following - first + 1 > longest:
            best, longest = first, following - first + 1
    return best, best + longest - 1


def _described(
    number: int, copies: Mapping[int, list[fx.Node]], of: Mapping[fx.Node, int],
    keys: Mapping[fx.Node, Hashable],
) -> Iterator[Any]:  # fmt: skip
    """What a copy does: equal for copies that read the same values, values of their own in the same
    places, or values of the copy before them."""
    places = {node: k for n in (number - 1, number) for k, node in enumerate(copies.get(n, ()))}

    def place(node: fx.Node) -> Any:
        if node not in places:
            return node.name
        return number - of[node], places[node]

    for node in copies[number]:
        tensors = [
            (tuple(t.shape), t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t
            for t in pytree.tree_leaves(node.meta.get("val"))
        ]
        target = "" if node.op == "placeholder" else node.target
        yield (
            node.op,
            target,
            fx.node.map_arg((node.args, node.kwargs), place),
            tensors,
            keys.get(node),
        )
