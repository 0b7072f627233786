"""What a captured forward does besides returning results: attributes it assigns, hooks it calls.

Tensors of these effects are results of the program, after the user's. `carry_out` takes them off,
sets the attributes of the user's modules and calls the user's hooks, so that an auxiliary loss that
is kept on a module and an activation that a hook collects are real, with their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.ir.numbers import Expression, Origin, Values, evaluate


class _Mark:
    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


TENSOR = _Mark("<result>")
DELETED = _Mark("<deleted>")


@dataclass(frozen=True)
class Held:
    """A value made of results of the program, of numbers that vary, and of constants.

    Args:
        leaves: in the order of `spec`; `TENSOR` where the next result goes.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    def take(self, results: Iterator[Any], values: Values) -> Any:
        """The value, with the next results."""
        leaves = [next(results) if x is TENSOR else evaluate(x, values) for x in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Assignment:
    """An attribute that the forward assigns.

    Args:
        path: of the module; "" is the model.
        name: of the attribute; `state.h` for one of an object that the module holds.
        value: what it holds after each run; None for a counter.
        step: what each run adds to a counter.
        in_place: the list or dict that the module holds is changed: "add" to it, or "replace" its
            items.
    """

    path: str
    name: str
    value: Held | None
    step: int | float = 0
    in_place: Literal["", "add", "replace"] = ""

    def carry_out(self, model: torch.nn.Module, results: Iterator[Any], values: Values) -> None:
        """Set the attribute of the user's module."""
        owner: Any = model.get_submodule(self.path)
        *through, name = self.name.split(".")
        for part in through:
            owner = vars(owner)[part]
        # not by setattr, which registers parameters
        namespace = vars(owner)
        if self.value is None:
            namespace[name] = getattr(owner, name) + self.step
            return
        value = self.value.take(results, values)
        if self.in_place:
            container = namespace[name]
            if self.in_place == "replace":
                container.clear()
            add = container.update if isinstance(container, dict) else container.extend
            add(value)
        elif value is DELETED:
            namespace.pop(name, None)
        else:
            namespace[name] = value


@dataclass(frozen=True)
class HookCall:
    """A call of a hook that observes.

    Args:
        path: of the module.
        kind: the module's dict that holds the hook.
        key: of the hook in that dict.
        arguments: of the hook, after the module; None for those that it does not use.
        source: `file:line` of the hook.
        returns: it returns a value, too, which the program computes.
    """

    path: str
    kind: str
    key: int
    arguments: Held
    source: str
    returns: bool = False

    def carry_out(self, model: torch.nn.Module, results: Iterator[Any], values: Values) -> None:
        """Call the user's hook, if it is still there.

        Raises:
            CaptureError: it returned a value, or changed one in place, which it did not when the
                model was captured.
        """
        module = model.get_submodule(self.path)
        arguments = self.arguments.take(results, values)
        hook = getattr(module, self.kind).get(self.key)
        if hook is None:
            return
        versions = _versions(arguments)
        returned = hook(module, *arguments) is not None and not self.returns
        if returned or versions != _versions(arguments):
            raise CaptureError(
                f"the hook at {self.source} on {self.path or 'the model'} "
                f"{'returned a value' if returned else 'changed a value in place'}, but did not, "
                "or could not tell, when the model was captured: whether a hook changes a value "
                "must not depend on values of tensors. Change nothing, or compute the value with "
                "tensor operations (torch.where)"
            )


def _versions(values: Any) -> list[int]:
    tensors = (x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor))
    return [0 if t.is_inference() else t._version for t in tensors]


@dataclass(frozen=True)
class Effects:
    """Of one run, in this order: inputs are written, attributes are assigned, hooks are called.

    Args:
        inputs: positions of the flattened inputs that the forward changes in place.
        numbers: numbers that vary among the flattened results of the user, by position.
    """

    assigned: tuple[Assignment, ...] = ()
    hooks: tuple[HookCall, ...] = ()
    inputs: tuple[int, ...] = ()
    numbers: Mapping[int, Expression | Origin] = field(default_factory=dict)

    def carry_out(
        self,
        model: torch.nn.Module,
        results: Sequence[Any],
        leaves: Sequence[Any],
        values: Values,
    ) -> None:
        """
        Args:
            results: of the program, after the user's.
            leaves: the flattened inputs, as the caller passed them.
            values: of the numbers that vary, from before the run.
        """
        rest = iter(results)
        if self.inputs:
            with torch.no_grad():
                for k in self.inputs:
                    leaves[k].copy_(next(rest))
        for assignment in self.assigned:
            assignment.carry_out(model, rest, values)
        for call in self.hooks:
            call.carry_out(model, rest, values)
