"""Records which Python attributes of modules a forward reads and assigns while it is traced.

For the duration of the trace, `torch.nn.Module` has a `__getattribute__` and a `__setattr__` that
record. Types stay what they are, so `type(self) is Block` means what it means in eager. Objects
that modules hold (a config) are recorded in the same way as soon as the forward reads them. Owners
are known by their `__dict__`, so modules outside of the traced copy are not recorded.
"""

from __future__ import annotations

import enum
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import CodeType
from typing import Any

import torch

from autopar.ir.reads import MISSING
from autopar.tracer.numbers import TracedNumber, asks_for_types
from autopar.tracer.source import SourceLine, current_line, is_users

# What every module has, except for `training`.
_STANDARD = frozenset(vars(torch.nn.Module())) - {"training"} | frozenset(vars(torch.nn.Module))
_OPAQUE = (
    type, torch.nn.Module, torch.Tensor, types.FunctionType, types.BuiltinFunctionType,
    types.MethodType, types.ModuleType, partial, enum.Enum,
)  # fmt: skip
_LIBRARIES = frozenset(("torch", "numpy", "builtins", "logging", "threading", "collections"))
_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8
CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)


@dataclass
class Owner:
    """A module, or an object that modules hold.

    Args:
        path: of the module.
        prefix: of names, `config.` for an object that is the module's `config`.
        namespace: its `__dict__`.
        before: a copy of that from before the forward.
        hidden: names that start with an underscore are not recorded (modules of torch, whose
            private attributes are caches of their own).
        read: names read before they were assigned; by whom (None: the forward, else a hook).
        sites: instructions that read numbers, by name.
        written: by name, who assigned it last, and where.
    """

    path: str
    prefix: str
    namespace: dict[str, Any]
    before: dict[str, Any]
    hidden: bool = False
    read: set[tuple[str, int | None]] = field(default_factory=set)
    sites: dict[str, set[tuple[CodeType, int]]] = field(default_factory=dict)
    written: dict[str, tuple[int | None, SourceLine]] = field(default_factory=dict)

    def records(self, name: str) -> bool:
        """Whether an attribute is the user's."""
        return name not in _STANDARD and not (self.hidden and name.startswith("_"))

    def changed(self) -> Iterator[str]:
        """Names that were assigned or deleted."""
        for name in [*self.namespace, *(n for n in self.before if n not in self.namespace)]:
            if not self.records(name):
                continue
            same = self.namespace.get(name, MISSING) is self.before.get(name, MISSING)
            if name in self.written or not same:
                yield name


@dataclass
class Container:
    """A list or dict that an owner held before the forward.

    Args:
        items: at the last look; `before` those from before the forward.
        writers: who changed it: None for the forward, else hooks.
    """

    owner: Owner
    name: str
    value: Any
    items: Any
    before: Any
    writers: set[int | None] = field(default_factory=set)


class AttributeRecorder:
    """Reads and assignments of the modules of one traced copy.

    Attributes:
        owners: in order.
        containers: that modules held before the forward.
        hook: number of the hook that is running; None in the forward.
        acting: hooks that assigned what the forward read later; these are part of the program.
    """

    def __init__(self, clone: torch.nn.Module) -> None:
        self._by_namespace: dict[int, Owner] = {}
        self.containers: list[Container] = []
        self.hook: int | None = None
        self.acting: set[int] = set()
        self._active = False
        self._undo: list[Callable[[], None]] = []
        for path, module in clone.named_modules():
            hidden = type(module).__module__.startswith("torch.nn.")
            self._watch(Owner(path, "", vars(module), dict(vars(module)), hidden))

    @property
    def owners(self) -> list[Owner]:
        return list(self._by_namespace.values())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While on, reads and assignments are recorded; attributes are restored at the end."""
        self._active = True
        self._patch(torch.nn.Module)
        try:
            yield
        finally:
            self._active = False
            while self._undo:
                self._undo.pop()()

    def restore(self) -> None:
        """Give owners and their containers what they held before the forward."""
        for owner in self.owners:
            for name in list(owner.changed()):
                owner.namespace.pop(name, None)
                if name in owner.before:
                    owner.namespace[name] = owner.before[name]
        for c in self.containers:
            if c.writers:
                _refill(c.value, c.before)

    def look_at_containers(self, writer: int | None) -> None:
        """Note who changed which container since the last look."""
        for c in self.containers:
            items = contents(c.value)
            if not same_items(items, c.items):
                c.items = items
                c.writers.add(writer)

    def substitute(self, tensors: Mapping[int, torch.Tensor]) -> None:
        """Replace tensors in lists and dicts, by identity: parameters by those of the capture."""
        for c in self.containers:
            if isinstance(c.value, list | dict):
                pairs = c.value.items() if isinstance(c.value, dict) else enumerate(c.value)
                for key, value in list(pairs):
                    c.value[key] = tensors.get(id(value), value)
                c.items = c.before = contents(c.value)

    # -- owners ---------------------------------------------------------------------------------

    def _watch(self, owner: Owner) -> None:
        if id(owner.namespace) in self._by_namespace:
            return
        self._by_namespace[id(owner.namespace)] = owner
        for name, value in owner.namespace.items():
            if owner.records(name):
                self._watch_container(owner, name, value)

    def _watch_container(self, owner: Owner, name: str, value: Any) -> None:
        """A container, and those in it, whose changes cannot be carried out."""
        if type(value) not in CONTAINERS or any(c.value is value for c in self.containers):
            return
        items = contents(value)
        self.containers.append(Container(owner, name, value, items, items))
        for inner in value.values() if isinstance(value, dict) else value:
            self._watch_container(owner, f"{name}[...]", inner)

    def _watch_object(self, owner: Owner, name: str, value: Any) -> None:
        cls = type(value)
        if cls is types.SimpleNamespace:  # whose reads cannot be recorded one by one
            self._watch_namespace(owner, name, value)
        heap = cls.__flags__ & _HEAP_TYPE and not cls.__flags__ & _IMMUTABLE_TYPE
        library = cls.__module__.partition(".")[0] in _LIBRARIES
        if not heap or library or isinstance(value, _OPAQUE):
            return
        namespace = getattr(value, "__dict__", None)
        if type(namespace) is not dict or id(namespace) in self._by_namespace:
            return
        if owner.before.get(name) is not value:
            return  # made by the forward or a property
        try:
            self._patch(cls)
        except TypeError:
            return  # its metaclass does not allow it
        self._watch(Owner(owner.path, f"{owner.prefix}{name}.", namespace, dict(namespace)))

    def _watch_namespace(self, owner: Owner, name: str, value: types.SimpleNamespace) -> None:
        """Take all attributes as read."""
        if owner.before.get(name) is not value or id(vars(value)) in self._by_namespace:
            return
        inner = Owner(owner.path, f"{owner.prefix}{name}.", vars(value), dict(vars(value)))
        self._watch(inner)
        for key, held in inner.before.items():
            self._read(inner, key, held)

    # -- reads and assignments ------------------------------------------------------------------

    def _patch(self, cls: type) -> None:
        """Let a class record; undone by `_undo`."""
        if hasattr(vars(cls).get("__getattribute__"), "records"):
            return
        get: Any = cls.__getattribute__
        put: Any = cls.__setattr__
        find, plain_get = self._by_namespace.get, object.__getattribute__

        def __getattribute__(obj: Any, name: str) -> Any:
            if name in _STANDARD:  # most are, and this is called often
                if name == "__dict__" and _of_user(sys._getframe(1).f_code.co_filename):
                    self._all_read(find(id(plain_get(obj, "__dict__"))))
                return get(obj, name)
            try:
                value = get(obj, name)
            except AttributeError:
                owner = find(id(plain_get(obj, "__dict__")))
                if owner is not None:
                    self._missing(owner, name)
                raise
            namespace = plain_get(obj, "__dict__")
            owner = find(id(namespace))
            if owner is not None and (
                name in namespace or (not callable(value) and _of_class(type(obj), name) is value)
            ):
                self._read(owner, name, value)
                if type(value) is TracedNumber and asks_for_types(sys._getframe(1).f_code):
                    return value.settled()
            return value

        def __setattr__(obj: Any, name: str, value: Any) -> None:
            put(obj, name, value)
            owner = find(id(plain_get(obj, "__dict__")))
            if owner is not None and self._active and name in owner.namespace:
                owner.written[name] = (self.hook, current_line())

        __getattribute__.records = True  # type: ignore[attr-defined]
        for name, function in (
            ("__getattribute__", __getattribute__),
            ("__setattr__", __setattr__),
        ):
            own = vars(cls).get(name)
            setattr(cls, name, function)
            undo = partial(delattr, cls, name) if own is None else partial(setattr, cls, name, own)
            self._undo.append(undo)

    def _read(self, owner: Owner, name: str, value: Any) -> None:
        if not self._active or not owner.records(name):
            return
        if type(value) in (int, float):
            frame = sys._getframe(2)
            owner.sites.setdefault(name, set()).add((frame.f_code, frame.f_lasti))
        if name in owner.written:
            writer = owner.written[name][0]
            if writer is not None and self.hook is None:
                self.acting.add(writer)
            return
        owner.read.add((name, self.hook))
        if hasattr(value, "__dict__"):
            self._watch_object(owner, name, value)

    def _all_read(self, owner: Owner | None) -> None:
        """The user's code asked for all attributes at once: `vars(self)`."""
        if owner is not None and self._active:
            owner.read |= {(n, self.hook) for n in owner.namespace if owner.records(n)}

    def _missing(self, owner: Owner, name: str) -> None:
        registries = map(owner.namespace.get, ("_parameters", "_buffers", "_modules"))
        if not name.startswith("__") and not any(r and name in r for r in registries):
            self._read(owner, name, MISSING)


_of_user = lru_cache(is_users)


def _of_class(cls: type, name: str) -> Any:
    """A class attribute itself, not what it makes of an instance."""
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), MISSING)


def contents(container: Any) -> Any:
    """A shallow copy, to compare with later."""
    return list(container.items()) if isinstance(container, dict) else list(container)


def same_items(a: list[Any], b: list[Any]) -> bool:
    """Whether two shallow copies hold the same objects."""
    if len(a) != len(b):
        return False
    pairs = isinstance(a[0], tuple) if a else False
    if pairs:
        return all(
            x is y or (len(x) == len(y) and all(p is q for p, q in zip(x, y, strict=True)))
            for x, y in zip(a, b, strict=True)
        )
    return all(x is y for x, y in zip(a, b, strict=True))


def _refill(container: Any, items: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict | set):
        container.update(items)
    else:
        container.extend(items)
