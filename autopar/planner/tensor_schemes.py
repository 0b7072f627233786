"""Recognizes 2D, 2.5D and 3D tensor parallelism in a plan, product by product.

Of Y[m, n] = X[m, k] W[k, n], the product splits some dims, and operands are gathered for it along axes
that split them where they come from:

            the product splits   X is gathered along   W is gathered along
    2D      m over a, n over b   b, which split k      a
    2.5D    m over d and a too   b, which split k      a
    3D      m, k, n over a, b, c c                     a

These are the presets of `autopar/planner/presets.py`, on any axes, whether they were asked for or
not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autopar.ir.aliasing import is_view
from autopar.ir.spec import ShardingSpec
from autopar.planner.decisions import Candidate, Decision, Edge
from autopar.planner.space import SearchSpace
from autopar.sharding.node_rules import rule_of
from autopar.sharding.rule import factors_of

SCHEMES = ("2d", "2.5d", "3d")
DEPTH = "depth"


class AtRest:
    """Layouts in which the operands of a plan come from their makers, before conversions."""

    def __init__(self, space: SearchSpace, chosen: Sequence[Candidate]) -> None:
        self._decisions, self._chosen = space.decisions, chosen
        self._into: dict[tuple[int, int], Edge] = {(e.target, e.operand): e for e in space.edges}

    def __call__(self, decision: int, operand: int) -> ShardingSpec | None:
        """The layout of an operand; of a view, that of what it is a view of."""
        edge = self._into.get((decision, operand))
        while edge is not None:
            source = self._decisions[edge.source]
            if source.kind != "shared" and not (source.kind == "op" and is_view(source.node)):
                return self._chosen[edge.source].outputs[edge.result]
            edge = self._into.get((edge.source, 0))
        return None


def scheme_of(
    decision: Decision,
    candidate: Candidate,
    weight: int,
    at_rest: Mapping[int, ShardingSpec | None],
) -> dict[int, tuple[str, ...]]:
    """The roles that mesh axes have in a product by one of the schemes; none by another.

    Args:
        weight: the operand W.
        at_rest: layouts of the operands where they come from.
    """
    rule, _ = rule_of(decision.node)
    strategy, dims = candidate.strategy, rule.inputs[weight]
    others = [i for i, d in enumerate(rule.inputs) if d and i != weight and i not in rule.terms]
    if strategy is None or dims is None or len(others) != 1:
        return {}
    out, (x,) = rule.outputs[0], others
    rows, summed, columns = set[int](), set[int](), set[int]()
    for factor, axes in strategy.splits.items():
        of_weight, of_result = factor in factors_of(dims), factor in factors_of(out)
        group = rows if not of_weight else columns if of_result else summed
        group.update(axes)
    gathered_x = _gathered(at_rest.get(x), candidate.inputs[x])
    gathered_w = _gathered(at_rest.get(weight), candidate.inputs[weight])
    if len(columns) != 1 or len(gathered_w) != 1 or gathered_x != columns:
        return {}
    if not summed and gathered_w <= rows and _splits_last(at_rest.get(x), columns):
        depth = rows - gathered_w
        name = "2.5d" if depth else "2d"
        return dict.fromkeys(depth, (DEPTH,)) | dict.fromkeys((*gathered_w, *columns), (name,))
    if len(rows) == len(summed) == 1 and gathered_w == rows:
        return dict.fromkeys((*rows, *summed, *columns), ("3d",))
    return {}


def _gathered(before: ShardingSpec | None, after: ShardingSpec | None) -> set[int]:
    if before is None or after is None:
        return set()
    return {a for d in before.dims for a in d} - {a for d in after.dims for a in d}


def _splits_last(spec: ShardingSpec | None, axes: set[int]) -> bool:
    return spec is not None and axes <= {*spec.dims[-1]}
