"""Repeated blocks are captured once: of the others, the nodes are copied.

Running a block's Python under the tracer takes milliseconds per operator; copying what was recorded
of the first one, tens of microseconds. A block is a copy of another if running it could not give
other nodes: both stand in one list of modules, they are of the same classes with the same tensors
and the same attributes, are called alike, and

* attributes that differ (a layer's number), the first run did not read;
* no hooks watch the modules inside of them;
* the first run asked for no values (`BranchResolver`), and changed no attribute of its modules;
* it computed with nothing but its arguments and its own tensors, and wrote into the latter only.

Everything else is run as before. The tracer's slots and its module stack are private
(torch.fx.experimental.proxy_tensor; tested with torch 2.13).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_slot, track_tensor_tree
from torch.utils import _pytree as pytree

from autopar.tracer.branches import BranchResolver, current_tracer
from autopar.tracer.guards import apart, storage_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_TABLES = ("_parameters", "_buffers", "_modules")


class _NotAlike(Exception):
    """What was recorded cannot stand for another run."""


@dataclass(frozen=True)
class _Block:
    """One of several modules that may be copies.

    Args:
        module: it.
        parts: its modules, by their path inside.
        watched: (path, attribute) that are not the same in all of its kind.
    """

    module: torch.nn.Module
    parts: Mapping[str, torch.nn.Module]
    watched: set[tuple[str, str]]

    def tensors(self) -> list[torch.Tensor]:
        """Its parameters and buffers, each of its names."""
        found = []
        for part in self.parts.values():
            for table in (part._parameters, part._buffers):
                found += [t for t in table.values() if t is not None]
        return found

    @property
    def hooked(self) -> bool:
        """Whether somebody looks on inside: hooks of its modules, which copies would not call."""
        return any(
            value
            for path, part in self.parts.items()
            if path  # its own are called outside of its forward
            for name, value in part.__dict__.items()
            if name.endswith("_hooks")
        )

    def attribute(self, path: str, name: str) -> Any:
        return self.parts[path].__dict__[name]


@dataclass
class _Record:
    """One run of a block.

    Args:
        block: which ran.
        nodes: what it captured.
        given: the node of every tensor argument, and of every tensor of the block's own.
        then: the node of every tensor of its own afterwards: another, where the run wrote into it.
        results: per result ("node", its node), ("given", position) or ("plain", value).
        carrying: nodes of results that require grad.
        spec: of the results.
        stack: the tracer's modules where it ran.
        reads: watched attributes that it read.
    """

    block: _Block
    nodes: list[fx.Node]
    given: list[fx.Node]
    then: list[fx.Node]
    results: list[tuple[str, Any]]
    carrying: list[fx.Node]
    spec: pytree.TreeSpec
    stack: dict[str, Any]
    reads: set[tuple[str, str]] = field(default_factory=set)

    def stands_for(self, block: _Block) -> bool:
        """Whether what was read is the same in another block."""
        return all(
            _same(self.block.attribute(*read), block.attribute(*read)) for read in self.reads
        )


class Copies:
    """Watches the blocks of a module that is about to be captured.

    Args:
        module: a copy that belongs to the capture; the forwards of its blocks are replaced.
        resolver: of the capture.
    """

    def __init__(self, module: torch.nn.Module, resolver: BranchResolver) -> None:
        self._resolver = resolver
        self._records: dict[Any, list[_Record]] = {}
        self._reads: set[tuple[str, str]] | None = None  # while a run is recorded
        names = [m for _, m in module.named_modules(remove_duplicate=False)]
        if len(names) > len({*names}):
            return  # with modules of two names, the tracer runs stand-ins for them
        for kind, blocks in enumerate(_kinds(module)):
            for block in blocks:
                self._watch(block)
                block.module.forward = self._forward(kind, block)

    def _forward(self, kind: int, block: _Block) -> Callable[..., Any]:
        run = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            key, leaves = self._key(kind, block, args, kwargs)
            if key is None:
                return run(*args, **kwargs)
            known = self._records.setdefault(key, [])
            for record in known:
                if record.stands_for(block):
                    return self._copied(record, block, leaves)
            result, found = self._recorded(block, leaves, lambda: run(*args, **kwargs))
            if found is not None:
                known.append(found)
            return result

        return forward

    def _key(
        self, kind: int, block: _Block, args: Any, kwargs: Any
    ) -> tuple[Any, list[torch.Tensor]]:
        """How a block is called, and its tensor arguments; None if that says too little."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tracer = current_tracer()
        if self._reads is not None or tracer is None or not self._resolver.active:
            return None, []  # inside of another block, or not in the forward
        if block.hooked:
            return None, []
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        for t in (*tensors, *block.tensors()):
            slot = get_proxy_slot(t, tracer, None) if isinstance(t, FakeTensor) else None
            if slot is None or slot.constant is not None:
                return None, []
        described = []
        for x in leaves:
            if isinstance(x, torch.Tensor):
                first = next(i for i, t in enumerate(tensors) if t is x)
                described.append(("tensor", first, *_described(x), x.requires_grad))
            elif isinstance(x, _PLAIN):
                described.append((type(x), x))
            else:
                return None, []
        own = block.tensors()
        mixed = tuple(next((i for i, o in enumerate(own) if o is t), -1) for t in tensors)
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), tracer.graph
        return (kind, str(spec), tuple(described), mixed, modes), tensors

    # -- the first ------------------------------------------------------------------------------

    def _recorded(
        self, block: _Block, leaves: Sequence[torch.Tensor], run: Callable[[], Any]
    ) -> tuple[Any, _Record | None]:
        tracer = current_tracer()
        before = next(iter(reversed(tracer.graph.nodes)))
        asked, state = self._resolver.asked, _state(block)
        given = [_node_of(t) for t in (*leaves, *block.tensors())]
        self._reads = set()
        try:
            result = run()
            reads = self._reads
        finally:
            self._reads = None
        if self._resolver.asked != asked or _state(block) != state:
            return result, None
        nodes: list[fx.Node] = []
        while (node := before.next if not nodes else nodes[-1].next).op != "root":
            nodes.append(node)
        then = [_node_of(t) for t in block.tensors()]
        try:
            _check(nodes, given[: len(leaves)], given[len(leaves) :])
            flat, spec = pytree.tree_flatten(result)
            inside = set(nodes)
            results = [_result(x, inside, given) for x in flat]
            kinds = zip(results, flat, strict=True)
            carrying = [node for (what, node), x in kinds if what == "node" and x.requires_grad]
        except _NotAlike:
            return result, None
        stack = dict(tracer.module_stack)
        return result, _Record(
            block, nodes, given, then, results, carrying, spec, stack, reads
        )  # fmt: skip

    # -- the others -----------------------------------------------------------------------------

    def _copied(self, record: _Record, block: _Block, leaves: Sequence[torch.Tensor]) -> Any:
        tracer = current_tracer()
        given = [*leaves, *block.tensors()]
        copies = dict(zip(record.given, map(_node_of, given), strict=True))
        values = self._values(record, given)
        renamed = _Stacks(record.stack, dict(tracer.module_stack))
        for node in record.nodes:
            copy = tracer.graph.node_copy(node, copies.__getitem__)
            copy.meta = dict(node.meta)
            if "val" in node.meta:
                copy.meta["val"] = values[node]
            copy.meta["nn_module_stack"] = renamed(node.meta.get("nn_module_stack") or {})
            copies[node] = copy
        for before, after, t in zip(
            record.given[len(leaves) :], record.then, block.tensors(), strict=True
        ):
            if after is not before:
                track_tensor_tree(t, fx.Proxy(copies[after], tracer), constant=None, tracer=tracer)
        made: dict[fx.Node, torch.Tensor] = {}
        flat = []
        for what, value in record.results:
            if what == "node":
                if value not in made:
                    made[value] = values[value]
                    proxy = fx.Proxy(copies[value], tracer)
                    track_tensor_tree(made[value], proxy, constant=None, tracer=tracer)
                flat.append(made[value])
            else:
                flat.append(given[value] if what == "given" else value)
        return pytree.tree_unflatten(flat, record.spec)

    def _values(self, record: _Record, given: Sequence[torch.Tensor]) -> dict[fx.Node, Any]:
        """New tensors for the copies: two share a storage where the recorded ones do."""
        bases = {storage_of(n): t for n, t in zip(record.given, given, strict=True)}
        alike: dict[int, int] = {}
        for node in record.nodes:
            for t in pytree.tree_leaves(node.meta.get("val")):
                if isinstance(t, torch.Tensor):
                    alike[_storage(t)] = alike.get(_storage(t), 0) + 1

        def new(t: torch.Tensor) -> torch.Tensor:
            key = _storage(t)
            if key not in bases and alike[key] == 1:
                made = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)
            else:
                if key not in bases:
                    size = t.untyped_storage().nbytes() // t.element_size()
                    bases[key] = torch.empty(size, dtype=t.dtype, device=t.device)
                base = bases[key].detach()
                base = base if base.dtype == t.dtype else base.view(t.dtype)
                made = base.as_strided(t.size(), t.stride(), t.storage_offset())
            return made

        def every() -> dict[fx.Node, Any]:
            with _mode_of(record.given):  # export's own
                values = {
                    node: pytree.tree_map_only(torch.Tensor, new, node.meta["val"])
                    for node in record.nodes
                    if "val" in node.meta
                }
            for node in record.carrying:
                values[node].requires_grad_()
            return values

        return apart(every)

    # -- attributes -----------------------------------------------------------------------------

    def _watch(self, block: _Block) -> None:
        """Note when attributes that differ between blocks are read."""
        by_path: dict[str, list[str]] = {}
        for path, name in block.watched:
            by_path.setdefault(path, []).append(name)
        for path, names in by_path.items():
            part = block.parts[path]
            properties: dict[str, Any] = {n: self._property(path, n) for n in names}
            kind = type(part)
            watched = type(kind.__name__, (_Watched, kind), properties)
            watched.__module__, watched.__qualname__ = kind.__module__, kind.__qualname__
            part.__class__ = watched

    def _property(self, path: str, name: str) -> property:
        def read(module: torch.nn.Module) -> Any:
            if self._reads is not None:
                self._reads.add((path, name))
            try:
                return module.__dict__[name]
            except KeyError:
                raise AttributeError(name) from None

        def write(module: torch.nn.Module, value: Any) -> None:
            module.__dict__[name] = value

        def delete(module: torch.nn.Module) -> None:
            del module.__dict__[name]

        return property(read, write, delete)


class _Watched:
    """Of a class made for watching; keeps what the user's class does to its subclasses away."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


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


def _kinds(module: torch.nn.Module) -> Iterator[list[_Block]]:
    """Blocks that may be copies of each other, by list of modules."""
    for container in module.modules():
        children = [m for name, m in container._modules.items() if name.isdigit() and m is not None]
        kinds: list[list[_Block]] = []
        for child in dict.fromkeys(children):
            if not any(True for _ in child.children()):
                continue  # copying a layer or two wins nothing
            block = _Block(child, dict(child.named_modules()), set())
            for kind in kinds:
                differing = _differences(kind[0], block)
                if differing is not None:
                    kind[0].watched.update(differing)
                    kind.append(block)
                    break
            else:
                kinds.append([block])
        for kind in kinds:
            for block in kind[1:]:
                block.watched.update(kind[0].watched)
            if len(kind) > 1:
                yield kind


def _differences(first: _Block, other: _Block) -> set[tuple[str, str]] | None:
    """Attributes that differ; None if more than that does."""
    if list(first.parts) != list(other.parts):
        return None
    found = set()
    for path, a in first.parts.items():
        b = other.parts[path]
        if type(a) is not type(b) or a.__dict__.keys() != b.__dict__.keys():
            return None
        for table in _TABLES:
            if list(getattr(a, table)) != list(getattr(b, table)):
                return None
        for name, value in a.__dict__.items():
            if "hook" in name and (value or b.__dict__[name]) and name != "_is_full_backward_hook":
                return None
            if name not in _TABLES and not _same(value, b.__dict__[name]):
                found.add((path, name))
    mine, theirs = first.tensors(), other.tensors()
    if len(mine) != len(theirs):
        return None
    for i, (s, t) in enumerate(zip(mine, theirs, strict=True)):
        if type(s) is not type(t) or _described(s) != _described(t):
            return None
        tied = [k for k, u in enumerate(mine[:i]) if u is s]
        if s.requires_grad != t.requires_grad or tied != [
            k for k, u in enumerate(theirs[:i]) if u is t
        ]:
            return None
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two attributes are equal, for all that is plain."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, set | frozenset):
        return all(isinstance(x, _PLAIN) for x in a | b) and a == b
    return False


def _described(t: torch.Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), t.stride(), t.storage_offset(), t.dtype, t.device


def _state(block: _Block) -> dict[tuple[str, str], Any]:
    """Which values the attributes have, and lists and tables of them hold."""
    found: dict[tuple[str, str], Any] = {}
    for path, part in block.parts.items():
        for name, value in part.__dict__.items():
            held: Sequence[Any] = ()
            if isinstance(value, list | tuple | set | frozenset):
                held = [*value]
            elif isinstance(value, dict):
                held = [*value, *value.values()]
            found[path, name] = (id(value), [id(x) for x in held])
    return found


def _node_of(t: torch.Tensor) -> fx.Node:
    slot = get_proxy_slot(t, current_tracer(), None) if isinstance(t, FakeTensor) else None
    if slot is None:
        raise _NotAlike
    return slot.proxy.node


def _mode_of(nodes: Sequence[fx.Node]) -> FakeTensorMode:
    fake = nodes[0].meta["val"]
    assert isinstance(fake, FakeTensor)
    return fake.fake_mode


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


def _check(nodes: Sequence[fx.Node], args: Sequence[fx.Node], own: Sequence[fx.Node]) -> None:
    """Raises where nodes depend on more than arguments and tensors of the block's own, or write
    into arguments."""
    inside = {*nodes}
    outside = set(map(storage_of, args))
    known = inside | {*args} | {*own}
    for node in nodes:
        if node.op != "call_function" or "custom" in node.meta:
            raise _NotAlike
        if not known.issuperset(node.all_input_nodes):
            raise _NotAlike
        for t in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(t, torch.Tensor):
                if not isinstance(t, FakeTensor) or not torch._C._has_storage(t):
                    raise _NotAlike
            elif isinstance(t, torch.SymInt | torch.SymFloat | torch.SymBool):
                raise _NotAlike
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            for argument, value in zip(schema.arguments, node.args, strict=False):
                if (
                    argument.is_write
                    and isinstance(value, fx.Node)
                    and storage_of(value) in outside
                ):
                    raise _NotAlike


def _result(x: Any, inside: set[fx.Node], given: Sequence[fx.Node]) -> tuple[str, Any]:
    if isinstance(x, torch.Tensor):
        node = _node_of(x)
        with contextlib.suppress(ValueError):
            return "given", given.index(node)
        if node in inside:
            return "node", node
    elif isinstance(x, _PLAIN):
        return "plain", x
    raise _NotAlike
