"""The layouts that constraints name, and why an operator or a tensor cannot have one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.fx as fx

from autopar.ir.graph import bound_arguments, shape_of
from autopar.ir.spec import ShardingSpec, fills_every_rank
from autopar.planner.decisions import Candidate, Decision
from autopar.planner.space import SearchSpace
from autopar.sharding.node_rules import rule_of
from autopar.sharding.rule import OpRule

_BY = "by"
# Attention, and what the capture makes of it where its mask is a band.
ATTENTION, IN_A_BAND = "scaled_dot_product_attention", "banded_attention"
_SHOWN = 24


@dataclass(frozen=True)
class WantedLayout:
    """One alternative of a constraint.

    Args:
        spec: None where the text has none, or none that can be read.
        reshard_after_forward: of a parameter; None if the constraint leaves it open.
        text: as the user wrote it.
        error: why there is no spec.
        factors: that the strategy must split, as often as they are named.
    """

    spec: ShardingSpec | None
    reshard_after_forward: bool | None
    text: str
    error: str = ""
    factors: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> WantedLayout:
        words = text.split()
        if _BY in words[:-1]:
            place = words.index(_BY)
            layout = WantedLayout(None, None, "")
            if place:
                layout = WantedLayout.parse(" ".join(words[:place]))
            return replace(layout, text=text, factors=tuple(words[place + 1 :]))
        reshard = {"reshard": True, "keep": False}.get(words[-1]) if len(words) > 1 else None
        body = " ".join(words if reshard is None else words[:-1])
        try:
            spec = ShardingSpec.parse("" if body == "scalar" else body)
        except ValueError as error:
            return WantedLayout(None, reshard, text, str(error))
        return WantedLayout(spec, reshard, text)

    def allows(self, candidate: Candidate) -> bool:
        if self.factors:
            strategy = candidate.strategy
            if strategy is None:
                return False
            if any(len(strategy.splits.get(f, ())) < n for f, n in Counter(self.factors).items()):
                return False
            if self.spec is None and not self.error:
                return True
        if self.reshard_after_forward not in (None, candidate.reshard_after_forward):
            return False
        spec = candidate.outputs[0]
        # a layout without V constrains the value, not its gradient
        return self.spec == (spec if self.spec and self.spec.varying else spec.data())


def refusal_of(
    space: SearchSpace, decision: Decision, name: str, place: str, layout: WantedLayout
) -> str:
    """Why no candidate of a decision is as the constraint of that name wants.

    Args:
        place: that the name stands for.
    """
    kind = {"parameter": "parameter", "input": "input"}.get(decision.kind, "result")
    value = decision.node.meta["val"]
    shape = list(shape_of(value[decision.result] if isinstance(value, list | tuple) else value))
    mesh = space.cluster.mesh_text
    legal = list(dict.fromkeys(str(c.outputs[0].data()) or "scalar" for c in decision.candidates))
    alone = replace(layout, factors=())
    no_layout = layout.spec is None and not layout.error
    if layout.factors and (no_layout or any(alone.allows(c) for c in decision.candidates)):
        return _no_strategy(space, decision, name, place, layout)
    more = f", and {len(legal) - _SHOWN} more" if len(legal) > _SHOWN else ""
    if layout.spec is None:
        why = f"is not a layout ({layout.error})"
    elif layout.spec.ndim != len(shape):
        why = f"has {layout.spec.ndim} dims, and {kind} {place} has {len(shape)}"
    elif axes := [a for a in axes_of(layout.spec) if a >= len(space.mesh)]:
        known = space.cluster.axes_text or f"0 to {len(space.mesh) - 1}"
        why = f"splits over axis {axes[0]}, and mesh {mesh} has axes {known}"
    else:
        empty = _without_a_part(layout.spec, shape, space.mesh)
        why = f"{empty or 'is not among the layouts of'} {kind} {place}"
        strategies = [c.strategy for c in decision.candidates if c.strategy is not None]
        if empty and any("exchange" in strategy.splits for strategy in strategies):
            why += " (`by exchange` splits the sequence outside of attention, and repeats keys)"
        if varying := _varying_size(space, layout.spec, shape):
            why += (
                f" (its size {varying} varies between batches, and mesh {mesh} does not divide it: "
                "pad batches, or leave the constraint out)"
            )
    return (
        f"constraint {name!r}: {layout.text!r} {why}. {kind.capitalize()} {place} of shape {shape} "
        f"on mesh {mesh} can have {', '.join(legal[:_SHOWN])}{more}"
    )


def _without_a_part(spec: ShardingSpec, shape: Sequence[int], mesh: Sequence[int]) -> str:
    """Which dim is too short for its ranks, which take parts as `torch.chunk` cuts them; empty if
    none is."""
    for dim, (size, axes) in enumerate(zip(shape, spec.dims, strict=True)):
        ranks = math.prod(mesh[a] for a in axes)
        if not fills_every_rank(size, axes, mesh):
            part = -(-size // ranks)
            parts = f" in parts of {part}" if part > 1 else ""
            return (
                f"leaves ranks without a part: {ranks} split dim {dim}, of size {size}{parts}, of"
            )
    return ""


def _no_strategy(
    space: SearchSpace, decision: Decision, name: str, place: str, layout: WantedLayout
) -> str:
    strategies = [c.strategy for c in decision.candidates if c.strategy is not None]
    factors = dict.fromkeys(f for s in strategies for f in s.splits)
    rule, _ = rule_of(decision.node)
    bounds = _bounds(space, rule, layout)
    for factor, times in Counter(layout.factors).items():
        most = max((len(s.splits.get(factor, ())) for s in strategies), default=0)
        if times > most > 0:
            bounds = f"{factor} splits {most} {'axis' if most == 1 else 'axes'} at most"
    beside = [f for f in {*layout.factors} & {*rule.factors} if rule.factors[f].beside]
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
        f"{_of_attention(decision.node, rule, layout)}"
    )


def _bounds(space: SearchSpace, rule: OpRule, layout: WantedLayout) -> str:
    """Which dims a strategy would split into fewer parts than there are ranks, or else which
    other factors split the same dims."""
    named = [(f, names, n) for names, n in rule.joint for f in sorted({*layout.factors} & {*names})]
    axis = min(
        (a for a, n in enumerate(space.mesh) if n > 1), key=space.mesh.__getitem__, default=0
    )
    short = {f: n for f, _, n in named if not fills_every_rank(n, [axis], space.mesh)}
    if short:
        ranks = space.mesh[axis]
        texts = (f"{f} splits a dim of {n} over {ranks} ranks" for f, n in short.items())
        return "; ".join(texts) + "; every rank must have a part"
    texts = (
        f"{f} splits a dim of {n}, and so {'do' if len(names) > 2 else 'does'} "
        f"{' and '.join(o for o in names if o != f)}"
        for f, names, n in named
    )
    joined = "; ".join(texts)
    return joined and f"{joined}; every rank must have a part"


def _varying_size(space: SearchSpace, spec: ShardingSpec, shape: Sequence[int]) -> int | None:
    """A size that a layout would split, and that stays whole as it varies."""
    sizes = (size for size, axes in zip(shape, spec.dims, strict=True) if axes)
    return next((size for size in sizes if size in space.fixed.whole_sizes), None)


def _of_attention(node: fx.Node, rule: OpRule, layout: WantedLayout) -> str:
    """Why an attention has fewer strategies than others."""
    arguments = bound_arguments(node)
    if ATTENTION in str(node.target) and "exchange" in {*layout.factors} - {*rule.factors}:
        return (
            "; it has as many heads of keys as of queries, and heads are exchanged where its "
            "result is split by heads: RS0RR"
        )
    if ATTENTION in str(node.target) and arguments.get("dropout_p"):
        return "; it has dropout, which is drawn where a query has all of its keys"
    if IN_A_BAND not in str(node.target):
        return ""
    first, last = arguments["before"], arguments["after"]
    seen = "from the first" if first is None else f"from {first} before it"
    seen += " to the last" if last is None else f" to {last} after it"
    return f"; a query sees the keys {seen}"


def axes_of(spec: ShardingSpec) -> list[int]:
    """All axes that a layout names."""
    return [*(a for dim in spec.dims for a in dim), *spec.partial, *spec.varying]
