"""Presets: the schemes of `autopar/planner/tensor_schemes.py` as constraints by name.

A preset demands layouts of

* the weights of products, as they are stored;
* the products: their results, and which of their dims they split;
* other operators whose result has the shape of an operand or a result of a product, if they have a
  name that copies of a block share: norms, activation functions, the residual stream.

All else (biases, norm weights, inputs, attention, the loss, and products that have a dim too small
for the mesh) is for the solver to lay out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.fx as fx

from autopar.errors import ConstraintError
from autopar.ir.aliasing import is_view
from autopar.ir.graph import ModelGraph, operands, shape_of
from autopar.ir.spec import ShardingSpec, fills_every_rank
from autopar.planner.describe import grouped_names
from autopar.planner.names import every_name, matcher, operator_names
from autopar.planner.tensor_schemes import SCHEMES, Axes, SplitProduct, mesh_axes
from autopar.sharding.node_rules import is_floating, results, rule_of, strategy_by_name
from autopar.sharding.rule import Dims, OpRule
from autopar.units import mesh_text

_PRODUCTS = (
    "aten.mm.", "aten.addmm.", "aten.linear.", "aten.matmul.", "autopar.packed_",
)  # fmt: skip
_ATTENTION = ("aten.scaled_dot_product_attention.", "autopar.banded_attention.")
_CAST = torch.ops.aten._to_copy.default


def preset_constraints(name: str, graph: ModelGraph, mesh: Sequence[int]) -> dict[str, str]:
    """The constraints that a preset stands for, by the names of parameters and operators.

    Raises:
        ConstraintError: there is no such preset, it is not for this mesh, or the model has no
            products of activations with weights that it can split.
    """
    layouts = _Layouts(name, graph, mesh, mesh_axes(name, mesh)).all()
    return dict(_by_pattern(layouts, every_name(graph)))


# -- layouts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A product of activations with a weight.

    Args:
        activations: the operand X.
        parameter: placeholder of the weight.
        weight: factors of W's dims, as the parameter has them; None if it is a view of it.
        factors: those of m (empty if there is one row), k and n.
    """

    activations: fx.Node
    parameter: str
    weight: Dims | None
    factors: tuple[str, str, str]


class _Layouts:
    """The layouts that a scheme demands of a graph."""

    def __init__(self, name: str, graph: ModelGraph, mesh: Sequence[int], axes: Axes) -> None:
        self.name, self.scheme, self.graph, self.mesh = name, SCHEMES[name], graph, mesh
        self._axes = axes
        nodes = list(graph.compute_nodes())
        self.calls = {
            n: call for n in nodes if (call := _product(graph, n, self._rows)) is not None
        }
        self.parity = _parities(graph, self.calls)
        self.shapes = {
            shape_of(value.meta["val"])
            for node, call in self.calls.items()
            for value in (node, call.activations)
        }

    def all(self) -> dict[str, str]:
        """Layouts by name, in the order of the graph."""
        names = operator_names(self.graph)
        layouts: dict[str, str] = {}
        refused: list[fx.Node] = []
        for node in self.graph.compute_nodes():
            call = self.calls.get(node)
            text = self._of_product(node, call) if call is not None else self._of_other(node)
            if call is not None and text is not None:
                weight = self._of_weight(node, call)
                if weight is not None:
                    layouts.setdefault(self.graph.parameters[call.parameter], weight)
            if text is not None and (node in names or call is not None):
                layouts[names.get(node, node.name)] = text
            if call is not None and text is None:
                refused.append(node)
        if len(refused) == len(self.calls):
            raise ConstraintError(self._refusal(refused))
        return layouts

    def _refusal(self, refused: Sequence[fx.Node]) -> str:
        does = (
            f"preset {self.name} ({self.scheme.title}) splits products of activations with weights"
        )
        if not refused:
            return f"{does}, such as linear layers, and the model has none"
        node = refused[0]
        how, factors = self._split(node), rule_of(node)[0].factors
        small, remedies = [], []
        for what, remedy, name, axes in zip(
            ("rows", "summed features", "features of the result"),
            ("more samples or longer ones", "a smaller mesh", "a smaller mesh"),
            self.calls[node].factors, (how.m, how.k, how.n), strict=True,
        ):  # fmt: skip
            if axes and (name not in factors or not factors[name].allows(axes, self.mesh)):
                size = factors[name].size if name in factors else 1
                small.append(f"{what} of size {size} over {prod(self.mesh[a] for a in axes)} ranks")
                remedies.append(remedy)
        return (
            f"{does}, and mesh {mesh_text(self.mesh)} leaves ranks without a part of every one of "
            f"the model's {len(refused)}: {node.target} at {self.graph.info(node).source} would "
            f"split {' and '.join(small)}. Take {' and '.join(dict.fromkeys(remedies))}"
        )

    # -- in mesh axes ---------------------------------------------------------------------------

    def _on_mesh(self, axes: Axes) -> Axes:
        return tuple(self._axes[axis] for axis in axes)

    def _split(self, node: fx.Node) -> SplitProduct:
        how = self.scheme.products[self.parity[self.calls[node].activations]]
        return SplitProduct(*(self._on_mesh(getattr(how, f)) for f in how.__dataclass_fields__))

    def _rows(self, rule: OpRule, dims: Sequence[str | None]) -> str | None:
        """The factor of the rows: the first dim that is large enough, the batch or the sequence.

        Args:
            dims: factors of all dims that may be rows.
        """
        axes = {self._on_mesh(how.m) for how in self.scheme.products}
        axes |= {self._on_mesh(rows) for rows, _ in self.scheme.activations}

        def fits(dim: str | None) -> bool:
            return dim is not None and all(rule.factors[dim].allows(a, self.mesh) for a in axes)

        return next((dim for dim in dims if fits(dim)), dims[0] if dims else None)

    def _activations(self, node: fx.Node) -> tuple[Axes, Axes]:
        rows, features = self.scheme.activations[self.parity.get(node, 0)]
        return self._on_mesh(rows), self._on_mesh(features)

    # -- of one value ---------------------------------------------------------------------------

    def _of_product(self, node: fx.Node, call: _Call) -> str | None:
        """The layout of the result and, where a product may run in steps beside its collective, the
        factors that the scheme splits instead."""
        how = self._split(node)
        splits = dict(zip(call.factors, (how.m, how.k, how.n), strict=True))
        text = self._result(node, splits)
        if text is None or not any(f.beside for f in rule_of(node)[0].factors.values()):
            return text
        return f"{text} by {' '.join(factor for factor, axes in splits.items() if axes)}"

    def _of_other(self, node: fx.Node) -> str | None:
        """The layout of a value between products; None where the scheme demands none."""
        values = results(node)
        if node not in self.parity or len(values) != 1 or shape_of(values[0]) not in self.shapes:
            return None
        rows, features = self._activations(node)
        rule = rule_of(node)[0]
        *others, last = rule.outputs[0]
        first = self._rows(rule, others)
        if (rows and first is None) or (features and last is None):
            return None
        return self._result(node, {first or "": rows, last or "": features})

    def _result(self, node: fx.Node, splits: Mapping[str, Axes]) -> str | None:
        """The layout of a result if the node splits its factors so; None if it cannot."""
        places = ["-"] * len(self.mesh)
        for factor, axes in splits.items():
            for place, axis in enumerate(axes):
                places[axis] = f"{factor}:{place}" if len(axes) > 1 else factor
        try:
            strategy = strategy_by_name(node, self.mesh, " ".join(places))
        except ValueError:
            return None
        spec = strategy.outputs[0].data()
        wanted = {axis for axes in splits.values() for axis in axes}
        has = {axis for axes in spec.dims for axis in axes} | {*spec.partial}
        return str(spec) if has == wanted else None

    def _of_weight(self, node: fx.Node, call: _Call) -> str | None:
        """The layout of a product's weight. Of a view of a parameter, the layouts that are split
        over the same axes."""
        how, (_, k, n) = self._split(node), call.factors
        shape = shape_of(self.graph.placeholders[call.parameter].meta["val"])
        axes = tuple(sorted((*how.weight_k, *how.weight_n)))
        if call.weight is not None:
            of = {k: how.weight_k, n: how.weight_n}
            specs = [tuple(of.get(dim or "", ()) for dim in call.weight)]
        else:
            specs = [
                tuple(tuple(a for a, d in zip(axes, dims, strict=True) if d == e) for e, _ in
                      enumerate(shape))
                for dims in product(range(len(shape)), repeat=len(axes))
            ]  # fmt: skip
        legal = [
            str(ShardingSpec(dims))
            for dims in specs
            if all(fills_every_rank(s, a, self.mesh) for s, a in zip(shape, dims, strict=True))
        ]
        return " | ".join(legal) or None


def _product(
    graph: ModelGraph, node: fx.Node, rows: Callable[[OpRule, Sequence[str | None]], str | None]
) -> _Call | None:
    """The product that a node is; None if it is none of activations with a weight.

    Args:
        rows: the factor of the rows, of those that may be.
    """
    if not str(node.target).startswith(_PRODUCTS):
        return None
    rule, values = rule_of(node)[0], operands(node)
    rule = rule.without(*(name for name, factor in rule.factors.items() if factor.beside))
    out = rule.outputs[0]
    matrices = [
        (value, dims)
        for i, (value, dims) in enumerate(zip(values, rule.inputs, strict=True))
        if value is not None and dims is not None and i not in rule.terms
    ]
    weights = [(v, d) for v, d in matrices if _parameter(graph, v) is not None]
    others = [(v, d) for v, d in matrices if _parameter(graph, v) is None]
    if len(weights) != 1 or len(others) != 1:
        return None
    (weight, dims), (activations, own) = weights[0], others[0]
    summed = [d for d in dims if d is not None and d not in out]
    kept = [d for d in dims if d is not None and d in out and d not in own]
    if len(summed) != 1 or len(kept) != 1 or summed[0] not in own:
        return None
    left = [dim for dim in out if dim in own and (dim is None or dim not in dims)]
    if not left:
        return None
    m = rows(rule, left)
    parameter = _parameter(graph, weight)
    assert parameter is not None
    direct = weight.op == "placeholder"
    return _Call(activations, parameter, dims if direct else None, (m or "", summed[0], kept[0]))


def _parameter(graph: ModelGraph, value: fx.Node) -> str | None:
    """The placeholder of the parameter that a value is, or is a view or a cast of."""
    while value.op == "call_function" and (is_view(value) or value.target is _CAST):
        if len(value.all_input_nodes) != 1:
            return None
        (value,) = value.all_input_nodes
    name = str(value.target)
    return name if value.op == "placeholder" and name in graph.parameters else None


def _parities(graph: ModelGraph, calls: Mapping[fx.Node, _Call]) -> dict[fx.Node, int]:
    """Per activation whether an odd number of products made it (1) or an even one (0).

    A value that has both for operands is even: it is the residual stream. The result of attention
    is odd: it lies between the products that make queries, keys and values and the one after it.
    """
    parity = {graph.placeholders[name]: 0 for name in graph.inputs if name is not None}
    for node in graph.nodes:
        if node in calls:
            # what no input is in, such as a table of positions or trained queries, is even
            parity[node] = 1 - parity.setdefault(calls[node].activations, 0)
        elif node.op == "call_function":
            sources = [v for v in node.all_input_nodes if v in parity]
            if sources:
                known = [parity[v] for v in sources if _flows(v)]
                attention = str(node.target).startswith(_ATTENTION)
                parity[node] = 1 if attention else min(known, default=0)
    return parity


def _flows(value: fx.Node) -> bool:
    """Whether it is floating-point, rather than an index or a mask."""
    tensors = results(value)
    return bool(tensors) and is_floating(tensors[0])


# -- names --------------------------------------------------------------------------------------


def _by_pattern(layouts: Mapping[str, str], every: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names with their layouts, copies of a block with equal layouts as one pattern."""
    same: dict[str, list[str]] = defaultdict(list)
    for name, layout in layouts.items():
        same[layout].append(name)
    place = {name: i for i, name in enumerate(layouts)}
    found: list[tuple[int, str, str]] = []
    for layout, names in same.items():
        for text, copies in grouped_names(names, every):
            expression = matcher(text)
            exact = {name for name in every if expression.fullmatch(name)} == {*copies}
            found += [
                (place[copies[0]] if exact else place[name], name, layout)
                for name in ([text] if exact else copies)
            ]
    for _, name, layout in sorted(found):
        yield name, layout
