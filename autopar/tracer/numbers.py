"""Python numbers that vary, in a forward that is being captured.

A `TracedNumber` stands in the place of an attribute or an argument. It says that it is a float or
an int, and arithmetic on it gives another one. Beside a tensor, it becomes a tensor of no dims in
the dtype to which the operator would convert the number, so that results keep their dtypes and
values. Whatever else needs the number itself (`if`, `range`, `math.exp`, an f-string, an operator
that takes no tensor) gets it and leaves a `Condition`: no value is frozen unnoticed.
"""

from __future__ import annotations

import dis
import functools
import math
import operator
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.ir.guards import on_own_thread
from autopar.ir.numbers import (
    Argument,
    Attribute,
    Condition,
    Expression,
    Numbers,
    Origin,
    is_number,
)
from autopar.ir.reads import MISSING, equal, owner_of, value_of
from autopar.tracer.source import current_line, is_users

# An expression of more operations is evaluated during the capture.
_LARGEST = 64

_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_OF_INTEGERS = ("and_", "or_", "xor", "lshift", "rshift")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_OF_ONE = {
    "__neg__": operator.neg, "__pos__": operator.pos, "__abs__": abs, "__round__": round,
    "__trunc__": math.trunc, "__floor__": math.floor, "__ceil__": math.ceil,
}  # fmt: skip
_ASKING: dict[str, Callable[..., Any]] = {
    "__bool__": bool, "__int__": int, "__index__": operator.index, "__float__": float,
    "__str__": str, "__repr__": repr, "__format__": format, "__hash__": hash,
}  # fmt: skip

# Operators in which a tensor of no dims means the same as a number: where the number may stand, by
# position and by keyword.
_WHERE = {
    **dict.fromkeys(
        ("add", "sub", "mul", "div", "true_divide", "divide", "multiply", "subtract", "pow",
         "floor_divide", "remainder", "lt", "le", "gt", "ge", "eq", "ne"),
        frozenset((0, 1, "other", "exponent", "self")),
    ),
    "where": {1, 2, "input", "other"},
    "lerp": {2, "weight"},
    "clamp": {1, 2, "min", "max"},
    "masked_fill": {2, "value"},
}  # fmt: skip
_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}
_ALSO_KNOWN_AS = {
    "radd": "add", "rsub": "sub", "rmul": "mul", "truediv": "div", "rtruediv": "div", "rdiv": "div",
    "rpow": "pow", "floordiv": "floor_divide", "mod": "remainder", **_IN_PLACE,
}  # fmt: skip
_ROUNDED_ONCE = ("add", "sub", "mul", "div", "true_divide", "divide", "multiply", "subtract")


class TracedNumber:
    """A number that varies, or what Python computes from it.

    Args:
        expression: of it.
        value: at the call that is captured.
        numbers: of the capture.
    """

    __slots__ = ("expression", "numbers", "value")

    def __init__(self, expression: Expression | Origin, value: Any, numbers: TracedNumbers) -> None:
        self.expression, self.value, self.numbers = expression, value, numbers

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """For `isinstance`, the number's type."""
        return type(self.value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, args, kwargs = substituted(func, args, kwargs or {}, within=False)
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.value, name)
        self.settled()
        return attribute

    def __copy__(self) -> TracedNumber:
        return self

    def __deepcopy__(self, memo: Any) -> TracedNumber:
        return self

    def settled(self) -> Any:
        """The value, on which the program depends from here on."""
        return self.numbers.answer(self.expression, self.value)

    def computed(self, function: Callable[..., Any], *operands: Any) -> Any:
        """What a function makes of the number, or `NotImplemented`."""
        if not all(is_number(x) or type(x) in (bool, TracedNumber) for x in operands):
            return NotImplemented  # a tensor's operator takes over
        value = function(*(x.value if type(x) is TracedNumber else x for x in operands))
        expressions = (x.expression if type(x) is TracedNumber else x for x in operands)
        expression = Expression(function, tuple(expressions))
        if not is_number(value) or expression.size > _LARGEST:
            return self.numbers.answer(expression, value)
        return TracedNumber(expression, value, self.numbers)

    def asked(self, function: Callable[..., Any], *operands: Any) -> Any:
        expression = Expression(function, (self.expression, *operands))
        return self.numbers.answer(expression, function(self.value, *operands))


def _define() -> None:
    """Give `TracedNumber` the operators of a number."""

    def binary(function: Any, reflected: bool = False) -> Any:
        if reflected:
            return lambda self, other: self.computed(function, other, self)
        return lambda self, other: self.computed(function, self, other)

    def asking(function: Any) -> Any:
        return lambda self, *operands: self.asked(function, *operands)

    def of_one(function: Any) -> Any:
        return lambda self, *operands: self.computed(function, self, *operands)

    for name in (*_ARITHMETIC, *_OF_INTEGERS):
        function, plain = getattr(operator, name), name.rstrip("_")
        setattr(TracedNumber, f"__{plain}__", binary(function))
        setattr(TracedNumber, f"__r{plain}__", binary(function, reflected=True))
    for name in _COMPARISONS:
        setattr(TracedNumber, f"__{name}__", binary(getattr(operator, name)))
    for name, function in _OF_ONE.items():
        setattr(TracedNumber, name, of_one(function))
    for name, function in _ASKING.items():
        setattr(TracedNumber, name, asking(function))


_define()


class TracedNumbers:
    """The numbers of one capture that vary.

    Args:
        origins: of numbers; those that hold none are left alone.

    Attributes:
        hook: number of the hook that is running; None in the forward.
    """

    def __init__(self, origins: Collection[Origin]) -> None:
        self._origins = origins
        self._types: dict[Origin, type] = {}
        self._conditions: list[tuple[int | None, Condition]] = []
        self._tensors: dict[tuple[Any, torch.dtype], tuple[torch.Tensor, Any]] = {}
        self._finished = False
        self.hook: int | None = None

    @property
    def present(self) -> bool:
        """Whether the forward can meet any."""
        return bool(self._types)

    def at(self, origin: Origin, value: Any) -> Any:
        """What the forward finds at an origin."""
        if origin not in self._origins or not is_number(value):
            return value
        self._types[origin] = type(value)
        return TracedNumber(origin, value, self)

    def among(self, inputs: Any) -> Any:
        """The inputs of a call, with traced numbers."""
        leaves, spec = pytree.tree_flatten(inputs)
        found = [self.at(Argument(k), x) for k, x in enumerate(leaves)]
        return pytree.tree_unflatten(found, spec) if self.present else inputs

    @contextmanager
    def substituted(self, model: torch.nn.Module) -> Iterator[None]:
        """While on, a traced copy has traced numbers in its attributes."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for origin in self._origins:
                if not isinstance(origin, Attribute):
                    continue
                value = value_of(model, origin.path, origin.name)
                if type(value) is TracedNumber:  # another name of an object's attribute
                    self._types[origin] = type(value.value)
                if value is MISSING or not is_number(value):
                    continue
                owner, name = owner_of(model, origin.path, origin.name)
                if name in vars(owner):
                    before.append((vars(owner), name, value))
                    vars(owner)[name] = self.at(origin, value)
            yield
        finally:
            self._finished = True
            for namespace, name, value in before:  # the copy may share objects with the model
                namespace[name] = value

    def answer(self, expression: Expression | Origin, value: Any) -> Any:
        """Python asks for a value.

        Raises:
            CaptureError: after the capture, where the answer would be that of the capture.
        """
        self._check()
        known = (c for hook, c in self._conditions if hook == self.hook)
        if not any(c.expression == expression and equal(c.value, value) for c in known):
            line = current_line()
            condition = Condition(expression, value, str(line), line.text)
            self._conditions.append((self.hook, condition))
        return value

    def tensor(self, number: TracedNumber, dtype: torch.dtype) -> torch.Tensor:
        """A constant of the graph that takes the number's value at each call."""
        self._check()
        key = number.expression, dtype
        if key not in self._tensors:
            value = number.value
            t = on_own_thread(lambda: torch.tensor(value, dtype=dtype))
            self._tensors[key] = t, value
        return self._tensors[key][0]

    def _check(self) -> None:
        if self._finished:
            raise CaptureError(
                f"{current_line()}: uses a number that the forward kept from the capture; let the "
                "forward keep it on a module, or return it"
            )

    def settle(self, constants: Collection[Any]) -> None:
        """Python asks for a value that is computed from these constants of the graph."""
        for (expression, _), (t, value) in self._tensors.items():
            if any(t is c for c in constants):
                self.answer(expression, value)

    def of_graph(
        self, constants: Mapping[str, torch.Tensor], observing: Collection[int | None]
    ) -> Numbers:
        """What the captured program depends on.

        Args:
            constants: of the graph.
            observing: hooks that are not part of the program.
        """
        by_address = {t.data_ptr(): key for key, (t, _) in self._tensors.items()}
        found = {
            name: by_address[t.data_ptr()]
            for name, t in constants.items()
            if not t.is_meta and t.data_ptr() in by_address
        }
        conditions = tuple(c for hook, c in self._conditions if hook not in observing)
        return Numbers(dict(self._types), found, conditions)


@functools.lru_cache
def asks_for_types(code: types.CodeType) -> bool:
    """Whether code calls `type(x)`, which does not take a traced number for a float."""
    instructions = dis.get_instructions(code)
    return any(i.argval == "type" and i.opname.startswith("LOAD_GLOBAL") for i in instructions)


def refuse_types(model: torch.nn.Module) -> None:
    """Refuse numbers that vary where code that the forward may run calls `type(x)`: methods of the
    modules, and the functions of the user's that these name.

    Raises:
        CaptureError: some code does.
    """
    classes = dict.fromkeys(c for m in model.modules() for c in type(m).__mro__)
    waiting = [f for c in classes for f in vars(c).values() if isinstance(f, types.FunctionType)]
    known: set[types.CodeType] = set()
    while waiting:
        function = waiting.pop()
        code = function.__code__
        if code in known or not is_users(code.co_filename):
            continue
        known.add(code)
        names = _names(code)
        if "type" in names:
            raise CaptureError(
                f"{code.co_filename}:{code.co_firstlineno}: {code.co_name} calls type(x), which "
                "does not take a number that varies for a float or an int; use isinstance"
            )
        named = (function.__globals__.get(name) for name in names)
        waiting += [f for f in named if isinstance(f, types.FunctionType)]


def _names(code: types.CodeType) -> set[str]:
    inner = (x for x in code.co_consts if isinstance(x, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def has_numbers(args: Any, kwargs: Any) -> bool:
    """Whether a call has traced numbers among its arguments."""
    return any(type(x) is TracedNumber for x in pytree.tree_leaves((args, kwargs)))


def settled(tree: Any) -> Any:
    """The values of the traced numbers in it, on which the program depends from here on."""
    return pytree.tree_map_only(TracedNumber, TracedNumber.settled, tree)


def substituted(func: Any, args: Any, kwargs: Any, *, within: bool = True) -> tuple[Any, Any, Any]:
    """A call with tensors, or values, for its traced numbers.

    Args:
        within: a function of torch that is written in Python keeps them, because its operators get
            them. False if it passed them on itself.
    """
    name = getattr(func, "__name__", "").strip("_")
    in_place = name in _IN_PLACE or re.fullmatch(r".*[^_]_", func.__name__) is not None
    name = _ALSO_KNOWN_AS.get(name, name)
    partner = _partner(func, name, args, kwargs)
    numbers = {k: x for k, x in (*enumerate(args), *kwargs.items()) if type(x) is TracedNumber}
    taken = partner is not None and numbers and numbers.keys() <= _WHERE[name]
    if taken and not (name == "clamp" and _mixed_bounds(args, kwargs)):
        dtypes = {_dtype(partner, x.value) for x in numbers.values()}
        dtype = next(iter(dtypes))
        reduced = dtype.is_floating_point and torch.finfo(dtype).bits < 32
        rounded_once = name in _ROUNDED_ONCE and not in_place
        keeps = name != "masked_fill" or dtype == partner.dtype
        if len(dtypes) == 1 and keeps and (not reduced or rounded_once):
            kind = torch.float32 if reduced else dtype
            made = {k: x.numbers.tensor(x, kind) for k, x in numbers.items()}
            args = tuple(made.get(k, x) for k, x in enumerate(args))
            kwargs = {k: made.get(k, x) for k, x in kwargs.items()}
            return (_in_float32(func, dtype) if reduced else func), args, kwargs
    if within and isinstance(func, types.FunctionType) and name not in _WHERE:
        return func, args, kwargs
    return func, *settled((tuple(args), kwargs))


def _partner(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The tensor that decides to which dtype a number is converted; None if there is none."""
    if name not in _WHERE or isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return None  # an operator of the user may take the value of a tensor
    operands = [*args[1:], *kwargs.values()] if name == "where" else [*args, *kwargs.values()]
    return next((x for x in operands if isinstance(x, torch.Tensor)), None)


def _mixed_bounds(args: Any, kwargs: Any) -> bool:
    """Whether one bound is a constant, for which there is no operator."""
    return any(is_number(x) for x in (*args[1:], *kwargs.values()))


def _dtype(partner: torch.Tensor, value: Any) -> torch.dtype:
    """In which dtype an operator on a tensor and a number computes."""
    dtype = partner.dtype
    if dtype.is_floating_point or dtype.is_complex:
        return dtype
    if type(value) is float:
        return torch.get_default_dtype()
    return torch.int64 if dtype == torch.bool else dtype


def _in_float32(func: Any, dtype: torch.dtype) -> Any:
    """The operator on tensors of a lower precision, which converts only its result."""

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        wide = pytree.tree_map_only(
            torch.Tensor, lambda t: t.float() if t.dtype == dtype else t, (args, kwargs)
        )
        return func(*wide[0], **wide[1]).to(dtype)

    return call
