"""Recognizes 2D, 2.5D and 3D tensor parallelism in a plan, product by product.

Of Y[m, n] = X[m, k] W[k, n], the product splits some dims, and operands are gathered for it along
axes that split them where they come from:

            the product splits   X is gathered along   W is gathered along
    2D      m over a, n over b   b, which split k      a
    2.5D    m over d and a too   b, which split k      a
    3D      m, k, n over a, b, c c                     a

These are schemes of `autopar/planner/tensor_schemes.py`, on any axes, asked for or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autopar.ir.aliasing import is_view
from autopar.ir.spec import ShardingSpec
from autopar.planner.decisions import Candidate, Decision, Edge
from autopar.planner.space import SearchSpace
from autopar.sharding.node_rules import rule_of
from autopar.sharding.rule import factors_of

ROLES = ("2d", "2.5d", "3d")
DEPTH = "depth"


class AtRest:
    """Layouts in which the operands of a plan come from their makers, before conversions."""

    def __init__(self, space: SearchSpace, chosen: Sequence[Candidate]) -> None:
        self._decisions, self._chosen = space.decisions, chosen
        self._into: dict[tuple[int, int], Edge] = {(e.target, e.operand): e for e in space.edges}

    def __call__(self, decision: int, operand: int) -> tuple[ShardingSpec, ...]:
        """The layouts of an operand and, if it is a view, of what it is a view of: the maker's
        last."""
        layouts = []
        edge = self._into.get((decision, operand))
        while edge is not None:
            source = self._decisions[edge.source]
            layouts.append(self._chosen[edge.source].outputs[edge.result])
            through = source.kind == "shared" or (source.kind == "op" and is_view(source.node))
            edge = self._into.get((edge.source, 0)) if through else None
        return tuple(layouts)


def scheme_of(
    decision: Decision,
    candidate: Candidate,
    weight: int,
    at_rest: Callable[[int], tuple[ShardingSpec, ...]],
) -> dict[int, tuple[str, ...]]:
    """The roles that mesh axes have in a product by one of the schemes; none by another.

    Args:
        weight: the operand W.
        at_rest: of an operand, its layouts from the product back to where it comes from.
    """
    rule, _ = rule_of(decision.node)
    strategy, dims = candidate.strategy, rule.inputs[weight]
    others = [i for i, d in enumerate(rule.inputs) if d and i != weight and i not in rule.terms]
    if strategy is None or dims is None or weight in rule.terms or len(others) != 1:
        return {}
    out, (x,) = rule.outputs[0], others
    rows, summed, columns = set[int](), set[int](), set[int]()
    for factor, axes in strategy.splits.items():
        of_weight, of_result = factor in factors_of(dims), factor in factors_of(out)
        group = rows if not of_weight else columns if of_result else summed
        group.update(axes)
    gathered_x = _gathered(at_rest(x), candidate.inputs[x])
    gathered_w = _gathered(at_rest(weight), candidate.inputs[weight])
    if len(columns) != 1 or len(gathered_w) != 1 or gathered_x != columns:
        return {}
    if not summed and gathered_w <= rows and _splits_last(at_rest(x), columns):
        depth = rows - gathered_w
        name = "2.5d" if depth else "2d"
        roles: dict[int, tuple[str, ...]] = dict.fromkeys(depth, (DEPTH,))
        return roles | dict.fromkeys((*gathered_w, *columns), (name,))
    if len(rows) == len(summed) == 1 and gathered_w == rows:
        return dict.fromkeys((*rows, *summed, *columns), ("3d",))
    return {}


def _gathered(before: tuple[ShardingSpec, ...], after: ShardingSpec | None) -> set[int]:
    if not before or after is None:
        return set()
    return {a for d in before[-1].dims for a in d} - {a for d in after.dims for a in d}


def _splits_last(specs: tuple[ShardingSpec, ...], axes: set[int]) -> bool:
    return any(axes <= {*spec.dims[-1]} for spec in specs if spec.dims)
