"""The parts of a search space: decisions, their candidates, and the values between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.fx as fx

from autopar.ir.graph import operands, shape_of
from autopar.ir.spec import ShardingSpec
from autopar.sharding.node_rules import results
from autopar.sharding.rule import Strategy


@dataclass(frozen=True)
class Candidate:
    """One choice of a decision.

    Args:
        name: what the plan file holds.
        outputs: layouts of the decision's values.
        inputs: layouts it needs of its operands.
        strategy: of an operator call.
        reshard_after_forward: of a parameter: the gathered copy is dropped after the forward and
            re-gathered for the backward (ZeRO-3), instead of kept (ZeRO-2).
    """

    name: str
    outputs: tuple[ShardingSpec, ...]
    inputs: tuple[ShardingSpec | None, ...] = ()
    strategy: Strategy | None = None
    reshard_after_forward: bool = False


@dataclass(frozen=True)
class Decision:
    """One decision.

    Args:
        kind: "parameter", "buffer", "input", "op", "shared" (layout of several users), "output".
        node: the graph node; of a shared layout, the one whose value is shared.
        candidates: at least one.
        time_us, memory_bytes: per candidate.
        candidates_class, cost_class: decisions with equal integers have equal candidates, or equal
            times, bytes and parts.
        parts: named shares of the costs, per candidate ("compute_us", ...).
        result: of a shared layout, which result of the node.
        repeats: decisions with equal keys are copies in repeated blocks.
    """

    kind: str
    node: fx.Node
    candidates: tuple[Candidate, ...]
    time_us: np.ndarray
    memory_bytes: np.ndarray
    candidates_class: int
    cost_class: int
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    result: int = 0
    repeats: Any = None

    @property
    def name(self) -> str:
        return f"{self.node.name}#{self.result}" if self.kind == "shared" else self.node.name


@dataclass(frozen=True)
class Edge:
    """A value that flows from one decision to another.

    Args:
        result: which output of the source.
        operand: which input of the target.
        shape, itemsize: of the global value.
        grad: the value carries a gradient.
        weight: the value is (a view of) a parameter.
        saved: backward needs the value, so a copy made by a conversion stays alive.
        grad_itemsize: of the gradient while it is converted.
        cast: the value is a copy of what the source stores, in another dtype.
    """

    source: int
    target: int
    result: int
    operand: int
    shape: tuple[int, ...]
    itemsize: int
    grad: bool
    weight: bool
    saved: bool
    grad_itemsize: int
    cast: bool = False


@dataclass(frozen=True)
class FixedLayouts:
    """Layouts that the caller decides.

    Args:
        parameters: by qualified name.
        inputs, outputs: by position (None: free).
        whole_sizes: dims of these sizes stay whole.
    """

    parameters: Mapping[str, ShardingSpec] = field(default_factory=dict)
    inputs: tuple[ShardingSpec | None, ...] | None = None
    outputs: tuple[ShardingSpec, ...] | None = None
    whole_sizes: frozenset[int] = frozenset()

    def allows(self, shape: Sequence[int], spec: ShardingSpec) -> bool:
        """Whether a value may have a layout, as far as its sizes go."""
        return not self.whole_sizes or not any(
            axes and size in self.whole_sizes for size, axes in zip(shape, spec.dims, strict=True)
        )

    def allows_strategy(self, node: fx.Node, strategy: Strategy) -> bool:
        """The same of all operands and results of a call."""
        if not self.whole_sizes:
            return True
        values = [None if n is None else n.meta["val"] for n in operands(node)]
        values, specs = [*values, *results(node)], (*strategy.inputs, *strategy.outputs)
        return all(
            value is None or spec is None or self.allows(shape_of(value), spec)
            for value, spec in zip(values, specs, strict=True)
        )


@dataclass(frozen=True)
class Workload:
    """What a step needs besides the graph.

    Args:
        trainable: placeholder names of parameters that require grad.
        state_bytes_per_param_byte: optimizer state per byte of parameter (Adam: 2).
        steps_on: the tiers that the optimizer can step on.
        states_on: the tier of all states, "" for the device; None to choose.
        forward: nothing is trained, and there is no backward.
        microbatches: of the batch; the graph is that of one. Inputs of all are there from the
            beginning, and gradients are summed over them.
    """

    trainable: frozenset[str]
    state_bytes_per_param_byte: float = 2.0
    steps_on: tuple[str, ...] = ()
    states_on: str | None = None
    forward: bool = False
    microbatches: int = 1
