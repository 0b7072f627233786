"""The strategies that follow from a rule: which factors the axes of a mesh split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, permutations, product

from autopar.ir.spec import ShardingSpec, fills_every_rank
from autopar.sharding.rule import Dims, OpRule, Strategy, alternatives

_SUM = "sum"


def passes_sum(choice: str) -> bool:
    """Whether an axis passes a pending sum through, by what `Strategy.name` says of it."""
    return choice.startswith(_SUM)


def strategies(
    rule: OpRule,
    mesh: Sequence[int],
    differentiable: Sequence[bool] | None = None,
    *,
    any_order: bool = True,
    beside: bool = True,
    alike: Sequence[Sequence[int]] | None = None,
) -> list[Strategy]:
    """Every legal strategy of a bound rule on a mesh, full replication first.

    Args:
        differentiable: per result, whether it is a float tensor; a pending sum must be. All are
            if None.
        any_order: also where the axes that split a factor are not in ascending order.
        beside: also those that are only of use where collectives run beside compute.
        alike: all axes of more than one rank, in groups that split the same; each by itself if
            None.
    """
    floating = [True] * len(rule.outputs) if differentiable is None else differentiable
    options = ["-", *(name for name, f in rule.factors.items() if beside or not f.beside)]
    if all(floating):
        options += [f"{_SUM}{i}" for i in range(len(rule.linear))]
    groups = [(a,) for a, size in enumerate(mesh) if size > 1] if alike is None else alike
    legal = []
    for chosen in product(options, repeat=len(groups)):
        of = {axis: option for g, option in zip(groups, chosen, strict=True) for axis in g}
        assignment = [of.get(axis, "-") for axis in range(len(mesh))]
        for splits in islice(_orders(assignment), None if any_order else 1):
            strategy = _strategy(rule, mesh, assignment, splits, floating)
            if strategy is not None:
                legal.append(strategy)
    return legal


def _orders(assignment: Sequence[str]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Axes per factor, ascending first, then in every other order."""
    axes: dict[str, list[int]] = {}
    for axis, choice in enumerate(assignment):
        if choice != "-" and not passes_sum(choice):
            axes.setdefault(choice, []).append(axis)
    for orders in product(*(permutations(a) for a in axes.values())):
        yield dict(zip(axes, orders, strict=True))


def named_strategy(
    rule: OpRule, mesh: Sequence[int], name: str, differentiable: Sequence[bool]
) -> Strategy:
    """The strategy of that name (`Strategy.name`).

    Raises:
        ValueError: the rule has no such strategy on this mesh.
    """
    tokens = [token.partition(":") for token in name.split()]
    assignment = [token[0] for token in tokens]
    linear = len(rule.linear) if all(differentiable) else 0
    known = {"-", *rule.factors, *(f"{_SUM}{i}" for i in range(linear))}
    strategy = None
    if len(assignment) == len(mesh) and set(assignment) <= known:
        place = {axis: int(token[2] or axis) for axis, token in enumerate(tokens)}
        splits = {
            factor: tuple(sorted(axes, key=place.__getitem__))
            for factor, axes in next(_orders(assignment)).items()
        }
        strategy = _strategy(rule, mesh, assignment, splits, differentiable)
    if strategy is None:
        raise ValueError(f"no strategy {name!r} on mesh {tuple(mesh)}; factors: {sorted(known)}")
    return strategy


def _named(assignment: Sequence[str], splits: Mapping[str, tuple[int, ...]]) -> str:
    names = list(assignment)
    for factor, axes in splits.items():
        if list(axes) != sorted(axes):
            for place, axis in enumerate(axes):
                names[axis] = f"{factor}:{place}"
    return " ".join(names)


def _strategy(
    rule: OpRule,
    mesh: Sequence[int],
    assignment: Sequence[str],
    splits: Mapping[str, tuple[int, ...]],
    floating: Sequence[bool],
) -> Strategy | None:
    linear = {
        axis: rule.linear[int(choice.removeprefix(_SUM))]
        for axis, choice in enumerate(assignment)
        if passes_sum(choice)
    }
    if not all(rule.factors[name].allows(axes, mesh) for name, axes in splits.items()):
        return None
    for names, size in rule.joint:
        if not fills_every_rank(size, [a for n in names for a in splits.get(n, ())], mesh):
            return None

    complete = {a for name, axes in splits.items() if rule.factors[name].complete for a in axes}
    # complete and in no result: every rank computes the same values and the same gradients
    resulting = {name for dims in rule.outputs for d in dims for name in alternatives(d)}
    equal = {a for name, axes in splits.items() if name not in resulting for a in axes} & complete

    def layout(dims: Dims, other: str, is_term: bool = False) -> ShardingSpec:
        """`other`: the state along axes whose factor this tensor lacks."""
        split = tuple(tuple(a for n in alternatives(d) for a in splits.get(n, ())) for d in dims)
        own = {axis for axes in split for axis in axes}
        absent = sorted(a for axes in splits.values() for a in axes if a not in own)
        if other == "P":
            return ShardingSpec(split, tuple(a for a in absent if a not in complete))
        pending = tuple(a for a in absent if is_term and a in reduced)
        varying = tuple(a for a in absent if a not in pending and a not in equal)
        return ShardingSpec(split, pending, varying)

    outputs = [layout(dims, "P") for dims in rule.outputs]
    if any(spec.partial and not f for spec, f in zip(outputs, floating, strict=True)):
        return None
    reduced = {axis for spec in outputs for axis in spec.partial}
    inputs = [
        None if dims is None else layout(dims, "V", i in rule.terms)
        for i, dims in enumerate(rule.inputs)
    ]
    for axis, group in linear.items():
        outputs = [
            ShardingSpec(s.dims, tuple(sorted((*s.partial, axis))), s.varying) for s in outputs
        ]
        for i, spec in enumerate(inputs):
            if spec is None:
                continue
            if i in group:
                partial = tuple(sorted((*spec.partial, axis)))
                inputs[i] = ShardingSpec(spec.dims, partial, spec.varying)
            else:
                varying = tuple(sorted((*spec.varying, axis)))
                inputs[i] = ShardingSpec(spec.dims, spec.partial, varying)
    needs_lowering = any(rule.factors[name].lowered for name in splits)
    return Strategy(
        _named(assignment, splits),
        tuple(inputs),
        tuple(outputs),
        splits,
        lowered=rule.lowering is not None and (needs_lowering or rule.always),
        half=frozenset(name for name in splits if rule.factors[name].half),
    )
