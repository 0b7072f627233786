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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from autopar.errors import ConflictError, ConstraintError
from autopar.files import read_yaml
from autopar.ir.graph import ModelGraph
from autopar.ir.spec import ShardingSpec, fills_every_rank
from autopar.operators.quantized_linear import int4_linear
from autopar.planner.decisions import Decision, FixedLayouts
from autopar.planner.names import Names, output_shapes, suggestion
from autopar.planner.space import SearchSpace
from autopar.planner.wanted_layout import ATTENTION, IN_A_BAND, WantedLayout, axes_of, refusal_of
from autopar.solver.reductions import TiedProblem
from autopar.units import mesh_text

# Name or pattern to layouts.
Constraints = Mapping[str, str]
# Decision to a mask over its candidates; decisions that are not listed may take any of theirs.
Allowed = Mapping[int, np.ndarray]

OUTPUTS = "outputs."


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
    return [spec for spec in (WantedLayout.parse(part).spec for part in parts) if spec is not None]


# -- what is allowed ----------------------------------------------------------------------------


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
    if name.endswith(ATTENTION):
        # an operator answers to the name that the model calls it by
        with contextlib.suppress(ConstraintError):
            found = names.find(name.removesuffix(ATTENTION) + IN_A_BAND)
    try:
        return names.find(name) | found
    except ConstraintError as error:
        if found:
            return found
        if name in space.graph.buffers.values():
            raise ConstraintError(
                f"constraint {name!r}: it is a buffer, and buffers are replicated"
            ) from error
        written_out = ""
        if name.endswith(ATTENTION):
            written_out = (
                "; attention with sinks, soft caps or a score_mod is captured as the products and "
                "the softmax that it consists of, which are named like operators: '**.softmax'"
            )
        raise ConstraintError(f"constraint {name!r}: {error}{written_out}") from None


def _masks(
    space: SearchSpace, name: str, matches: Mapping[str, int], text: str
) -> dict[str, tuple[int, np.ndarray]]:
    """Per place that a constraint names, the decision and the mask of candidates with one of the
    layouts. Every place must have one of the layouts, and every layout some place, unless the
    caller has fixed the layout of a place (a parameter that is sharded already)."""
    layouts = [WantedLayout.parse(part.strip()) for part in text.split("|")]
    if space.workload.forward:  # no backward gathers again
        layouts = [replace(layout, reshard_after_forward=None) for layout in layouts]
    masks: dict[str, tuple[int, np.ndarray]] = {}
    unused = dict(enumerate(layouts))
    for place, i in matches.items():
        decision = space.decisions[i]
        own = [_of_groups(k, decision) for k in layouts]
        each = np.array([[k.allows(c) for c in decision.candidates] for k in own])
        if not each.any():
            raise ConstraintError(refusal_of(space, decision, name, place, layouts[0]))
        masks[place] = i, np.asarray(each.any(axis=0))
        unused = {k: layout for k, layout in unused.items() if not each[k].any()}
    if unused and not any(_is_fixed(space, i) for i in matches.values()):
        (place, i), *_ = matches.items()
        refusal = refusal_of(space, space.decisions[i], name, place, next(iter(unused.values())))
        raise ConstraintError(refusal)
    return masks


def _of_groups(layout: WantedLayout, decision: Decision) -> WantedLayout:
    """The layout of a weight of int4, which has its inputs in groups, where the constraint is that
    of the weight before."""
    spec, node = layout.spec, decision.node
    rounded = node.users and all(user.target is int4_linear for user in node.users)
    if spec is None or not rounded or spec.ndim != node.meta["val"].ndim - 1:
        return layout
    return replace(layout, spec=replace(spec, dims=(*spec.dims, ())))


def _is_fixed(space: SearchSpace, decision: int) -> bool:
    target = str(space.decisions[decision].node.target)
    return space.graph.parameters.get(target) in space.fixed.parameters


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
    spec = WantedLayout.parse(text).spec
    legal = (
        spec is not None
        and spec.ndim == len(shape)
        and not spec.partial
        and not spec.varying
        and all(axis < len(mesh) for axis in axes_of(spec))
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
