"""From what a forward read and assigned while it was traced to the graph's `Effects` and `Reads`.

Exact, or refused: a tensor that stays on a module from one call to the next, and an object that is
neither tensor nor plain value, cannot be carried out.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.ir.effects import DELETED, TENSOR, Assignment, Effects, Held
from autopar.ir.numbers import Attribute, Numbers
from autopar.ir.reads import (
    MISSING,
    AttributeRead,
    Reads,
    TensorValue,
    is_plain,
    read_attribute,
    read_modules,
)
from autopar.tracer.attributes import AttributeRecorder, Container, Owner, contents
from autopar.tracer.counters import only_counts
from autopar.tracer.forward_hooks import ObservedHooks
from autopar.tracer.numbers import TracedNumber

_CONSTANT = (types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType, type(DELETED))


@dataclass
class Kept:
    """Tensors that an earlier call left on a module, where the forward leaves others."""

    where: str
    source: str
    tensors: list[torch.Tensor]


@dataclass
class Carried:
    """What one trace of the forward did.

    Args:
        effects: to carry out after each run.
        tensors: of the effects, in order.
        kept: what the assigned attributes held before.
        compared: how the reads of assigned attributes are compared, by path and name; None: not at
            all.
        reads: paths and names of attributes that the program depends on.
        observing: numbers of hooks that are not part of the program.
    """

    effects: Effects = field(default_factory=Effects)
    tensors: list[torch.Tensor] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    compared: dict[tuple[str, str], Any] = field(default_factory=dict)
    reads: list[tuple[str, str]] = field(default_factory=list)
    observing: set[int] = field(default_factory=set)

    def hold(self, held: tuple[Held, list[torch.Tensor]]) -> Held:
        """Append the tensors of a value."""
        self.tensors += held[1]
        return held[0]

    def reads_of(
        self,
        model: torch.nn.Module,
        originals: Originals,
        constants: Mapping[str, torch.Tensor],
        numbers: Numbers,
    ) -> Reads:
        """What the program depends on, as the user's model has it.

        Args:
            constants: of the graph.
            numbers: that vary, and are no constants of the program.
        """
        registered = {id(t) for t in (*model.parameters(), *model.buffers())}
        attributes: list[AttributeRead] = []
        for path, name in self.reads:
            compared = self.compared.get((path, name), "value")
            if compared is not None and Attribute(path, name) not in numbers.types:
                attributes.append(read_attribute(model, path, name, compared, registered))
        tensors = tuple(map(TensorValue.of, originals.of_storages(constants.values())))
        return Reads(tuple(attributes), read_modules(model), tensors)


class Originals:
    """From objects of the traced copy to those of the user's model, by the memo of the copy."""

    def __init__(self, memo: Mapping[int, Any]) -> None:
        known = [x for x in memo.get(id(memo), []) if id(x) in memo]
        self._found = {id(memo[id(x)]): x for x in known}
        # parameters and buffers are fake in the copy, and arguments of the program
        pairs = ((memo[id(x)], x) for x in known if isinstance(x, torch.Tensor))
        self._tensors = [(c, x) for c, x in pairs if not isinstance(c, FakeTensor)]

    def get(self, copied: Any) -> Any:
        """The original; `MISSING` for what is no copy."""
        return self._found.get(id(copied), MISSING)

    def containers(self) -> dict[int, Any]:
        """The original lists, dicts and sets, by the ids of their copies."""
        kinds = (list, dict, set)
        return {i: x for i, x in self._found.items() if isinstance(x, kinds)}

    def of_copy(self, t: torch.Tensor) -> torch.Tensor:
        """The original of which a tensor is the copy, or has the memory of the copy; itself if
        there is none."""
        kind = t.shape, t.stride(), t.dtype
        for copied, original in self._tensors:
            same = kind == (copied.shape, copied.stride(), copied.dtype)
            if same and _memory([copied]) & _memory([t]):
                return original.detach()
        return t

    def of_storages(self, copies: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """The originals whose copies share memory with some of these."""
        used = _memory(copies)
        return [original for copied, original in self._tensors if _memory([copied]) & used]


def collect(recorder: AttributeRecorder, hooks: ObservedHooks, originals: Originals) -> Carried:
    """Effects and reads of a forward that has just run.

    Raises:
        CaptureError: an effect cannot be carried out.
    """
    recorder.look_at_containers(None)
    observing = hooks.observing(recorder.acting)
    carried = Carried(observing=observing)
    assigned = []
    for owner in recorder.owners:
        for name in owner.changed():
            if owner.written.get(name, (None,))[0] not in observing:
                assigned.append(_assignment(owner, name, originals, carried))
        names = [name for name, reader in owner.read if reader not in observing]
        carried.reads += [(owner.path, owner.prefix + n) for n in dict.fromkeys(names)]
    for container in recorder.containers:
        if container.writers - observing:
            mixed = bool(container.writers & observing)
            assigned.append(_in_place(container, mixed, originals, carried))
    calls = []
    for call in hooks.calls(observing):
        what = f"the hook at {call.source} on {call.path or 'the model'} gets"
        calls.append(call.described(carried.hold(_held(call.arguments, what, originals))))
    carried.effects = Effects(tuple(assigned), tuple(calls))
    return carried


def check_state(
    kept: Sequence[Kept],
    histories: Sequence[torch.Tensor],
    constants: Mapping[str, torch.Tensor],
) -> None:
    """Refuse tensors that go from one call to the next.

    Args:
        histories: tensors that have a gradient history.
        constants: of the graph.

    Raises:
        CaptureError: the graph uses one of them.
    """
    used = _memory(constants.values())
    for k in kept:
        if _memory(k.tensors) & used:
            raise CaptureError(
                f"the forward uses {k.where}, a tensor that an earlier call left there, and "
                f"replaces it{k.source}. State that goes from call to call must be a buffer "
                "(self.register_buffer), or an argument and a result of the forward"
            )
    if _memory(histories) & used:
        raise CaptureError(
            "the forward uses a tensor with a gradient history that the model or one of its hooks "
            "holds; its gradient would be lost. Pass it as an argument, or detach it"
        )


def _assignment(owner: Owner, name: str, originals: Originals, carried: Carried) -> Assignment:
    value, before = owner.namespace.get(name, DELETED), owner.before.get(name, MISSING)
    full, where = owner.prefix + name, _where(owner, name)
    numbers = type(value) in (int, float) and type(before) in (int, float)
    sites = owner.sites.get(name, ()) if numbers and (name, None) in owner.read else ()
    if sites and all(only_counts(code, at, name) for code, at in sites):
        carried.compared[owner.path, full] = None
        return Assignment(owner.path, full, None, value - before)
    line = owner.written[name][1] if name in owner.written else None
    source = f" at {line}: `{line.text}`" if line is not None else ""
    held = _held(value, f"the forward assigns {where}{source}, which is", originals)
    tensors = [x for x in pytree.tree_leaves(before) if isinstance(x, torch.Tensor)]
    carried.kept.append(Kept(where, source, tensors))
    if isinstance(before, torch.Tensor):
        carried.compared[owner.path, full] = "metadata"
    return Assignment(owner.path, full, carried.hold(held))


def _in_place(c: Container, mixed: bool, originals: Originals, carried: Carried) -> Assignment:
    """New items of a list, or new values of a dict, that a module held before the forward."""
    now, where, full = contents(c.value), _where(c.owner, c.name), c.owner.prefix + c.name
    if type(c.value) is dict:
        keys = [k for k, _ in c.before]
        simple = [k for k, _ in now[: len(keys)]] == keys
        old = [a[1] for a, b in zip(c.before, now, strict=False) if a[1] is not b[1]]
    else:
        simple = type(c.value) is list and not any(x is y for x in now for y in c.before)
        old = c.before
    held_still = c.owner.namespace.get(c.name) is c.value
    if mixed or not simple or not held_still or not all(map(torch.is_tensor, old)):
        raise CaptureError(
            f"the forward changes {where}, a {type(c.value).__name__} that held {len(c.before)} "
            f"items before the call and holds {len(now)} after it, in a way that cannot be "
            "repeated on the model. Assign a new one at the start of the forward, or empty it "
            "before each call; let hooks use containers of their own"
        )
    carried.kept.append(Kept(where, "", old))
    replaces = isinstance(c.value, list) and c.before
    carried.compared[c.owner.path, full] = None if replaces else "keys"
    held = carried.hold(_held(c.value, f"the forward puts into {where}", originals))
    return Assignment(c.owner.path, full, held, in_place="replace" if replaces else "add")


def _held(value: Any, what: str, originals: Originals) -> tuple[Held, list[torch.Tensor]]:
    """A value of the trace, with objects of the user's model in the place of their copies.

    Raises:
        CaptureError: an object of it has no original.
    """
    leaves, spec = pytree.tree_flatten(value)
    kept: list[Any] = []
    tensors = []
    for x in leaves:
        found = originals.get(x)
        if found is not MISSING:
            kept.append(found)
        elif type(x) is TracedNumber:
            kept.append(x.expression)
        elif isinstance(x, torch.Tensor):
            kept.append(TENSOR)
            tensors.append(x)
        elif is_plain(x) or isinstance(x, _CONSTANT):
            kept.append(x)
        else:
            number = isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool)
            kind = "number that is the value of a tensor (.item())" if number else type(x).__name__
            raise CaptureError(
                f"{what} a {kind}, which cannot be carried out of the capture; only "
                "tensors, numbers, strings, and lists, tuples and dicts of them can. Keep the "
                "tensors themselves (detached for .item()), or assign it outside of the forward"
            )
    return Held(spec, tuple(kept)), tensors


def _memory(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Addresses of the memory of tensors; fake, meta, sparse and empty ones have none."""
    stored = (t for t in tensors if not isinstance(t, FakeTensor) and torch._C._has_storage(t))
    return {t.untyped_storage().data_ptr() for t in stored} - {0}


def _where(owner: Owner, name: str) -> str:
    return f"{owner.path or 'the model'}.{owner.prefix}{name}"
