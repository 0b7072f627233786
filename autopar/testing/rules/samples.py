"""Random calls of each op, by its sampler, its schema, or its row's notation."""

from __future__ import annotations

import re
from functools import cache

import torch

from autopar.sharding.rule import Row
from autopar.sharding.rules.pointwise import is_pointwise
from autopar.sharding.rules.registry import DERIVED, ROWS, has_rule
from autopar.testing.rules import (  # noqa: F401  (they register samplers)
    samples_creation,
    samples_index,
    samples_loss,
    samples_product,
    samples_reduction,
    samples_view,
)
from autopar.testing.rules.draw import FIXED, SAMPLES, Arguments, Draw, Sample
from autopar.testing.rules.one_op import OneOp, one_op
from autopar.testing.rules.samples_pointwise import draw_pointwise


def find_op(name: str) -> torch._ops.OpOverload | None:
    """The operator of a name such as aten.mm.default; None if this torch has none."""
    namespace, _, rest = name.partition(".")
    base, _, overload = rest.rpartition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), base), overload)
    except (AttributeError, RuntimeError):
        return None


# Kernels that do not run in float64, and the op with the same rule and lowering that does.
PROVED_BY = {"aten._grouped_mm.default": "transformers.grouped_mm_fallback.default"}


@cache
def table_ops() -> tuple[str, ...]:
    """Names of all ops that the table has a rule for and that can be proved."""
    names = {*ROWS, *DERIVED}
    for base in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, base)
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            tensors = any("Tensor" in str(r.type) for r in op._schema.returns)
            if is_pointwise(op) and tensors and not op._schema.is_mutable:
                names.add(str(op))
    names -= {*PROVED_BY}
    return tuple(sorted(n for n in names if (op := find_op(n)) is not None and has_rule(op)))


def has_sampler(name: str) -> bool:
    """Whether calls of the op can be drawn."""
    op = find_op(name)
    return op is not None and (name in SAMPLES or is_pointwise(op) or _plain(name) is not None)


def draw_sample(op: torch._ops.OpOverload, draw: Draw) -> Sample:
    """A random call.

    Raises:
        KeyError: there is no sampler for the op's arguments.
    """
    name = str(op)
    if name in SAMPLES:
        args, kwargs = SAMPLES[name](draw)
    elif is_pointwise(op) and name not in ROWS:
        args, kwargs = draw_pointwise(op, draw)
    else:
        row = _plain(name)
        if row is None:
            raise KeyError(f"{name} has no sampler: add one in autopar/testing/rules/samples_*.py")
        args, kwargs = draw_from_notation(op, row, draw)
    return Sample(op, args, kwargs, FIXED.get(name, frozenset()))


def draw_call(op: torch._ops.OpOverload, draw: Draw) -> OneOp | None:
    """A random call, run; None where torch refuses it."""
    try:
        return one_op(draw_sample(op, draw), draw)
    except (RuntimeError, IndexError, NotImplementedError, ValueError):
        return None


# -- from a row's notation ----------------------------------------------------------------------


def _plain(name: str) -> Row | None:
    """The op's row, if every argument without a default is a tensor of its own."""
    rows, op = ROWS.get(name), find_op(name)
    if rows is None or op is None:
        return None
    for argument in op._schema.arguments:
        if str(argument.type) not in ("Tensor", "Optional[Tensor]") and not (
            argument.has_default_value()
        ):
            return None
    return rows[0]


_INDEX = re.compile(r"ind(ex|ices)|target")


def draw_from_notation(op: torch._ops.OpOverload, row: Row, draw: Draw) -> Arguments:
    """Tensors whose dims are the row's factors, of random sizes."""
    patterns = [p.split() for p in row.notation.split("->")[0].split(",")]
    sizes: dict[str, list[int]] = {}

    def extent(token: str) -> list[int]:
        name = re.sub(r"[^a-z_0-9]", "", token.partition(":")[0].replace("...", "rest"))
        if name not in sizes:
            many = "*" in token or token == "..."
            sizes[name] = draw.shape(0, 2) if many else [draw.size()]
        return sizes[name]

    arguments = [a for a in op._schema.arguments if "Tensor" in str(a.type)]
    values: list[torch.Tensor | None] = []
    for argument, pattern in zip(arguments, patterns, strict=False):
        shape = [n for token in pattern if token != "+" for n in extent(token)]
        if "Optional" in str(argument.type) and draw.chance(30):
            values.append(None)
        elif _INDEX.search(argument.name):
            values.append(draw.integers(shape, 0, 1))
        else:
            values.append(draw.normal(*shape))
    return tuple(values), {}
