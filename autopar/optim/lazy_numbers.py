"""Python numbers that are read off a recording before it has run.

`param.norm().item()` would end a recording at each parameter. `LazyNumber` is a node of a
`torch.SymFloat`, torch's own type of numbers that are not known yet: arithmetic on it is recorded,
operators take it for a number, and whatever else Python wants of it (a comparison, `float`,
`math.sqrt`) runs the recording and gives the number.

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


class LazyNumber:
    """The node of a `torch.SymFloat`.

    Args:
        value: a float64 scalar of the recording; a number, if it is known.
        recorder: knows the value's number.
    """

    def __init__(self, value: Any, recorder: Any) -> None:
        self.value, self._recorder = value, recorder

    @staticmethod
    def read_off(x: torch.Tensor, recorder: Any) -> torch.SymFloat:
        """The number that a scalar of the recording holds."""
        with recorder.on():
            return torch.SymFloat(LazyNumber(x.reshape(()).to(torch.float64), recorder))

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
        return LazyNumber(number, self._recorder)

    wrap_int = wrap_float

    def guard_float(self, file: str, line: int) -> float:
        if isinstance(self.value, torch.Tensor):
            with torch.no_grad():
                self.value = self._recorder.number(self.value)
        return float(self.value)

    def _graph_repr(self) -> str:
        return repr(self.guard_float("", 0))

    str = _graph_repr


def number_or_none(x: torch.SymFloat) -> torch.Tensor | None:
    """The value that holds a number, if it is one of a recording and not known yet."""
    node = x.node
    value = node.value if isinstance(node, LazyNumber) else None
    return value if isinstance(value, torch.Tensor) else None


def _operands(a: Any, b: Any) -> tuple[Any, Any, Any] | None:
    """Two numbers as the recording has them, with its recorder; None if neither is lazy."""
    values, recorder = [], None
    for x in (a, b):
        if isinstance(x, torch.SymFloat) and isinstance(x.node, LazyNumber):
            recorder = x.node._recorder
            values.append(x.node.value)
        elif type(x) in (int, float, bool):
            values.append(float(x))
        else:
            return None
    if recorder is None or not any(isinstance(v, torch.Tensor) for v in values):
        return None
    return values[0], values[1], recorder


def _recorded(a: Any, b: Any, compute: Callable[[Any, Any], Any]) -> Any:
    found = _operands(a, b)
    if found is None:
        return NotImplemented
    left, right, recorder = found
    with recorder.on():
        return torch.SymFloat(LazyNumber(compute(left, right), recorder))


def _binary(name: str) -> Callable[[LazyNumber, LazyNumber], LazyNumber]:
    compute: Callable[[Any, Any], Any] = getattr(operator, name)

    def node_method(self: LazyNumber, other: LazyNumber) -> LazyNumber:
        with self._recorder.on():
            return LazyNumber(compute(self.value, other.value), self._recorder)

    return node_method


def _unary(compute: Callable[[Any], Any]) -> Callable[[LazyNumber], LazyNumber]:
    def node_method(self: LazyNumber) -> LazyNumber:
        with self._recorder.on():
            return LazyNumber(compute(self.value), self._recorder)

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
        return _Truth(compare(self.guard_float("", 0), other.guard_float("", 0)))

    return node_method


for _name in ("add", "sub", "mul"):
    setattr(LazyNumber, _name, _binary(_name))
LazyNumber.float_truediv = _binary("truediv")  # type: ignore[attr-defined]
LazyNumber.float_pow = _binary("pow")  # type: ignore[attr-defined]
LazyNumber.neg = _unary(operator.neg)  # type: ignore[attr-defined]
LazyNumber.abs = _unary(operator.abs)  # type: ignore[attr-defined]
for _name in ("gt", "ge", "lt", "le", "eq", "ne"):
    setattr(LazyNumber, _name, _comparison(_name))


# -- max and min ----------------------------------------------------------------------------------


def _chosen(better: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """What `max` or `min` gives of two: the second one if it is better, else the first, also where
    one is not a number."""

    def choose(a: Any, b: Any) -> Any:
        a, b = (x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)
                for x in (a, b))  # fmt: skip
        return torch.where(better(b, a), b, a)

    return choose


def is_lazy(x: torch.Tensor) -> bool:
    """Whether a tensor is a number whose elements are not known yet."""
    return not x.ndim and getattr(x, "is_lazy", False)


def _lazy_choice(name: str) -> Callable[..., Any]:
    plain: Callable[..., Any] = getattr(builtins, name)
    choose = _chosen(operator.gt if name == "max" else operator.lt)

    def choice(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and not kwargs:
            if any(isinstance(x, torch.Tensor) and is_lazy(x) for x in args):
                return choose(*args)
            result = _recorded(args[0], args[1], choose)
            if result is not NotImplemented:
                return result
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
