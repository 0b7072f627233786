"""Blocks that may be copies of each other: modules of one list with the same classes, tensors and
attributes, but for attributes that are to be watched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_TABLES = ("_parameters", "_buffers", "_modules")

# A module inside of a block, by its path, and the name of an attribute of it.
Attribute = tuple[str, str]


@dataclass(frozen=True)
class Block:
    """One of several modules that may be copies.

    Args:
        module: it.
        parts: its modules, by their path inside; its own is empty.
        watched: attributes that are not the same in all of its kind.
    """

    module: torch.nn.Module
    parts: Mapping[str, torch.nn.Module]
    watched: set[Attribute]

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

    @cached_property
    def paths(self) -> dict[int, str]:
        """Where its modules stand, by `id`."""
        return {id(part): path for path, part in self.parts.items()}

    def alike(self, other: Block, attributes: set[Attribute]) -> bool:
        """Whether attributes are the same in another block."""
        return all(
            _same(self.parts[path].__dict__[name], other.parts[path].__dict__[name])
            for path, name in attributes
        )

    def state(self) -> dict[Attribute, Any]:
        """Which values the attributes have, and lists and tables of them hold."""
        found: dict[Attribute, Any] = {}
        for path, part in self.parts.items():
            for name, value in part.__dict__.items():
                held: Sequence[Any] = ()
                if isinstance(value, list | tuple | set | frozenset):
                    held = [*value]
                elif isinstance(value, dict):
                    held = [*value, *value.values()]
                found[path, name] = (id(value), [id(x) for x in held])
        return found


def kinds_of(module: torch.nn.Module) -> Iterator[list[Block]]:
    """Blocks that may be copies of each other, by list of modules."""
    for container in module.modules():
        children = [m for name, m in container._modules.items() if name.isdigit() and m is not None]
        kinds: list[list[Block]] = []
        for child in dict.fromkeys(children):
            if not any(True for _ in child.children()):
                continue  # copying a layer or two wins nothing
            block = Block(child, dict(child.named_modules()), set())
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


def described(t: torch.Tensor) -> tuple[Any, ...]:
    """All that blocks can tell of a tensor without its values."""
    return tuple(t.shape), t.stride(), t.storage_offset(), t.dtype, t.device


def _differences(first: Block, other: Block) -> set[Attribute] | None:
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
        if type(s) is not type(t) or described(s) != described(t):
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
    if isinstance(a, PLAIN):
        return bool(a == b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, set | frozenset):
        return all(isinstance(x, PLAIN) for x in a | b) and a == b
    return False
