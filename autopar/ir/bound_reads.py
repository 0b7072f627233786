"""Whether what a captured program read is still as it was, in C speed.

Reads of attributes are lists of dictionaries and keys, compared by identity. Equal numbers that are
other objects take the slow path once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import torch

from autopar.ir.reads import (
    FORWARD,
    GLOBAL_HOOKS,
    HOOKS,
    MISSING,
    AttributeRead,
    Contents,
    Reads,
    TensorValue,
    equal,
    first_change,
    is_plain,
    owner_of,
    value_of,
)

_VERSION, _IS = operator.attrgetter("_version"), operator.is_
_FORWARD, _HAS = operator.attrgetter("forward"), operator.contains


def bind(model: torch.nn.Module, reads: Reads) -> Callable[[], bool]:
    """Whether all reads would give the same on a model; quick to call.

    The model's modules are found once. A model whose modules were replaced since fails the check.
    """
    prepared: list[_Prepared] = []

    def holds() -> bool:
        if not any(GLOBAL_HOOKS) and prepared and prepared[0].modules_are_same():
            if prepared[0].are_same():
                return True
            if not prepared[0].may_be_equal():
                return False
        if first_change(model, reads) is not None:
            return False
        prepared[:] = [_Prepared(model, reads)]
        return True

    return holds


class _Prepared:
    """Lists that compare in C, for a model in which all reads are as they were."""

    def __init__(self, model: torch.nn.Module, reads: Reads) -> None:
        modules = [m.module for m in reads.modules]
        hooks = [getattr(m, kind) for m in modules for kind in HOOKS]
        registries = [*(m._modules for m in modules), *hooks]
        below = [m for m in reads.modules if m.path]
        own = [m for m in below if FORWARD in vars(m.module)]
        self._without_forward = [vars(m.module) for m in below if FORWARD not in vars(m.module)]
        self._with_forward = [(vars(m.module), m.forward) for m in own]
        self._classes = list({type(m.module) for m in below})
        self._forwards = list(map(_FORWARD, self._classes))
        # most are empty, which costs least to see
        self._empty = [d for d in registries if not d]
        self._registries = [d.values() for d in registries if d]
        self._registered = tuple(chain.from_iterable(self._registries))

        owned: dict[str, list[dict[str, Any]]] = {}
        self._absent: list[tuple[dict[str, Any], str]] = []
        of_classes: dict[tuple[type, str], Any] = {}
        self._replaced: list[tuple[dict[str, Any], str, AttributeRead]] = []
        self._containers: list[Any] = []
        self._tensors: list[torch.Tensor] = []
        for read in reads.attributes:
            owner, name = owner_of(model, read.path, read.name)
            namespace = vars(owner)
            if read.compared != "value":
                self._replaced.append((namespace, name, read))
                continue
            self._watch(read.value, read.now(value_of(model, read.path, read.name)))
            if name in namespace:
                owned.setdefault(name, []).append(namespace)
                continue
            self._absent.append((namespace, name))
            of_classes[type(owner), name] = getattr(type(owner), name, MISSING)
        # by name: one getter for all owners is quicker than one for all names of an owner
        self._owned = [
            (operator.itemgetter(name), namespaces, [n[name] for n in namespaces])
            for name, namespaces in owned.items()
        ]
        self._of_classes = [(cls, name, value) for (cls, name), value in of_classes.items()]
        self._tensors += [t.tensor for t in reads.tensors if not t.tensor.is_inference()]
        self._lengths = list(map(len, self._containers))
        self._expected_items = list(chain.from_iterable(self._containers))
        self._versions = list(map(_VERSION, self._tensors))

    def _watch(self, read: Any, now: Any) -> None:
        """Compare the versions of tensors and the items of containers, too."""
        if isinstance(read, TensorValue):
            if read.version is not None and not read.tensor.is_inference():
                self._tensors.append(read.tensor)
        elif isinstance(read, Contents):
            container = now.container
            if isinstance(container, dict):
                self._containers += [container, container.values()]
            else:
                self._containers.append(container)
            for inner, inner_now in zip(read.items, now.items, strict=True):
                self._watch(inner, inner_now)

    def modules_are_same(self) -> bool:
        """Whether no module, no hook and no forward was replaced, added or removed."""
        return (
            not any(self._empty)
            and tuple(chain.from_iterable(self._registries)) == self._registered
            and not any(map(_HAS, self._without_forward, repeat(FORWARD)))
            and all(namespace.get(FORWARD) is f for namespace, f in self._with_forward)
            and all(map(_IS, map(_FORWARD, self._classes), self._forwards))
        )

    def are_same(self) -> bool:
        """Whether all values are the same objects, unchanged."""
        try:
            return (
                all(all(map(_IS, map(get, owners), old)) for get, owners, old in self._owned)
                and list(map(_VERSION, self._tensors)) == self._versions
                and list(map(len, self._containers)) == self._lengths
                and all(map(_IS, chain.from_iterable(self._containers), self._expected_items))
                and not any(name in namespace for namespace, name in self._absent)
                and all(getattr(c, n, MISSING) is v for c, n, v in self._of_classes)
                and all(equal(r.value, r.now(d[name])) for d, name, r in self._replaced)
            )
        except KeyError:
            return False

    def may_be_equal(self) -> bool:
        """False if an attribute has another value; True asks for a comparison of all."""
        for get, owners, expected in self._owned:
            try:
                pairs = zip(map(get, owners), expected, strict=True)
                if any(n is not o and is_plain(o) and not equal(o, n) for n, o in pairs):
                    return False
            except KeyError:
                return False
        return True
