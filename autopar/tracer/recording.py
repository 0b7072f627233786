"""What the run of a block captured, and which of the attributes that differ between blocks it read.

Reads inside of a module that has such attributes of its own (the rate of a stochastic depth, say)
are the business of that module: it is a `Part`, which copies of the block may run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_slot
from torch.utils import _pytree as pytree

from autopar.ir.guards import storage_of
from autopar.tracer.blocks import PLAIN, Attribute, Block
from autopar.tracer.branches import current_tracer


class NotAlike(Exception):
    """What was recorded cannot stand for another run."""


@dataclass(frozen=True)
class Part:
    """A module inside of a block that read attributes that are not the same in all blocks.

    Args:
        path: of the module.
        before: the last node before it ran.
        nodes: what it captured.
        given: its arguments, leaf by leaf: nodes and plain values.
        spec: of the arguments (args, kwargs).
        results: leaf by leaf.
        reads: what it read.
    """

    path: str
    before: fx.Node
    nodes: list[fx.Node]
    given: list[Any]
    spec: pytree.TreeSpec
    results: list[Any]
    reads: set[Attribute]


@dataclass
class Record:
    """One run of a block.

    Args:
        block: which ran.
        before: the last node before it ran.
        nodes: what it captured.
        given: the node of every tensor argument, and of every tensor of the block's own.
        then: the node of every tensor of its own afterwards: another, where the run wrote into it.
        results: per result ("node", its node), ("given", position) or ("plain", value).
        carrying: nodes of results that require grad.
        spec: of the results.
        stack: the tracer's modules where it ran.
        reads: watched attributes that it read outside of its parts.
        parts: those that read others, in order.
    """

    block: Block
    before: fx.Node
    nodes: list[fx.Node]
    given: list[fx.Node]
    then: list[fx.Node]
    results: list[tuple[str, Any]]
    carrying: list[fx.Node]
    spec: pytree.TreeSpec
    stack: dict[str, Any]
    reads: set[Attribute]
    parts: list[Part]

    @cached_property
    def apart(self) -> set[int | None]:
        """Storages that the block shares with others or writes into; each copy has its own. The
        rest are seen inside only, where the same tensors may describe the nodes of all copies."""
        handed = [x for p in self.parts for x in (*p.given, *p.results, *p.nodes)]
        handed += [*self.given, *self.then, *(x for _, x in self.results)]
        written = [x for n in self.nodes for x in _written(n)]
        return {storage_of(x) for x in (*handed, *written) if isinstance(x, fx.Node)}

    def stands_for(self, block: Block) -> bool:
        """Whether what was read is the same in another block, but for what its parts read."""
        return self.block.alike(block, self.reads)

    def steps(self) -> Iterator[fx.Node | Part]:
        """Its nodes, and its parts in the place of theirs."""
        parts = list(self.parts)
        inside = {node for part in parts for node in part.nodes}
        for node in (self.before, *self.nodes):
            if node is not self.before and node not in inside:
                yield node
            while parts and parts[0].before is node:
                yield parts.pop(0)


@dataclass
class _Level:
    """What was read since a part of the block began, outside of parts inside of it."""

    reads: set[Attribute] = field(default_factory=set)
    parts: list[Part] = field(default_factory=list)


class Recorder:
    """Records blocks; one at a time."""

    def __init__(self) -> None:
        self._block: Block | None = None
        self._levels: list[_Level] = []
        self._modes: Any = None
        self._watched: set[int] = set()

    @property
    def busy(self) -> bool:
        """Whether a block is being recorded."""
        return self._block is not None

    def record(
        self,
        block: Block,
        leaves: Sequence[torch.Tensor],
        run: Callable[[], Any],
        asked: Callable[[], int],
    ) -> tuple[Any, Record | None]:
        """Run a block; None for a record if the run can stand for no other.

        Args:
            leaves: the tensors among the arguments.
            asked: how many questions about values there were so far.
        """
        before, questions, state = last_node(), asked(), block.state()
        given = [node_of(t) for t in (*leaves, *block.tensors())]
        self._block, self._levels, self._modes = block, [level := _Level()], modes()
        try:
            result = run()
        finally:
            self._block, self._levels = None, []
        if asked() != questions or block.state() != state:
            return result, None
        nodes = nodes_after(before)
        try:
            then = [node_of(t) for t in block.tensors()]
            _check(nodes, given[: len(leaves)], given[len(leaves) :])
            flat, spec = pytree.tree_flatten(result)
            inside = set(nodes)
            results = [_result(x, inside, given) for x in flat]
        except NotAlike:
            return result, None
        kinds = zip(results, flat, strict=True)
        carrying = [node for (what, node), x in kinds if what == "node" and x.requires_grad]
        return result, Record(
            block, before, nodes, given, then, results, carrying, spec,
            dict(current_tracer().module_stack), level.reads, level.parts,
        )  # fmt: skip

    # -- attributes -----------------------------------------------------------------------------

    def watch(self, block: Block) -> None:
        """Note when attributes that differ between blocks are read, and in which part."""
        by_path: dict[str, list[str]] = {}
        for path, name in block.watched:
            by_path.setdefault(path, []).append(name)
        for path, names in by_path.items():
            part = block.parts[path]
            properties: dict[str, Any] = {n: self._property(n) for n in names}
            kind = type(part)
            watched = type(kind.__name__, (_Watched, kind), properties)
            watched.__module__, watched.__qualname__ = kind.__module__, kind.__qualname__
            part.__class__ = watched
            if path and id(part) not in self._watched:
                self._watched.add(id(part))
                part.forward = self._forward(part, part.forward)

    def _property(self, name: str) -> property:
        def read(module: torch.nn.Module) -> Any:
            if self._block is not None:
                path = self._block.paths.get(id(module))
                if path is not None:  # one attribute of another's is the same for all
                    self._levels[-1].reads.add((path, name))
            try:
                return module.__dict__[name]
            except KeyError:
                raise AttributeError(name) from None

        def write(module: torch.nn.Module, value: Any) -> None:
            module.__dict__[name] = value

        def delete(module: torch.nn.Module) -> None:
            del module.__dict__[name]

        return property(read, write, delete)

    def _forward(self, part: torch.nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            path = None if self._block is None else self._block.paths.get(id(part))
            if not path:
                return run(*args, **kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            before, given = last_node(), entries(leaves)
            alike = modes() == self._modes
            self._levels.append(level := _Level())
            try:
                result = run(*args, **kwargs)
            finally:
                self._levels.pop()
            results = entries(pytree.tree_leaves(result))
            outer, reads = self._levels[-1], level.reads.union(*(p.reads for p in level.parts))
            if level.reads and given is not None and results is not None and alike:
                nodes = nodes_after(before)
                outer.parts.append(Part(path, before, nodes, given, spec, results, reads))
            else:
                outer.reads |= level.reads
                outer.parts += level.parts
            return result

        return forward


class _Watched:
    """Of a class made for watching; keeps what the user's class does to its subclasses away."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


# -- nodes --------------------------------------------------------------------------------------


def node_of(t: Any) -> fx.Node:
    """The node that a captured tensor is the value of."""
    slot = get_proxy_slot(t, current_tracer(), None) if isinstance(t, FakeTensor) else None
    if slot is None:
        raise NotAlike
    node: fx.Node = slot.proxy.node
    return node


def last_node() -> fx.Node:
    """Of the graph being captured, so far."""
    return next(iter(reversed(current_tracer().graph.nodes)))


def nodes_after(before: fx.Node) -> list[fx.Node]:
    """What was captured since."""
    nodes: list[fx.Node] = []
    while (node := before.next if not nodes else nodes[-1].next).op != "root":
        nodes.append(node)
    return nodes


def modes() -> tuple[bool, bool]:
    """What decides how operators are captured, besides their arguments."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def entries(leaves: Sequence[Any]) -> list[Any] | None:
    """Tensors by their nodes, plain values as they are; None if something is neither."""
    found: list[Any] = []
    for x in leaves:
        if isinstance(x, torch.Tensor):
            with contextlib.suppress(NotAlike):
                found.append(node_of(x))
                continue
            return None
        if not isinstance(x, PLAIN):
            return None
        found.append(x)
    return found


def _check(nodes: Sequence[fx.Node], args: Sequence[fx.Node], own: Sequence[fx.Node]) -> None:
    """Raises where nodes depend on more than arguments and tensors of the block's own, or write
    into arguments."""
    inside = {*nodes}
    outside = set(map(storage_of, args))
    known = inside | {*args} | {*own}
    for node in nodes:
        if node.op != "call_function" or "custom" in node.meta:
            raise NotAlike
        if not known.issuperset(node.all_input_nodes):
            raise NotAlike
        for t in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(t, torch.Tensor):
                if not isinstance(t, FakeTensor) or not torch._C._has_storage(t):
                    raise NotAlike
            elif isinstance(t, torch.SymInt | torch.SymFloat | torch.SymBool):
                raise NotAlike
        if not outside.isdisjoint(map(storage_of, _written(node))):
            raise NotAlike


def _written(node: fx.Node) -> list[fx.Node]:
    """Arguments that an operator writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = zip(schema.arguments, node.args, strict=False)
    return [x for argument, x in given if argument.is_write and isinstance(x, fx.Node)]


def _result(x: Any, inside: set[fx.Node], given: Sequence[fx.Node]) -> tuple[str, Any]:
    if isinstance(x, torch.Tensor):
        node = node_of(x)
        with contextlib.suppress(ValueError):
            return "given", given.index(node)
        if node in inside:
            return "node", node
    elif isinstance(x, PLAIN):
        return "plain", x
    raise NotAlike
