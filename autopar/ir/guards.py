"""Guards: the assumptions of a captured graph about values, and how they are checked.

If a branch of the user's Python depends on tensor values, the graph contains one side of it. Each
such decision is a `Guard` of one of these kinds:

* ``input``: computed from inputs and buffers alone. `holds` computes the value on another batch
  with the model's own operators. If it differs, the graph does not apply to that batch.
* ``random``: decided by a random draw (layer drop). The graph contains the likelier side and no
  longer draws.
* ``check``: a check on activations that only raises or replaces infinities; assumed to pass.
* ``assumed``: decided by `ColoTracer(assume=...)`.
* ``setting``: a library's setting that the capture changed without changing the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
import torch.fx as fx

from autopar.ir.randomness import draws

Kind = Literal["input", "random", "check", "assumed", "setting"]
T = TypeVar("T")


@dataclass(frozen=True)
class Guard:
    """One assumption of a graph.

    Args:
        kind: see the module's text.
        source: `file:line` in the user's code.
        text: that line.
        value: what the expression was captured as.
        note: the consequence for training, one sentence.
        sources: arguments of an ``input`` guard's program: ("input", position among the
            flattened inputs) or ("buffer", qualified name).
        program: computes the value of an ``input`` guard.
    """

    kind: Kind
    source: str
    text: str
    value: Any
    note: str
    sources: tuple[tuple[str, Any], ...] = ()
    program: fx.GraphModule | None = field(default=None, repr=False, compare=False)

    @property
    def code(self) -> str:
        """The program's text."""
        return "" if self.program is None else self.program.code

    def holds(
        self, leaves: Sequence[Any] | Mapping[int, Any], buffers: Mapping[str, torch.Tensor]
    ) -> bool:
        """Whether the assumption is true for these inputs (flattened args and kwargs)."""
        if self.program is None:
            return True
        arguments = [leaves[k] if source == "input" else buffers[k] for source, k in self.sources]
        if self._writes:  # a counter that the forward advances before it reads it
            arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        with torch.no_grad():
            return same_value(as_python(self.program(*arguments)), self.value)

    @cached_property
    def _writes(self) -> bool:
        """Whether the program has in-place operators, which may write into its arguments."""
        return self.program is not None and any(map(is_mutating, self.program.graph.nodes))

    def __str__(self) -> str:
        return f"{self.source}: {self.text}\n  captured as {self.value}: {self.note}"


def as_python(value: Any) -> Any:
    """A one-element tensor as a number, others as they are."""
    return value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value


def same_value(a: Any, b: Any) -> bool:
    """Equality of numbers, tensors and tuples of them."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b.to(a.device)))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return bool(a == b) and type(a) is type(b)


class Slice:
    """The part of a graph being captured that computes one of its values.

    It includes operators that write into the storage of a value that it needs.

    Args:
        node: the value.
        roles: of the placeholders: ("input", i), ("buffer", name), ("parameter", name).
    """

    def __init__(self, node: fx.Node, roles: Mapping[fx.Node, tuple[str, Any]]) -> None:
        self.node = node
        self._nodes = _closure(node)
        self.sources = {
            n: roles.get(n, ("unknown", n.name)) for n in self._nodes if n.op == "placeholder"
        }
        self.kinds = {role for role, _ in self.sources.values()}

    @property
    def random(self) -> bool:
        """Whether it draws random numbers."""
        return any(map(draws, self._nodes))

    def constants(self, root: torch.nn.Module) -> list[Any]:
        """The graph's constants that it uses, which `root` holds."""
        return [getattr(root, str(n.target)) for n in self._nodes if n.op == "get_attr"]

    def program(self, root: torch.nn.Module) -> fx.GraphModule:
        """The slice as a function of its sources, in order; `root` holds the graph's constants."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for n in self._nodes:
            target, args, kwargs = _without_shape_operands(n)
            args, kwargs = fx.map_arg((args, kwargs), copies.__getitem__)
            if n.op == "placeholder":  # renamed, so that equal slices have equal text
                target = f"source_{len(copies)}"
            copies[n] = graph.create_node(n.op, target, args, kwargs)
        graph.output(copies[self.node])
        return fx.GraphModule(root, graph)


def _closure(node: fx.Node) -> list[fx.Node]:
    """The nodes that `node` needs, in graph order."""
    before = []
    for n in node.graph.nodes:
        before.append(n)
        if n is node:
            break
    needed = {node}
    while True:
        size = len(needed)
        storages = {s for n in needed if (s := storage_of(n)) is not None}
        for n in reversed(before):
            if n in needed or (_writes(n) & storages):
                needed.add(n)
                _, *arguments = _without_shape_operands(n)
                fx.map_arg(arguments, needed.add)
        if len(needed) == size:
            return [n for n in before if n in needed]


def _without_shape_operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """Target, args and kwargs of a node; a tensor that it reads only the shape of becomes a
    shape."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(type(n) is int for n in value.shape):
        return node.target, node.args, node.kwargs
    shape = list(value.shape)
    kinds = {"dtype": value.dtype, "device": value.device}
    aten = torch.ops.aten
    if name == "expand_as":
        return aten.expand.default, (node.args[0], shape), {}
    if name in ("view_as", "reshape_as"):
        return aten.reshape.default, (node.args[0], shape), {}
    if name in ("zeros_like", "new_zeros"):
        return aten.zeros.default, (shape,), kinds
    if name in ("ones_like", "new_ones"):
        return aten.ones.default, (shape,), kinds
    if name in ("full_like", "new_full"):
        return aten.full.default, (shape, node.args[1 if name == "full_like" else 2]), kinds
    return node.target, node.args, node.kwargs


def storage_of(node: fx.Node) -> int | None:
    """Identity of the storage of a node's value; None if it has none (under vmap)."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not torch._C._has_storage(value):
        return None
    return value.untyped_storage()._cdata


def is_mutating(node: fx.Node) -> bool:
    """Whether a node is a call of an in-place operator."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _writes(node: fx.Node) -> set[int]:
    """Storages that an operator writes into."""
    if not isinstance(node.target, torch._ops.OpOverload) or not is_mutating(node):
        return set()
    arguments = zip(node.target._schema.arguments, node.args, strict=False)
    written = [x for a, x in arguments if a.is_write and isinstance(x, fx.Node)]
    return {s for x in written if (s := storage_of(x)) is not None}


def on_own_thread(function: Callable[[], T]) -> T:
    """Run a function on a new thread, without the modes of the current thread (tracing, grad)."""

    def call() -> T:
        with torch.no_grad():
            return function()

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(call).result()
