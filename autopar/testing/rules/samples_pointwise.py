"""Calls of pointwise ops, drawn from their schemas."""

from __future__ import annotations

import math
from typing import Any

import torch

from autopar.testing.rules.draw import Arguments, Draw
from autopar.testing.rules.rows import (
    Argument,
    any_kind,
    calls,
    flag,
    integers,
    normal,
    one_of,
    scalar,
)  # fmt: skip

# Defined, and smooth enough, on all numbers; the others draw from (0.1, 0.9).
_TOTAL = frozenset(
    "add sub mul neg relu relu6 gelu silu tanh sigmoid where maximum minimum fmax fmin abs exp sin "
    "cos erf square clamp clamp_min clamp_max clip max min hardtanh hardsigmoid hardswish softplus "
    "elu selu celu leaky_relu mish masked_fill threshold sign sgn floor ceil round trunc frac eq "
    "ne lt le gt ge isnan isinf isfinite nan_to_num atan asinh sinh expm1 lerp rsub addcmul hypot "
    "copysign logaddexp positive clone logical_and logical_or logical_not signbit heaviside "
    "hardshrink softshrink log_sigmoid deg2rad rad2deg type_as multiply subtract fill".split()
)
_INTEGER = frozenset(
    "bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift "
    "__and__ __or__ __xor__ __lshift__ __rshift__ gcd lcm".split()
)
_COMPARISON = frozenset("eq ne lt le gt ge".split())
# Shift of the (0.1, 0.9) that an op is defined on.
_SHIFT = {"acosh": 1.0, "special_zeta": 1.2, "mvlgamma": 2.0, "logit_backward": 0.0}
# Arguments that a schema gives no clue about.
_STRINGS: dict[str, list[str | None]] = {
    "approximate": ["none", "tanh"],
    "rounding_mode": [None, "floor", "trunc"],
}
_INTS = {"decimals": 2, "n": 1, "p": 2}
_STRANGE = [math.nan, math.inf, -math.inf]
_POWERS = [2, 3, 0.5, -1]
# Their second operand may be a number (x + 1 is captured as add.Tensor).
_NUMBER_TOO = frozenset("add sub mul div".split())


def draw_pointwise(op: torch._ops.OpOverload, draw: Draw) -> Arguments:
    """Arguments of any pointwise op: tensors that broadcast, numbers where the op is defined."""
    name = str(op).split(".")[1]
    shape = draw.shape(0, 4)
    integer = name in _INTEGER or (name in _COMPARISON and draw.chance())
    booleans = integer and not name.endswith(("shift__", "shift", "gcd", "lcm")) and draw.chance()
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    tensors = 0
    for position, argument in enumerate(op._schema.arguments):
        kind = str(argument.type)
        value: Any
        if "Tensor" in kind:
            if kind.startswith("Optional") and draw.chance(30) and tensors > 1:
                value = None
            elif tensors and name in _NUMBER_TOO and draw.chance(15):
                value = draw.choice([2, 0.5, -3.0])
            else:
                value = _tensor(name, argument.name, draw, shape, integer, booleans, tensors)
            tensors += 1
        elif argument.has_default_value() and argument.name not in _STRINGS and draw.chance(60):
            if argument.name != "min":
                continue
            value = -0.3
        elif argument.name in _STRINGS:
            value = draw.choice(_STRINGS[argument.name])
        elif argument.name in _INTS and "int" in kind:
            value = _INTS[argument.name]
        elif argument.name == "exponent":
            value = draw.choice(_POWERS)
        elif "number" in kind or "Scalar" in kind or "float" in kind:
            value = _number(name, argument.name, draw, integer, booleans)
        else:
            continue
        if argument.kwarg_only or len(args) < position:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _tensor(
    op: str, name: str, draw: Draw, shape: list[int], integer: bool, booleans: bool, index: int
) -> torch.Tensor:
    shape = draw.broadcast(shape)
    if name in ("condition", "mask") or op.startswith("logical") or booleans:
        return draw.booleans(shape)
    if integer:
        return draw.integers(shape, 1 if op in ("gcd", "lcm") or "shift" in op else -3, 4)
    if op == "ldexp" and index:
        return draw.integers(shape, -3, 4).double()
    if op in ("addcdiv", "div", "true_divide", "divide", "fmod", "remainder", "floor_divide"):
        sign = draw.integers(shape, 0, 2) * 2 - 1
        return draw.uniform(shape, 0.3, 2.0) * sign if index else draw.normal(*shape)
    if op in ("add", "mul", "sub") and index and draw.chance(10):
        return draw.integers(shape, -3, 4)
    if op in _COMPARISON:  # with ties
        return draw.integers(shape, -3, 4).double()
    if "polynomial" in op and index:  # their degree
        return draw.integers(shape, 0, 5).double()
    if op == "nan_to_num":
        return draw.normal(*shape).masked_fill(draw.booleans(shape, 0.3), draw.choice(_STRANGE))
    if op in _TOTAL:
        return draw.normal(*shape)
    return draw.uniform(shape) + _SHIFT.get(op, 0.0)


def _number(op: str, name: str, draw: Draw, integer: bool, booleans: bool) -> Any:
    if booleans:
        return draw.chance()
    if integer:
        return draw.integer(1, 2)
    if name in ("beta", "eps") and op.startswith("logit"):
        return 1e-3
    if op == "hardtanh":
        return -0.7 if name == "min_val" else 0.4
    if op in ("clamp", "clip"):
        return -0.5 if name == "min" else 0.6
    if op == "special_zeta":
        return 1.7
    if "polynomial" in op and name == "n":
        return draw.choice([0, 2, 3])
    if op == "masked_fill":
        return draw.choice([0, -1.5, float("-inf")])
    if op == "where":
        return draw.choice([0, 0.0, 1.5])
    if op in ("hardshrink", "softshrink"):
        return 0.3
    if op in _TOTAL:
        return draw.choice([2, 0.5, -1.5])
    return draw.choice([0.7, 2, 1.5])


# -- ops whose schema does not tell enough --------------------------------------------------------


def _broadcasting(kind: Argument) -> Argument:
    """Of a shape that broadcasts to the operand's."""
    return lambda draw, shape: kind(draw, draw.broadcast(shape))


def _complex(draw: Draw, shape: list[int]) -> torch.Tensor:
    return torch.complex(draw.normal(*shape), draw.normal(*shape))


def _larger(draw: Draw) -> list[int]:
    """Shapes with enough elements to tell two draws apart."""
    return [n * draw.choice([1, 4]) for n in draw.shape(0, 4)]


_DTYPE = one_of(None, None, torch.int64)

calls("zeros_like.default ones_like.default empty_like.default", (0, 4), any_kind, dtype=_DTYPE,
      pin_memory=one_of(None, None, False))  # fmt: skip
calls("full_like.default", (0, 4), normal, one_of(2, -1.5, float("-inf")))
calls("rand_like.default randn_like.default rrelu.default", (0, 4), normal)
calls("clone.default", (0, 4), any_kind, memory_format=one_of(None, torch.contiguous_format))
calls(
    "type_as.default", (0, 4), any_kind,
    lambda draw, shape: draw.normal(*draw.shape(0, 3)).to(
        draw.choice([torch.float64, torch.float32])
    ),
)  # fmt: skip
calls("isin.Tensor_Tensor", (0, 3), integers(0, 9),
      lambda draw, shape: draw.integers(draw.shape(0, 2), 0, 9))  # fmt: skip
calls("isin.Tensor_Scalar", (0, 3), integers(0, 4), 2)
calls("fill.Scalar", (0, 4), any_kind, one_of(0, 1))
calls("fill.Tensor", (0, 4), normal, scalar)
calls("masked_fill.Tensor", (0, 4), normal, _broadcasting(Draw.booleans), scalar)
calls(
    "prelu.default", (1, 4), normal,
    lambda draw, shape: draw.normal(shape[1] if len(shape) > 1 and draw.chance(70) else 1),
)  # fmt: skip
calls("view_as_real.default", (0, 3), _complex)
calls("view_as_complex.default", lambda draw: [*draw.shape(0, 3), 2], normal)
calls("polar.default", (0, 3), Draw.uniform, _broadcasting(normal))
calls("native_dropout.default", _larger, Draw.uniform, one_of(0.0, 0.1, 0.5, 0.9), flag)
calls(
    "dropout.default feature_alpha_dropout.default", _larger, Draw.uniform,
    one_of(0.0, 0.1, 0.5), flag,
)  # fmt: skip
calls("bernoulli.p", (0, 4), normal, one_of(0.1, 0.5, 0.8))
