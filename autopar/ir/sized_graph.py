"""One graph for inputs of many sizes, from two graphs that differ in their integers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

# What an integer is in the first and in the second of two graphs.
SizePair = tuple[int, int]


class NotAlikeError(Exception):
    """Two graphs or values differ in more than their integers."""


def merged(first: Any, second: Any, of_pair: Callable[[SizePair], Any]) -> Any:
    """The second value, with what `of_pair` gives for each integer that the first has otherwise.

    Raises:
        NotAlikeError: they differ in something else.
    """
    if type(first) is int and type(second) is int:
        return second if first == second else of_pair((first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if list(first) != list(second):
            raise NotAlikeError(f"{list(first)} and {list(second)}")
        return {k: merged(first[k], second[k], of_pair) for k in second}
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            raise NotAlikeError(f"{len(first)} and {len(second)} items")
        items = [merged(a, b, of_pair) for a, b in zip(first, second, strict=True)]
        return tuple(items) if isinstance(second, tuple) else items
    if isinstance(first, slice) and isinstance(second, slice):
        ends = [(s.start, s.stop, s.step) for s in (first, second)]
        return slice(*merged(ends[0], ends[1], of_pair))
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first is second or (first.dtype == second.dtype and torch.equal(first, second))
    else:
        same = type(first) is type(second) and bool(first == second)
    if not same:
        raise NotAlikeError(f"{first!r} and {second!r}")
    return second


@dataclass(frozen=True)
class SizedGraph:
    """A graph whose last inputs are sizes.

    Args:
        sizes: of which pairs, in the order of those inputs.
    """

    gm: fx.GraphModule
    sizes: tuple[SizePair, ...]

    @staticmethod
    def of(first: fx.GraphModule, second: fx.GraphModule) -> SizedGraph:
        """The second graph, with an input for each integer that the first has otherwise.

        Raises:
            NotAlikeError: they differ in something else.
        """
        graph, copies = fx.Graph(), {}
        sizes: dict[SizePair, fx.Node] = {}
        nodes, others = list(second.graph.nodes), list(first.graph.nodes)
        if len(nodes) != len(others):
            raise NotAlikeError(f"{len(others)} and {len(nodes)} operators")
        position = {node: k for k, node in enumerate(others)}
        position |= {node: k for k, node in enumerate(nodes)}
        inputs: list[fx.Node] = []  # in the order of the graph, sizes last

        def size(pair: SizePair) -> fx.Node:
            if pair not in sizes:
                with graph.inserting_before() if not inputs else graph.inserting_after(inputs[-1]):
                    sizes[pair] = graph.placeholder(f"size_{len(sizes)}")
                inputs.append(sizes[pair])
            return sizes[pair]

        for node, other in zip(nodes, others, strict=True):
            _check_target(first, other, second, node)
            if node.op == "placeholder":
                copies[node] = graph.node_copy(node)
                inputs.append(copies[node])
                continue
            arguments = merged(_numbered(other, position), _numbered(node, position), size)
            args, kwargs = _with_nodes(arguments, [copies.get(n) for n in nodes])
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
            copies[node].meta = dict(node.meta)
        return SizedGraph(fx.GraphModule(second, graph), tuple(sizes))

    def at(self, sizes: Mapping[SizePair, int]) -> fx.GraphModule:
        """The graph for given sizes, which are no inputs then."""
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {}
        inputs = self.gm.graph.find_nodes(op="placeholder")
        values = dict(zip(inputs[len(inputs) - len(self.sizes) :], self.sizes, strict=True))
        for node in self.gm.graph.nodes:
            copies[node] = (
                sizes[values[node]] if node in values else graph.node_copy(node, copies.__getitem__)
            )
        return fx.GraphModule(self.gm, graph)


@dataclass(frozen=True)
class _Operand:
    """A node among arguments, by its position in the graph."""

    position: int


def _numbered(node: fx.Node, position: Mapping[fx.Node, int]) -> Any:
    """A node's arguments, with operands in the place of nodes."""
    number: Any = lambda n: _Operand(position[n])  # noqa: E731
    return fx.map_arg((node.args, dict(node.kwargs)), number)


def _with_nodes(arguments: Any, nodes: list[Any]) -> Any:
    """Arguments with nodes in the place of operands."""
    if isinstance(arguments, _Operand):
        return nodes[arguments.position]
    if isinstance(arguments, Mapping):
        return {k: _with_nodes(v, nodes) for k, v in arguments.items()}
    if isinstance(arguments, list | tuple):
        items = [_with_nodes(v, nodes) for v in arguments]
        return tuple(items) if isinstance(arguments, tuple) else items
    if isinstance(arguments, slice):
        return slice(*_with_nodes((arguments.start, arguments.stop, arguments.step), nodes))
    return arguments


def _check_target(
    first: fx.GraphModule, other: fx.Node, second: fx.GraphModule, node: fx.Node
) -> None:
    """Refuse two nodes that call different operators, or read different constants."""
    if node.op != other.op:
        raise NotAlikeError(f"{other.op} and {node.op}")
    if node.op == "get_attr":
        values = (_attribute(gm, str(n.target)) for gm, n in ((first, other), (second, node)))
        merged(next(values), next(values), _no_sizes)
    elif node.op != "placeholder" and node.target is not other.target != node.target:
        raise NotAlikeError(f"{other.target} and {node.target}")


def _no_sizes(pair: SizePair) -> Any:
    raise NotAlikeError(f"{pair[0]} and {pair[1]}")


def _attribute(root: Any, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name)
    return root
