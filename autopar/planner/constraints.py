"""Constraints by name: `{"transformer.h.*.mlp.c_fc.weight": "RS1", ...}`.

Names are those of `autopar.planner.names`. A layout is a `ShardingSpec` as plans print it, or
several with `|` between them; that of a parameter may end in `reshard` (re-gathered for the
backward, ZeRO-3) or `keep` (ZeRO-2). For an operator, `by ring` demands a strategy that splits the
factor `ring`, whatever the layouts; behind a layout, `S0RS1 by n`, it demands that too. A
constraint masks the other candidates of a decision: they get infinite time in the solver's problem,
so that every plan is one of the same space.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.fx as fx

from autopar.errors import ConflictError, ConstraintError
from autopar.files import read_yaml
from autopar.ir.graph import ModelGraph, bound_arguments, shape_of
from autopar.ir.spec import ShardingSpec, fills_every_rank
from autopar.planner.decisions import Candidate, Decision, FixedLayouts
from autopar.planner.names import Names, output_shapes, suggestion
from autopar.planner.space import SearchSpace
from autopar.sharding.node_rules import rule_of
from autopar.solver.reductions import TiedProblem
from autopar.units import mesh_text

# Name or pattern to layouts.
Constraints = Mapping[str, str]
# Decision to a mask over its candidates; decisions that are not listed may take any of theirs.
Allowed = Mapping[int, np.ndarray]

OUTPUTS = "outputs."
_BY = "by"
# Attention, and what the capture makes of it where its mask is a band.
_ATTENTION, _IN_A_BAND = "scaled_dot_product_attention", "banded_attention"
_SHOWN = 24


def load_constraints(path: str | Path) -> dict[str, str]:
    """Read a YAML file: a mapping from names to layouts.

    Raises:
        ConstraintError: it is none.
        OSError: it cannot be read.
    """
    try:
        data = read_yaml(path)
    except ValueError as error:
        raise ConstraintError(f"{error}; names that begin with * or {{ need quotes") from error
    if not isinstance(data, Mapping):
        raise ConstraintError(f"{path}: expected a mapping from names to layouts, as in 'w: S0R'")
    for name, layout in data.items():
        if not isinstance(name, str) or not isinstance(layout, str):
            raise ConstraintError(
                f"{path}: {name}: {layout!r} is not a layout in text, such as S0R or 'RR | S0R'"
            )
    return dict(data)


def axis_orders(constraints: Constraints) -> frozenset[tuple[int, ...]]:
    """The orders of axes, other than ascending, in which constraints split dims."""
    return frozenset(
        axes for spec in layouts_of(constraints) for axes in spec.dims if list(axes) != sorted(axes)
    )


def layouts_of(constraints: Constraints) -> list[ShardingSpec]:
    """All layouts that constraints name."""
    parts = (part.strip() for text in constraints.values() for part in text.split("|"))
    return [spec for spec in (_Layout.parse(part).spec for part in parts) if spec is not None]


# -- what is allowed ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """One alternative of a constraint.

    Args:
        spec: None where the text has none, or none that can be read.
        reshard_after_forward: of a parameter; None if the constraint leaves it open.
        text: as the user wrote it.
        error: why there is no spec.
        factors: that the strategy must split.
    """

    spec: ShardingSpec | None
    reshard_after_forward: bool | None
    text: str
    error: str = ""
    factors: frozenset[str] = frozenset()

    @staticmethod
    def parse(text: str) -> _Layout:
        words = text.split()
        if _BY in words[:-1]:
            place = words.index(_BY)
            layout = _Layout.parse(" ".join(words[:place])) if place else _Layout(None, None, "")
            return replace(layout, text=text, factors=frozenset(words[place + 1 :]))
        reshard = {"reshard": True, "keep": False}.get(words[-1]) if len(words) > 1 else None
        body = " ".join(words if reshard is None else words[:-1])
        try:
            spec = ShardingSpec.parse("" if body == "scalar" else body)
        except ValueError as error:
            return _Layout(None, reshard, text, str(error))
        return _Layout(spec, reshard, text)

    def allows(self, candidate: Candidate) -> bool:
        if self.factors:
            strategy = candidate.strategy
            if strategy is None or not self.factors <= strategy.splits.keys():
                return False
            if self.spec is None and not self.error:
                return True
        if self.reshard_after_forward not in (None, candidate.reshard_after_forward):
            return False
        spec = candidate.outputs[0]
        # a layout without V constrains the value, not its gradient
        return self.spec == (spec if self.spec and self.spec.varying else spec.data())


def allowed(space: SearchSpace, constraints: Constraints) -> dict[int, np.ndarray]:
    """Per constrained decision the mask over its candidates.

    Raises:
        ConstraintError: an unknown name, or a layout that is not a candidate.
        ConflictError: two constraints exclude all candidates of a decision.
    """
    if not constraints:
        return {}
    names = Names(space)
    masks: dict[int, np.ndarray] = {}
    by: dict[int, list[str]] = {}
    for name, text in constraints.items():
        if name.startswith(OUTPUTS):  # see `fixed_outputs`
            continue
        matches = _matches(names, space, name)
        for place, (decision, mask) in _masks(space, name, matches, text).items():
            masks[decision] = masks[decision] & mask if decision in masks else mask
            by.setdefault(decision, []).append(f"{name}: {text}")
            if not masks[decision].any():
                raise ConflictError(
                    f"{quoted(by[decision])} leave no layout for {place}; keep one of them",
                    by[decision],
                )
    return masks


def _matches(names: Names, space: SearchSpace, name: str) -> dict[str, int]:
    found: dict[str, int] = {}
    if name.endswith(_ATTENTION):
        # an operator answers to the name that the model calls it by
        with contextlib.suppress(ConstraintError):
            found = names.find(name.removesuffix(_ATTENTION) + _IN_A_BAND)
    try:
        return names.find(name) | found
    except ConstraintError as error:
        if found:
            return found
        if name in space.graph.buffers.values():
            raise ConstraintError(
                f"constraint {name!r}: it is a buffer, and buffers are replicated"
            ) from error
        raise ConstraintError(f"constraint {name!r}: {error}") from None


def _masks(
    space: SearchSpace, name: str, matches: Mapping[str, int], text: str
) -> dict[str, tuple[int, np.ndarray]]:
    """Per place that a constraint names, the decision and the mask of candidates with one of the
    layouts. Every place must have one of the layouts, and every layout some place, unless the
    caller has fixed the layout of a place (a parameter that is sharded already)."""
    layouts = [_Layout.parse(part.strip()) for part in text.split("|")]
    if space.workload.forward:  # no backward gathers again
        layouts = [replace(layout, reshard_after_forward=None) for layout in layouts]
    masks: dict[str, tuple[int, np.ndarray]] = {}
    unused = dict(enumerate(layouts))
    for place, i in matches.items():
        decision = space.decisions[i]
        each = np.array([[k.allows(c) for c in decision.candidates] for k in layouts])
        if not each.any():
            raise ConstraintError(_refusal(space, decision, name, place, layouts[0]))
        masks[place] = i, np.asarray(each.any(axis=0))
        unused = {k: layout for k, layout in unused.items() if not each[k].any()}
    if unused and not any(_is_fixed(space, i) for i in matches.values()):
        (place, i), *_ = matches.items()
        refusal = _refusal(space, space.decisions[i], name, place, next(iter(unused.values())))
        raise ConstraintError(refusal)
    return masks


def _is_fixed(space: SearchSpace, decision: int) -> bool:
    target = str(space.decisions[decision].node.target)
    return space.graph.parameters.get(target) in space.fixed.parameters


def _refusal(space: SearchSpace, decision: Decision, name: str, place: str, layout: _Layout) -> str:
    kind = {"parameter": "parameter", "input": "input"}.get(decision.kind, "result")
    value = decision.node.meta["val"]
    shape = list(shape_of(value[decision.result] if isinstance(value, list | tuple) else value))
    mesh = space.cluster.mesh_text
    legal = list(dict.fromkeys(str(c.outputs[0].data()) or "scalar" for c in decision.candidates))
    alone = replace(layout, factors=frozenset())
    no_layout = layout.spec is None and not layout.error
    if layout.factors and (no_layout or any(alone.allows(c) for c in decision.candidates)):
        return _no_strategy(space, decision, name, place, layout)
    more = f", and {len(legal) - _SHOWN} more" if len(legal) > _SHOWN else ""
    if layout.spec is None:
        why = f"is not a layout ({layout.error})"
    elif layout.spec.ndim != len(shape):
        why = f"has {layout.spec.ndim} dims, and {kind} {place} has {len(shape)}"
    elif axes := [a for a in _axes(layout.spec) if a >= len(space.mesh)]:
        known = space.cluster.axes_text or f"0 to {len(space.mesh) - 1}"
        why = f"splits over axis {axes[0]}, and mesh {mesh} has axes {known}"
    else:
        empty = _without_a_part(layout.spec, shape, space.mesh)
        why = f"{empty or 'is not among the layouts of'} {kind} {place}"
        called = decision.node.op == "call_function"
        if empty and called and "exchange" in rule_of(decision.node)[0].factors:
            why += " (`by exchange` splits the sequence outside of attention, and repeats keys)"
    return (
        f"constraint {name!r}: {layout.text!r} {why}. {kind.capitalize()} {place} of shape {shape} "
        f"on mesh {mesh} can have {', '.join(legal[:_SHOWN])}{more}"
    )


def _without_a_part(spec: ShardingSpec, shape: Sequence[int], mesh: Sequence[int]) -> str:
    """Which dim has fewer elements than ranks; empty if none has."""
    for dim, (size, axes) in enumerate(zip(shape, spec.dims, strict=True)):
        ranks = math.prod(mesh[a] for a in axes)
        if ranks > size:
            return f"leaves ranks without a part: {ranks} split dim {dim}, of size {size}, of"
    return ""


def _no_strategy(
    space: SearchSpace, decision: Decision, name: str, place: str, layout: _Layout
) -> str:
    strategies = [c.strategy for c in decision.candidates if c.strategy is not None]
    factors = dict.fromkeys(f for s in strategies for f in s.splits)
    rule, _ = rule_of(decision.node)
    bounds = "; ".join(
        f"{f} splits a dim of {n}, and so {'do' if len(names) > 2 else 'does'} "
        f"{' and '.join(o for o in names if o != f)}"
        for names, n in rule.joint
        for f in sorted(layout.factors & {*names})
    )
    bounds += "; every rank must have a part" if bounds else ""
    beside = [f for f in layout.factors & {*rule.factors} if rule.factors[f].beside]
    if beside and not space.cluster.device.runs_beside:
        bounds = (
            f"{beside[0]} is for devices on which collectives run beside compute, and "
            f"{space.cluster.device.name} is none"
        )
    has = f"can be split by {', '.join(factors)}" if factors else "cannot be split"
    return (
        f"constraint {name!r}: no strategy of {place} is {layout.text!r} on mesh "
        f"{space.cluster.mesh_text}. {decision.node.target} {has}"
        f"{f' ({bounds})' if bounds else ''}"
        f"{_of_attention(decision.node)}"
    )


def _of_attention(node: fx.Node) -> str:
    """Why an attention has fewer strategies than others."""
    arguments = bound_arguments(node)
    if _ATTENTION in str(node.target) and arguments.get("dropout_p"):
        return "; it has dropout, which is drawn where a query has all of its keys"
    if _IN_A_BAND not in str(node.target):
        return ""
    first, last = arguments["before"], arguments["after"]
    seen = "from the first" if first is None else f"from {first} before it"
    seen += " to the last" if last is None else f" to {last} after it"
    return f"; a query sees the keys {seen}"


def _axes(spec: ShardingSpec) -> list[int]:
    return [*(a for dim in spec.dims for a in dim), *spec.partial, *spec.varying]


def fixed_outputs(
    graph: ModelGraph, mesh: Sequence[int], constraints: Constraints, fixed: FixedLayouts | None
) -> FixedLayouts | None:
    """The fixed layouts, with those that constraints demand of results.

    Raises:
        ConstraintError: no such result, or the layout is not possible.
    """
    constrained = {name: text for name, text in constraints.items() if name.startswith(OUTPUTS)}
    if not constrained:
        return fixed
    if fixed is not None and fixed.outputs is not None:
        raise ConstraintError(
            f"constraint {next(iter(constrained))!r}: results are decided elsewhere"
        )
    shapes = output_shapes(graph)
    specs = {name: ShardingSpec.replicated(len(shape)) for name, shape in shapes.items()}
    for name, text in constrained.items():
        if name not in shapes:
            raise ConstraintError(
                f"constraint {name!r}: the model gives {len(shapes)} tensors"
                f"{suggestion(name, shapes)}"
            )
        specs[name] = _output_spec(name, text, shapes[name], mesh)
    return replace(fixed or FixedLayouts(), outputs=tuple(specs.values()))


def _output_spec(name: str, text: str, shape: tuple[int, ...], mesh: Sequence[int]) -> ShardingSpec:
    spec = _Layout.parse(text).spec
    legal = (
        spec is not None
        and spec.ndim == len(shape)
        and not spec.partial
        and not spec.varying
        and all(axis < len(mesh) for axis in _axes(spec))
        and all(fills_every_rank(n, a, mesh) for n, a in zip(shape, spec.dims, strict=True))
    )
    if not legal:
        raise ConstraintError(
            f"constraint {name!r}: {text!r} is not a layout of a result of shape {list(shape)} on "
            f"mesh {mesh_text(mesh)}: one R or S with axes per dim, so that no rank is "
            "without elements; a result has one layout"
        )
    assert spec is not None
    return spec


def refuse_outputs(constraints: Constraints | None) -> None:
    """Raise ConstraintError for constraints on results, whose layout the engine decides."""
    for name in constraints or {}:
        if name.startswith(OUTPUTS):
            raise ConstraintError(
                f"constraint {name!r}: auto_engine returns global results, or with batch='local' "
                "each rank's samples; constrain the module or operator that makes the value"
            )


# -- in the problem -----------------------------------------------------------------------------


def masked(ties: TiedProblem, mask: Allowed) -> TiedProblem:
    """The problem in which masked candidates are forbidden; copies with different masks are no
    longer in one class."""
    if not mask:
        return ties
    times = tuple(
        np.where(mask[v], t, np.inf) if v in mask else t for v, t in enumerate(ties.problem.time_us)
    )
    keys = [mask[v].tobytes() if v in mask else b"" for v in range(len(times))]

    def divided(classes: Sequence[int]) -> tuple[int, ...]:
        numbers: dict[tuple[int, bytes], int] = {}
        return tuple(
            numbers.setdefault(pair, len(numbers)) for pair in zip(classes, keys, strict=True)
        )

    return replace(
        ties,
        problem=replace(ties.problem, time_us=times),
        classes=divided(ties.classes),
        node_costs=divided(ties.node_costs or range(len(times))),
    )


def quoted(named: Sequence[str]) -> str:
    """`'a', 'b' and 'c'`."""
    *names, last = [f"'{n}'" for n in named]
    return f"{', '.join(names)} and {last}" if names else last
