"""Python numbers that are read off a recording before it has run.

`param.norm().item()` would end a recording at each parameter. `LazyNumber` is the node of a
`torch.SymFloat`, torch's own type of numbers that are not known yet. Arithmetic on it gives a
formula, which the program computes in Python's own numbers; operators take it for a number; and
whatever else Python wants of it (a comparison, `float`, `math.sqrt`) runs the recording.

`max` and `min` of Python compare, so a module whose optimizer steps sees others in their place
meanwhile (`lazy_max_and_min`).

What torch asks of the node of a `SymFloat` is private to it; tested with 2.13.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autopar.optim.recording import FORMULAS


class LazyNumber:
    """The node of a `torch.SymFloat`.

    Args:
        recorder: gives the numbers of values.
        name: of the function in `FORMULAS`; None for what a value holds.
        operands: a value; or those of the function, `LazyNumber`s and Python numbers.
    """

    def __init__(self, recorder: Any, name: str | None, *operands: Any) -> None:
        self.recorder, self.name, self.operands = recorder, name, operands
        self.known: float | None = None

    # -- what torch asks of a node ----------------------------------------------------------------

    def is_int(self) -> bool:
        return False

    def is_float(self) -> bool:
        return True

    def is_bool(self) -> bool:
        return False

    def is_constant(self) -> bool:
        return False

    def is_nested_int(self) -> bool:
        return False

    def is_symbolic(self) -> bool:
        return True

    def maybe_as_int(self) -> None:
        return None

    def maybe_as_float(self) -> None:
        return None

    def wrap_float(self, number: float) -> LazyNumber:
        node = LazyNumber(self.recorder, None)
        node.known = number
        return node

    wrap_int = wrap_float

    def guard_float(self, file: str = "", line: int = 0) -> float:
        """The number, now."""
        if self.known is None:
            if self.name is None:
                self.known = float(self.recorder.number(self.operands[0]))
            else:
                known = (x.guard_float() if isinstance(x, LazyNumber) else x for x in self.operands)
                self.known = FORMULAS[self.name](*known)
        return self.known

    def _graph_repr(self) -> str:
        return repr(self.guard_float())

    str = _graph_repr


def _function(name: str) -> Callable[..., LazyNumber]:
    def node_method(self: Any, *others: Any) -> LazyNumber:
        return LazyNumber(self.recorder, name, self, *others)

    return node_method


class _Truth:
    """The node of a `torch.SymBool` that is known."""

    def __init__(self, value: bool) -> None:
        self._value = value

    def is_int(self) -> bool:
        return False

    is_float = is_int

    def is_bool(self) -> bool:
        return True

    is_constant = is_bool

    def bool_(self) -> bool:
        return self._value

    def guard_bool(self, file: str, line: int) -> bool:
        return self._value

    guard_or_false = guard_or_true = expect_true = guard_bool


def _comparison(name: str) -> Callable[[LazyNumber, LazyNumber], _Truth]:
    compare: Callable[[Any, Any], bool] = getattr(operator, name)

    def node_method(self: LazyNumber, other: LazyNumber) -> _Truth:
        return _Truth(compare(self.guard_float(), other.guard_float()))

    return node_method


for _name, _method in (
    ("add", "add"), ("sub", "sub"), ("mul", "mul"), ("truediv", "float_truediv"),
    ("pow", "float_pow"), ("neg", "neg"), ("abs", "abs"),
):  # fmt: skip
    setattr(LazyNumber, _method, _function(_name))
for _name in ("gt", "ge", "lt", "le", "eq", "ne"):
    setattr(LazyNumber, _name, _comparison(_name))


def number_of_value(x: torch.Tensor, recorder: Any) -> torch.SymFloat:
    """The number that a scalar of a recording holds."""
    return torch.SymFloat(LazyNumber(recorder, None, x))


# -- max and min ----------------------------------------------------------------------------------


def _node(x: Any) -> Any:
    return x.node if isinstance(x, torch.SymFloat) else x


def _is_lazy(x: Any) -> bool:
    return isinstance(x, torch.SymFloat) and isinstance(x.node, LazyNumber)


def _lazy_choice(name: str) -> Callable[..., Any]:
    plain: Callable[..., Any] = getattr(builtins, name)
    better = operator.gt if name == "max" else operator.lt

    def choice(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and not kwargs:
            left, right = args
            if any(not getattr(x, "ndim", 1) and getattr(x, "is_lazy", False) for x in args):
                # of tensors: the second one if it is better, else the first, as Python has it
                a, b = (torch.as_tensor(x, dtype=torch.float64) if type(x) is float else x
                        for x in args)  # fmt: skip
                return torch.where(better(b, a), b, a)
            lazy = next((x for x in args if _is_lazy(x)), None)
            if lazy is not None and all(_is_lazy(x) or type(x) in (int, float) for x in args):
                node = LazyNumber(lazy.node.recorder, name, _node(left), _node(right))
                return torch.SymFloat(node)
        return plain(*args, **kwargs)

    return choice


_CHOICES = {name: _lazy_choice(name) for name in ("max", "min")}


@contextmanager
def lazy_max_and_min(module: str) -> Iterator[None]:
    """While on, `max` and `min` in a module take numbers that are not known yet.

    A module that defines these names itself stays as it is.
    """
    names = vars(sys.modules[module]) if module in sys.modules else {}
    put = {name: choice for name, choice in _CHOICES.items() if name not in names}
    names.update(put)
    try:
        yield
    finally:
        for name in put:
            del names[name]
