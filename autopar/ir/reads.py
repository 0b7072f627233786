"""What a captured forward read of its modules besides tensors that are arguments of the graph.

A number that the loop anneals, a flag, `training`, a mask that is a plain attribute, the modules
and their hooks are constants of the captured program. The program serves a model as long as all of
them are as they were (`bound_reads.py` checks that).
"""

from __future__ import annotations

import operator
import textwrap
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import torch

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size,
    torch.layout, torch.memory_format,
)  # fmt: skip
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Of all modules, by kind; private (tested with torch 2.13).
GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{kind}") for kind in HOOKS]
FORWARD = "forward"
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)


class _Missing:
    """The value of an attribute that an owner does not have."""

    def __repr__(self) -> str:
        return "<no such attribute>"


MISSING = _Missing()


def is_plain(value: Any) -> bool:
    """Whether a value is compared by type and equality: a number, text, None, dtype, or a tuple of
    those."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN)


@dataclass(frozen=True)
class TensorValue:
    """A tensor as it was: the same object, not written into since.

    Args:
        version: None for parameters and buffers, whose values are arguments of the program.
    """

    tensor: torch.Tensor = field(repr=False)
    version: int | None

    @staticmethod
    def of(t: torch.Tensor, registered: Collection[int] = ()) -> TensorValue:
        if id(t) in registered:
            return TensorValue(t, None)
        return TensorValue(t, 0 if t.is_inference() else t._version)

    def __repr__(self) -> str:
        written = "" if self.version is None else f" at version {self.version}"
        return f"tensor{list(self.tensor.shape)}{written}"


@dataclass(frozen=True)
class Contents:
    """A container as it was: of its type, with equal items (keys and values of a dict)."""

    container: Any = field(repr=False)
    items: tuple[Any, ...]

    @staticmethod
    def of(container: Any, registered: Collection[int] = ()) -> Contents:
        items = tuple(frozen(item, registered) for item in _items(container))
        return Contents(container, items)

    def __repr__(self) -> str:
        return f"{type(self.container).__name__}{list(self.items)}"


@dataclass(frozen=True)
class TensorKind:
    """A tensor of which the forward read only what it is, not its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    requires_grad: bool

    @staticmethod
    def of(value: Any) -> Any:
        """Of a tensor; other values are frozen as they are."""
        if not isinstance(value, torch.Tensor):
            return frozen(value)
        return TensorKind(tuple(value.shape), value.dtype, value.device.type, value.requires_grad)


@dataclass(frozen=True)
class Keys:
    """A container of which the forward read only the keys (of a list, the length)."""

    kind: type
    keys: tuple[Any, ...]

    @staticmethod
    def of(value: Any) -> Any:
        """Of a dict or list; other values are frozen as they are."""
        if not isinstance(value, dict | list):
            return frozen(value)
        return Keys(type(value), tuple(value) if isinstance(value, dict) else (len(value),))


@dataclass(frozen=True)
class AttributeRead:
    """An attribute that the forward read before it assigned it.

    Args:
        path: of the module; "" is the model.
        name: of the attribute; `config.use_x` for one of an object that the module holds.
        value: plain values as they are, else a `TensorValue`, a `Contents`, an object (compared by
            identity), or `MISSING`.
        compared: the value; or only the metadata of a tensor, or the keys of a container, where the
            forward replaces the rest.
    """

    path: str
    name: str
    value: Any
    compared: Literal["value", "metadata", "keys"] = "value"

    def now(self, value: Any, registered: Collection[int] = ()) -> Any:
        """Another value of the attribute, to compare with `value`."""
        if self.compared == "metadata":
            return TensorKind.of(value)
        return Keys.of(value) if self.compared == "keys" else frozen(value, registered)

    def __str__(self) -> str:
        return f"{self.path or 'the model'}.{self.name}"


@dataclass(frozen=True)
class ModuleRead:
    """A module that the forward could call, with its hooks.

    Args:
        path: "" is the model.
        module: the module itself.
        children: by name.
        hooks: of each kind, in order.
        forward: as `forward_of`.
    """

    path: str
    module: torch.nn.Module = field(repr=False)
    children: tuple[tuple[str, Any], ...] = field(repr=False)
    hooks: tuple[tuple[str, tuple[Any, ...]], ...]
    forward: Any = field(repr=False)


@dataclass(frozen=True)
class Reads:
    """What a captured program depends on in its model besides tensors that are its arguments.

    Args:
        tensors: whose values are constants of the program, wherever the model holds them.
    """

    attributes: tuple[AttributeRead, ...] = ()
    modules: tuple[ModuleRead, ...] = ()
    tensors: tuple[TensorValue, ...] = ()


def _shown(value: Any) -> str:
    return textwrap.shorten(repr(value), 200, placeholder=" ...")


@dataclass(frozen=True)
class Change:
    """The first difference between what a program was captured with and what a model has now."""

    where: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.where} was {_shown(self.old)} and is {_shown(self.new)}"


def frozen(value: Any, registered: Collection[int] = ()) -> Any:
    """A value as a read remembers it.

    Args:
        registered: identities of parameters and buffers.
    """
    if is_plain(value):
        return value
    if isinstance(value, torch.Tensor):
        return TensorValue.of(value, registered)
    if type(value) in (*_CONTAINERS, OrderedDict) or (
        isinstance(value, tuple) and not isinstance(value, _PLAIN)
    ):
        return Contents.of(value, registered)
    return value


def read_modules(model: torch.nn.Module) -> tuple[ModuleRead, ...]:
    """The modules of a model, and their hooks, as they are."""
    return tuple(
        ModuleRead(path, module, tuple(module._modules.items()), _hooks(module), forward_of(module))
        for path, module in model.named_modules()
    )


def read_attribute(
    model: torch.nn.Module,
    path: str,
    name: str,
    compared: Literal["value", "metadata", "keys"] = "value",
    registered: Collection[int] = (),
) -> AttributeRead:
    """An attribute as it is now.

    Args:
        registered: identities of parameters and buffers.
    """
    read = AttributeRead(path, name, None, compared)
    return replace(read, value=read.now(value_of(model, path, name), registered))


def first_change(model: torch.nn.Module, reads: Reads) -> Change | None:
    """What differs now, by names; None if nothing does."""
    if hooks := global_hooks():
        return Change("hooks on all modules", [], hooks)
    for was in reads.modules:
        where = was.path or "the model"
        try:
            module = model.get_submodule(was.path)
        except AttributeError:
            return Change(where, type(was.module).__name__, MISSING)
        if module is not was.module:
            return Change(where, type(was.module).__name__, f"another {type(module).__name__}")
        if not _same_items(module._modules.items(), was.children):
            old, new = [n for n, _ in was.children], list(module._modules)
            return Change(f"children of {where}", old, new)
        for (kind, old_hooks), (_, new_hooks) in zip(was.hooks, _hooks(module), strict=True):
            if not _same(old_hooks, new_hooks):
                return Change(f"{kind} of {where}", list(old_hooks), list(new_hooks))
        if was.path and forward_of(module) is not was.forward:
            return Change(f"forward of {where}", was.forward, forward_of(module))
    for read in reads.attributes:
        new_value = read.now(value_of(model, read.path, read.name))
        if not equal(read.value, new_value):
            return Change(str(read), read.value, new_value)
    for was_tensor in reads.tensors:
        now = TensorValue.of(was_tensor.tensor)
        if now != was_tensor:
            return Change("a tensor that the model holds", was_tensor, now)
    return None


def global_hooks() -> list[Any]:
    """Hooks of a user's own on all modules."""
    hooks = chain.from_iterable(registry.values() for registry in GLOBAL_HOOKS)
    return [h for h in hooks if not str(getattr(h, "__module__", "")).startswith("torch.")]


def forward_of(module: torch.nn.Module) -> Any:
    """What a call of a module runs: what was assigned to the module itself, or its class's."""
    return vars(module).get(FORWARD, type(module).forward)


def _hooks(module: torch.nn.Module) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    return tuple((kind, tuple(getattr(module, kind).values())) for kind in HOOKS)


def _items(container: Any) -> Iterable[Any]:
    return chain(container, container.values()) if isinstance(container, dict) else container


def owner_of(model: torch.nn.Module, path: str, name: str) -> tuple[Any, str]:
    """The object that holds an attribute, and its name there."""
    owner: Any = model.get_submodule(path)
    *through, last = name.split(".")
    for part in through:
        owner = vars(owner)[part]
    return owner, last


def value_of(model: torch.nn.Module, path: str, name: str) -> Any:
    try:
        owner, last = owner_of(model, path, name)
    except (AttributeError, KeyError, TypeError):
        return MISSING
    namespace = vars(owner)
    return namespace[last] if last in namespace else getattr(type(owner), last, MISSING)


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _same_items(now: Iterable[tuple[str, Any]], was: Sequence[tuple[str, Any]]) -> bool:
    pairs = list(now)
    return len(pairs) == len(was) and all(
        a == b and x is y for (a, x), (b, y) in zip(pairs, was, strict=True)
    )


def equal(a: Any, b: Any) -> bool:
    """Whether value `b` is as `a` was; numbers of other types differ, and NaN equals itself."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, TensorValue):
        return a.tensor is b.tensor and (a.version is None or a.version == b.version)
    if isinstance(a, TensorKind | Keys):
        return bool(a == b)
    if isinstance(a, Contents):
        return (
            type(a.container) is type(b.container)
            and len(a.items) == len(b.items)
            and all(map(equal, a.items, b.items))
        )
    if type(a) is tuple:
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float):
        return str(a) == str(b)
    return is_plain(a) and bool(a == b)
