"""Which strategies the sharding rules allow for a recorded call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from autopar.optim.recording import Call, Ref, Value, bound
from autopar.sharding.rule import OpRule, Strategy
from autopar.sharding.rules import Call as RuleCall
from autopar.sharding.rules import bind
from autopar.sharding.strategies import strategies


def allowed_strategies(
    call: Call, values: Sequence[Value], mesh: tuple[int, ...]
) -> list[Strategy] | None:
    """Strategies that run the operator itself; None if it has no rule."""
    operands = operands_of(call)
    present = [None if n is None else values[n] for n in operands]
    made = [values[n] for n in call.results]
    rule = _rule_of(
        call.op, _described(call, values),
        tuple(None if v is None else v.shape for v in present), tuple(v.shape for v in made),
        tuple(None if v is None else v.stride for v in present),
        tuple(v is not None and v.dtype is torch.bool for v in present),
    )  # fmt: skip
    if rule is None:
        return None

    def allowed(strategy: Strategy) -> bool:
        if strategy.lowered or any(s is not None and s.partial for s in strategy.inputs):
            return False
        layouts: dict[int, Any] = {}  # a tensor that is given twice is in one layout
        return all(
            n is None or layouts.setdefault(n, spec) == spec
            for n, spec in zip(operands, strategy.inputs, strict=True)
        )

    floating = tuple(v.dtype.is_floating_point or v.dtype.is_complex for v in made)
    return [s for s in _strategies(rule, mesh, floating) if allowed(s)]


def operands_of(call: Call) -> list[int | None]:
    """Tensors among the arguments in schema order; lists flattened, None where absent."""
    arguments, found = bound(call), []
    for argument in call.op._schema.arguments:
        if "Tensor" in str(argument.type):
            value = arguments.get(argument.name)
            items = value if isinstance(value, tuple) else (value,)
            found += [x.number if isinstance(x, Ref) else None for x in items]
    return found


def _described(call: Call, values: Sequence[Value]) -> tuple[tuple[str, Any], ...]:
    """Arguments by name, tensors as their shapes."""

    def shape(place: Any) -> Any:
        return values[place.number].shape if isinstance(place, Ref) else place

    def described(value: Any) -> Any:
        return tuple(map(described, value)) if isinstance(value, tuple) else shape(value)

    return tuple((k, described(v)) for k, v in bound(call).items())


@cache
def _rule_of(
    op: torch._ops.OpOverload, arguments: Any, inputs: Any, outputs: Any, strides: Any, masks: Any
) -> OpRule | None:
    named = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments}
    try:
        return bind(RuleCall(op, named, inputs, outputs, masks, strides))
    except (ValueError, KeyError, IndexError):  # the row is for calls of other shapes
        return None


_STRATEGIES: dict[Any, list[Strategy]] = {}


def _strategies(rule: OpRule, mesh: tuple[int, ...], floating: tuple[bool, ...]) -> list[Strategy]:
    key = id(rule), mesh, floating  # `_rule_of` keeps its rules
    if key not in _STRATEGIES:
        _STRATEGIES[key] = strategies(rule, mesh, floating, any_order=False)
    return _STRATEGIES[key]
