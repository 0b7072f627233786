"""Copies of recorded nodes for another block, with tensors of their own for values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import track_tensor_tree
from torch.utils import _pytree as pytree

from autopar.ir.guards import apart, storage_of
from autopar.tracer.blocks import Block, described
from autopar.tracer.branches import current_tracer
from autopar.tracer.recording import (
    NotAlike,
    Part,
    Record,
    entries,
    last_node,
    node_of,
    nodes_after,
)


def copied(record: Record, block: Block, leaves: Sequence[torch.Tensor]) -> Any:
    """What another block called alike returns, its nodes copied.

    Args:
        leaves: the tensors among its arguments.

    Raises:
        NotAlike: a part of the block captures other operators than the recorded one; the graph is
            as it was.
    """
    before = last_node()
    try:
        return _Copy(record, block, leaves).run()
    except NotAlike:
        for node in reversed(nodes_after(before)):
            node.graph.erase_node(node)
        raise


class _Copy:
    def __init__(self, record: Record, block: Block, leaves: Sequence[torch.Tensor]) -> None:
        self._record, self._block = record, block
        self._tracer = current_tracer()
        self._given = [*leaves, *block.tensors()]
        self._own = len(leaves)
        # by recorded node
        self._nodes = dict(zip(record.given, map(node_of, self._given), strict=True))
        self._values: dict[fx.Node, Any] = dict(zip(record.given, self._given, strict=True))
        # by recorded storage: something with the storage that stands for it
        self._bases = {storage_of(n): t for n, t in self._values.items()}
        self._stacks = _Stacks(record.stack, dict(self._tracer.module_stack))

    def run(self) -> Any:
        pending: list[fx.Node] = []
        for step in self._record.steps():
            if isinstance(step, fx.Node):
                pending.append(step)
            elif self._record.block.alike(self._block, step.reads):
                pending += step.nodes
            else:
                self._copy(pending)
                self._run_part(step)
                pending = []
        self._copy(pending)
        self._update()
        return self._result()

    def _copy(self, nodes: Sequence[fx.Node]) -> None:
        self._make_values(nodes)
        for node in nodes:
            copy = self._tracer.graph.node_copy(node, self._nodes.__getitem__)
            self._describe(copy, node)
            if "val" in node.meta:
                copy.meta["val"] = self._values[node]
            self._nodes[node] = copy

    def _describe(self, copy: fx.Node, node: fx.Node) -> None:
        copy.meta = dict(node.meta)
        copy.meta["nn_module_stack"] = self._stacks(node.meta.get("nn_module_stack") or {})

    def _run_part(self, part: Part) -> None:
        """Run the block's own; it must capture the same operators, numbers may be others."""
        before = last_node()
        args, kwargs = pytree.tree_unflatten([self._argument(x) for x in part.given], part.spec)
        result = self._block.parts[part.path].forward(*args, **kwargs)
        made = nodes_after(before)
        if len(made) != len(part.nodes):
            raise NotAlike
        for node, copy in zip(part.nodes, made, strict=True):
            inputs = [self._nodes.get(n) for n in node.all_input_nodes]
            if copy.target != node.target or copy.all_input_nodes != inputs:
                raise NotAlike
            mine, theirs = _tensors(node), _tensors(copy)
            if [*map(described, mine)] != [*map(described, theirs)]:
                raise NotAlike
            value = copy.meta.get("val")
            self._describe(copy, node)
            if "val" in node.meta:
                copy.meta["val"] = value
            self._nodes[node], self._values[node] = copy, value
            for old, new in zip(mine, theirs, strict=True):
                self._bases.setdefault(_storage(old), new)
        expected = [self._nodes.get(x) if isinstance(x, fx.Node) else x for x in part.results]
        if entries(pytree.tree_leaves(result)) != expected:
            raise NotAlike

    def _argument(self, x: Any) -> Any:
        if not isinstance(x, fx.Node):
            return x
        if x not in self._values:
            raise NotAlike
        if x not in self._record.given:
            self._track(x)
        return self._values[x]

    def _track(self, node: fx.Node) -> None:
        """Let the tracer know the value of a copy."""
        proxy = fx.Proxy(self._nodes[node], self._tracer)
        track_tensor_tree(self._values[node], proxy, constant=None, tracer=self._tracer)

    def _update(self) -> None:
        """Note what was written into tensors of the block's own."""
        befores, thens = self._record.given[self._own :], self._record.then
        for before, after, t in zip(befores, thens, self._block.tensors(), strict=True):
            if after is not before:
                proxy = fx.Proxy(self._nodes[after], self._tracer)
                track_tensor_tree(t, proxy, constant=None, tracer=self._tracer)

    def _result(self) -> Any:
        carrying = [self._values[node] for node in self._record.carrying]
        apart(lambda: [value.requires_grad_() for value in carrying])
        flat = []
        tracked = set()
        for what, value in self._record.results:
            if what == "node" and value not in tracked:
                self._track(value)
                tracked.add(value)
            plain = self._given[value] if what == "given" else value
            flat.append(self._values[value] if what == "node" else plain)
        return pytree.tree_unflatten(flat, self._record.spec)

    # -- values ---------------------------------------------------------------------------------

    def _make_values(self, nodes: Sequence[fx.Node]) -> None:
        """Tensors for the copies: two share a storage where the recorded ones do."""
        fake = self._record.given[0].meta["val"]
        assert isinstance(fake, FakeTensor)

        def every() -> None:
            with fake.fake_mode:  # export's own
                for node in nodes:
                    if "val" in node.meta:
                        value = pytree.tree_map_only(torch.Tensor, self._new, node.meta["val"])
                        self._values[node] = value

        apart(every)

    def _new(self, t: torch.Tensor) -> torch.Tensor:
        key = _storage(t)
        if key not in self._bases:
            if key not in self._record.apart:
                return t
            size = t.untyped_storage().nbytes() // t.element_size()
            self._bases[key] = torch.empty(size, dtype=t.dtype, device=t.device)
        base = self._bases[key].detach()
        base = base if base.dtype == t.dtype else base.view(t.dtype)
        return base.as_strided(t.size(), t.stride(), t.storage_offset())


class _Stacks:
    """Modules that nodes came from, in another block.

    Args:
        old, new: the tracer's modules down to the block, there and here.
    """

    def __init__(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        self._old, self._new = old, new
        self._from, self._to = (_innermost(stack) for stack in (old, new))
        self._known: dict[tuple[str, ...], dict[str, Any]] = {}

    def __call__(self, stack: Mapping[str, Any]) -> dict[str, Any]:
        key = tuple(stack)
        if key not in self._known:
            found = {k: _as_text(v) for k, v in self._new.items()}
            for name, (path, kind) in list(stack.items())[len(self._old) :]:
                found[self._moved(name)] = self._moved(path), kind
            self._known[key] = found
        return dict(self._known[key])

    def _moved(self, path: str) -> str:
        return self._to + path.removeprefix(self._from) if path.startswith(self._from) else path


def _innermost(stack: Mapping[str, Any]) -> str:
    return [*stack.values()][-1][0] if stack else ""


def _as_text(entry: Any) -> Any:
    path, kind = entry
    return path, f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else kind


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return [t for t in leaves if isinstance(t, torch.Tensor)]


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata
