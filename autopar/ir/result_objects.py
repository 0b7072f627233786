"""Objects and constants among the results of a model, as nodes of their tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class ResultObject:
    """An object that the model makes at each call (a key-value cache).

    Args:
        cls: its class.
        namespace: what it holds.
    """

    cls: type
    namespace: dict[str, Any]

    def build(self) -> Any:
        """The object, without a call of its `__init__`."""
        x: Any = object.__new__(self.cls)
        x.__dict__.update({name: realized(value) for name, value in self.namespace.items()})
        return x


@dataclass(frozen=True)
class ResultConstant:
    """A value that is the same at each call (a dtype)."""

    value: Any


pytree.register_pytree_node(
    ResultObject,
    lambda x: (list(x.namespace.values()), (x.cls, tuple(x.namespace))),
    lambda values, context: ResultObject(context[0], dict(zip(context[1], values, strict=True))),
    serialized_type_name="autopar.ResultObject",
)
pytree.register_pytree_node(
    ResultConstant,
    lambda x: ([], x.value),
    lambda _, value: ResultConstant(value),
    serialized_type_name="autopar.ResultConstant",
)


def _is_node(x: Any) -> bool:
    return isinstance(x, ResultObject | ResultConstant)


def realized(results: Any) -> Any:
    """Results with the objects and constants themselves."""

    def real(x: Any) -> Any:
        if isinstance(x, ResultObject):
            return x.build()
        return x.value if isinstance(x, ResultConstant) else x

    return pytree.tree_map(real, results, is_leaf=_is_node)


def has_nodes(spec: pytree.TreeSpec) -> bool:
    """Whether results of this structure have such objects."""
    leaves = pytree.tree_unflatten([None] * spec.num_leaves, spec)
    return any(map(_is_node, pytree.tree_leaves(leaves, is_leaf=_is_node)))
