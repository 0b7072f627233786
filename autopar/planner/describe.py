"""A plan in words, module by module.

Along each mesh axis an operator splits at most one factor. The name of that depends on which of its
tensors have the factor:

    in the weight and in the result     column   (tensor parallel)
    in the weight, summed over          row      (tensor parallel)
    rows of a table, classes of a loss  vocabulary
    first dim of the activations        data     (data parallel)
    a middle dim of them                heads of attention, else sequence
    last dim of them                    features

and a parameter that is stored split but consumed replicated is sharded as by ZeRO, or gathered for
use where there is no backward. Products that are split by rows and features at once, with operands
gathered for them, are 2D, 2.5D or 3D tensor parallel (`autopar/planner/scheme_roles.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch.fx as fx

from autopar.ir.graph import operand_at, shape_of
from autopar.ir.repeats import INDEX, pattern
from autopar.plan_records import ModuleSummary
from autopar.planner.decisions import Candidate, Decision
from autopar.planner.scheme_roles import DEPTH, ROLES, AtRest, scheme_of
from autopar.planner.space import SearchSpace
from autopar.sharding.node_rules import rule_of
from autopar.sharding.rule import OpRule, alternatives, factors_of
from autopar.sharding.strategies import passes_sum

_PRODUCTS = (
    "aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten.linear.", "autopar.packed_",
    "aten.matmul.", "aten.conv",
)  # fmt: skip
_ATTENTION = ("aten.scaled_dot_product_attention.", "autopar.banded_attention.")
_EMBEDDING = "aten.embedding."
_LOSSES = ("aten.cross_entropy_loss.", "autopar.token_cross_entropy.")
# The operators that define what a module does; views and pointwise ops count where there are none.
_ANCHORS = (*_PRODUCTS, *_ATTENTION, _EMBEDDING, *_LOSSES, "aten.mse_loss.", "norm")

_PHRASES = {
    "data": "data parallel on {}",
    "vocabulary": "vocabulary split over {}",
    "positions": "positions split over {}",
    "heads": "heads split over {}",
    "sequence": "sequence split over {}",
    "ring": "sequence split over {}, keys and values on a ring",
    "halo": "sequence split over {}, keys of windows from neighbors",
    "exchange": "sequence split over {}, exchanged for heads in attention",
    "features": "features split over {}",
    "partial": "pending sums carried over {}",
    "2d": "2D tensor parallel on {} (SUMMA)",
    "2.5d": "2.5D tensor parallel on {} (SUMMA)",
    DEPTH: "rows split over {} (depth)",
    "3d": "3D tensor parallel on {}",
}
# Of attention, by the factors of `autopar/sharding/rules/attention.py`.
_SEQUENCES = {
    "q": "sequence", "ring": "ring", "halo": "halo", "exchange": "exchange", "e": "features",
}  # fmt: skip
_ZERO = {
    True: "ZeRO-3 (re-gathered for backward)",
    False: "ZeRO-2 (gathered once, kept for backward)",
}
_GATHERED = dict.fromkeys(_ZERO, "weights gathered for use")  # where there is no backward

# Per mesh axis what was done along it, in the order of the operators that did.
Roles = dict[int, tuple[str, ...]]


@dataclass
class _Module:
    """Roles and costs of one module, collected from its decisions."""

    roles: list[tuple[Roles, float, bool]] = field(default_factory=list)  # us, anchor
    gathers: dict[int, bool] = field(default_factory=dict)  # axis to reshard_after_forward
    kinds: list[str] = field(default_factory=list)
    parameters: int = 0
    time_us: float = 0.0
    memory_bytes: float = 0.0


def describe(space: SearchSpace, choices: Sequence[int]) -> tuple[ModuleSummary, ...]:
    """Modules in the order of execution, copies in repeated blocks together.

    A module that only contains others has an entry where they are tensor parallel as a pair. Times
    and bytes are each module's own, so that they add up to the plan's.
    """
    modules = _walk(space, choices)
    roles = {name: _roles_of(module) for name, module in modules.items()}
    parents = dict.fromkeys(name.rpartition(".")[0] for name in modules if name)
    pairs = {parent: pair for parent in parents if (pair := _pairs(parent, roles))}
    entries: dict[str, tuple[str, _Module]] = {}
    gathered = _GATHERED if space.workload.forward else _ZERO
    for name in modules:
        for entry in (name.rpartition(".")[0], name):
            if entry in pairs or entry == name:
                module = modules.get(entry, _Module())
                pair, own = pairs.get(entry, {}), roles.get(entry, {})
                both = {axis: pair.get(axis, ()) + own.get(axis, ()) for axis in {**pair, **own}}
                words = _words(both, module.gathers, space.cluster.axis_names, gathered)
                entries.setdefault(entry, (words, module))
    return tuple(_grouped(entries))


# -- roles of operators -------------------------------------------------------------------------


def _walk(space: SearchSpace, choices: Sequence[int]) -> dict[str, _Module]:
    """Modules by qualified name, in the order of execution."""
    chosen = [s.candidates[c] for s, c in zip(space.decisions, choices, strict=True)]
    owners = [_owner(space, decision) for decision in space.decisions]
    run = [o for d, o in zip(space.decisions, owners, strict=True) if d.kind == "op"]
    modules = {owner: _Module() for owner in dict.fromkeys((*run, *owners))}
    weights, at_rest = space.weight_operands(), AtRest(space, chosen)
    root = {i: i for i, decision in enumerate(space.decisions) if decision.kind == "parameter"}
    for edge in space.edges:
        time_us, nbytes = space.conversion_costs(edge, choices)
        module = modules[owners[edge.target]]
        module.time_us += time_us
        module.memory_bytes += nbytes
        if edge.weight:  # of a parameter, of a shared one, or of a view of one
            origin = root.setdefault(edge.target, root[edge.source])
            before = chosen[edge.source].outputs[edge.result]
            after = chosen[edge.target].inputs[edge.operand]
            if after is not None:
                gathered = {a for d in before.dims for a in d} - {a for d in after.dims for a in d}
                modules[owners[origin]].gathers |= dict.fromkeys(
                    gathered, chosen[origin].reshard_after_forward
                )
    for i, (decision, owner, c) in enumerate(zip(space.decisions, owners, choices, strict=True)):
        module = modules[owner]
        module.time_us += float(decision.time_us[c])
        module.memory_bytes += float(decision.memory_bytes[c])
        if decision.kind == "parameter":
            module.parameters += decision.node.meta["val"].numel()
        if decision.kind == "op":
            name = str(decision.node.target)
            module.kinds.append(name)
            roles = _op_roles(decision, chosen[i], weights[i])
            if name.startswith(_PRODUCTS):
                for w in weights[i]:
                    roles |= scheme_of(decision, chosen[i], w, partial(at_rest, i))
            is_anchor = any(anchor in name for anchor in _ANCHORS)
            module.roles.append((roles, float(decision.time_us[c]), is_anchor))
    return modules


def _owner(space: SearchSpace, decision: Decision) -> str:
    """Qualified name of the module that a decision belongs to."""
    node = decision.node
    if node.op == "placeholder":
        target = str(node.target)
        name = space.graph.parameters.get(target) or space.graph.buffers.get(target, "")
        return name.rpartition(".")[0]
    return "" if node.op == "output" else space.graph.info(node).module


def _op_roles(decision: Decision, candidate: Candidate, weights: Sequence[int]) -> Roles:
    """The role of an operator along each axis."""
    assert candidate.strategy is not None
    rule, _ = rule_of(decision.node)
    roles: Roles = {}
    for factor, axes in candidate.strategy.splits.items():
        role = _factor_role(decision.node, rule, factor, weights)
        roles |= dict.fromkeys(axes, (role,))
    for axis, choice in enumerate(candidate.strategy.name.split()):
        if passes_sum(choice):
            roles[axis] = ("partial",)
    return roles


def _factor_role(node: fx.Node, rule: OpRule, factor: str, weights: Sequence[int]) -> str:
    name = str(node.target)
    if name.startswith(_LOSSES):
        return "vocabulary" if rule.factors[factor].complete else "data"
    matrices = [dims for i in weights if (dims := rule.inputs[i]) is not None and len(dims) > 1]
    for dims in matrices:
        if factor in dims and name.startswith(_EMBEDDING):
            return _table_role(node) if dims[0] == factor else "features"
        dim = next((alternatives(d) for d in dims if factor in alternatives(d)), ())
        if dim and name.startswith(_PRODUCTS):  # `n|gather`, `k|scatter`: n is of results, k is not
            return "column" if any(dim[0] in factors_of(out) for out in rule.outputs) else "row"
    tensors = [*rule.outputs, *(dims for dims in rule.inputs if dims is not None)]
    if name.startswith(_ATTENTION) and factor in _SEQUENCES:
        return _SEQUENCES[factor]
    place, dims = next(
        (place, dims)
        for dims in tensors
        for place, dim in enumerate(dims)
        if factor in alternatives(dim)
    )
    if place == 0:
        return "data"
    if name.startswith(_ATTENTION):
        return "heads"
    return "sequence" if place == 1 and len(dims) == 3 else "features"


def _table_role(node: fx.Node) -> str:
    """Whether rows of an embedding's table are words, or positions: looked up once per batch."""
    shape = shape_of(operand_at(node, 1).meta["val"])
    return "positions" if len(shape) > 1 and shape[0] == 1 else "vocabulary"


def _roles_of(module: _Module) -> Roles:
    """Per axis the roles of the module's anchors, or the role that takes most of its time."""
    anchors = [roles for roles, _, anchor in module.roles if anchor]
    axes = sorted({axis for roles, _, _ in module.roles for axis in roles})
    if anchors:
        every = {a: [role for roles in anchors for role in roles.get(a, ())] for a in axes}
        return {axis: tuple(dict.fromkeys(roles)) for axis, roles in every.items() if roles}
    longest: Roles = {}
    for axis in axes:
        spent: dict[tuple[str, ...], float] = defaultdict(float)
        for roles, time_us, _ in module.roles:
            spent[roles.get(axis, ())] += time_us
        if most := max(spent, key=lambda role: spent[role]):
            longest[axis] = most
    return longest


# -- phrases ------------------------------------------------------------------------------------


def _words(
    roles: Roles,
    gathers: Mapping[int, bool],
    axis_names: Sequence[str],
    gathered: Mapping[bool, str],
) -> str:
    """`data parallel on axis 0, ZeRO-3 (re-gathered for backward); tensor parallel on ...`"""
    phrases = []
    gathering = {axis for axis, names in roles.items() if {*ROLES} & {*names}}
    again = any(gathers.get(axis, False) for axis in gathering)
    gathers = {axis: kind for axis, kind in gathers.items() if axis not in gathering}
    split: dict[str, list[int]] = defaultdict(list)
    for axis, names in roles.items():
        shapes = [n for n in names if n in ("column", "row")]
        if shapes:
            split[" then ".join(shapes)].append(axis)
        for name in names:
            if name not in shapes:
                split[name].append(axis)
    zero: dict[bool, list[int]] = defaultdict(list)
    for axis, kind in sorted(gathers.items()):
        zero[kind].append(axis)
    for name, axes in split.items():
        where = _axes(axes, axis_names)
        phrase = _PHRASES.get(name, "tensor parallel on {}, " + name).format(where)
        if name in ROLES and again:
            phrase += ", weights re-gathered for backward"
        for kind in [kind for kind, over in zero.items() if name == "data" and over == axes]:
            phrase += f", {gathered[kind]}"
            del zero[kind]
        phrases.append(phrase)
    phrases += [
        f"parameters sharded over {_axes(axes, axis_names)}, {gathered[kind]}"
        for kind, axes in zero.items()
    ]
    return "; ".join(phrases) or "replicated"


def _axes(axes: Sequence[int], names: Sequence[str]) -> str:
    """`axis 0`, `axes 0, 1 and 2`, or the names of the axes, if they have any."""
    texts = [names[axis] if names else str(axis) for axis in axes]
    text = " and ".join([*([", ".join(texts[:-1])] if texts[:-1] else []), texts[-1]])
    return text if names else f"{'axis' if len(axes) == 1 else 'axes'} {text}"


def _pairs(parent: str, roles: Mapping[str, Roles]) -> Roles:
    """Axes along which the children of a module are tensor parallel as a pair."""
    prefix = f"{parent}." if parent else ""
    order: dict[int, list[str]] = defaultdict(list)
    for name, own in roles.items():
        if name.startswith(prefix) and name != parent and "." not in name[len(prefix) :]:
            for axis, names in own.items():
                order[axis] += [n for n in names if n in ("column", "row")]
    unique = {axis: tuple(dict.fromkeys(names)) for axis, names in order.items()}
    return {axis: names for axis, names in unique.items() if len(names) == 2}


# -- repeated blocks ----------------------------------------------------------------------------

# per place of a name the indices of some copies
Box = tuple[frozenset[int], ...]


def _grouped(entries: Mapping[str, tuple[str, _Module]]) -> Iterable[ModuleSummary]:
    """Copies with the same words as one entry, named with `*` for all and `{0,2-5}` for some."""
    same: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
    every: dict[str, list[str]] = defaultdict(list)
    for name, (words, module) in entries.items():
        same[pattern(name), words, tuple(module.kinds)].append(name)
        every[pattern(name)].append(name)
    for (general, words, _), names in same.items():
        for text, copies in grouped_names(names, every[general]):
            members = [entries[name][1] for name in copies]
            yield ModuleSummary(
                text, words, len(members), sum(m.parameters for m in members),
                sum(m.time_us for m in members), sum(m.memory_bytes for m in members),
            )  # fmt: skip


def grouped_names(names: Sequence[str], every: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Names as patterns, each with the names it stands for.

    Args:
        every: all existing names, so that `*` can stand for all copies.
    """
    copies: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in every:
        copies[pattern(name)].append(_indices(name))
    same: dict[str, dict[tuple[int, ...], str]] = defaultdict(dict)
    for name in names:
        same[pattern(name)][_indices(name)] = name
    return [
        (_named(general, box, copies[general]), [n for p, n in points.items() if _inside(p, box)])
        for general, points in same.items()
        for box in _boxes(list(points))
    ]


def _inside(point: tuple[int, ...], box: Box) -> bool:
    return all(i in values for i, values in zip(point, box, strict=True))


def _indices(name: str) -> tuple[int, ...]:
    return tuple(int(i) for i in INDEX.findall(name))


def _boxes(points: Sequence[tuple[int, ...]]) -> list[Box]:
    """Products of index sets that together are exactly the points."""
    boxes: list[Box] = [tuple(frozenset((i,)) for i in point) for point in points]
    for place in reversed(range(len(points[0]))):
        merged: dict[Box, frozenset[int]] = {}
        for box in boxes:
            others = box[:place] + box[place + 1 :]
            merged[others] = merged.get(others, frozenset()) | box[place]
        boxes = [(*o[:place], values, *o[place:]) for o, values in merged.items()]
    return boxes


def _named(general: str, box: Box, copies: Sequence[tuple[int, ...]]) -> str:
    parts = general.split("*")
    name = parts[0]
    for place, (values, part) in enumerate(zip(box, parts[1:], strict=True)):
        others = {
            point[place]
            for point in copies
            if all(point[p] in v for p, v in enumerate(box) if p != place)
        }
        every = len(values) > 1 and values == others
        name += ("*" if every else indexed(values)) + part
    return name


def indexed(values: Iterable[int]) -> str:
    """Indices of copies: `3`, or `{0,2-5}`."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
    return texts[0] if texts == [str(min(values))] else "{" + ",".join(texts) + "}"
