"""`JointGraph`: the forward and the backward of one rank's program as one graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx


@dataclass(frozen=True)
class Result:
    """What the caller is to know of a result before the program runs.

    Args:
        differentiable: it carries a gradient.
        tangent: shape, strides, dtype and device of its gradient as the backward reads it; None
            without a gradient.
    """

    differentiable: bool
    tangent: torch.Tensor | None


@dataclass(frozen=True)
class JointGraph:
    """A forward and its backward as one graph.

    Args:
        gm: takes the arguments and the gradients of differentiable results (tangents), returns the
            results and the gradients of the arguments.
        results: of the forward; the leading outputs of the graph.
    """

    gm: fx.GraphModule
    results: tuple[Result, ...]

    @property
    def tangents(self) -> list[fx.Node]:
        """The placeholders of gradients of results."""
        return [n for n in self._placeholders if _is_tangent(n)]

    @property
    def primals(self) -> list[fx.Node]:
        """The placeholders of the arguments."""
        return [n for n in self._placeholders if not _is_tangent(n)]

    @property
    def _placeholders(self) -> list[fx.Node]:
        return list(self.gm.graph.find_nodes(op="placeholder"))

    @property
    def outputs(self) -> list[Any]:
        """Results, then gradients of the arguments (None where there is none)."""
        (flat,) = self.gm.graph.output_node().args
        return list(flat)  # type: ignore[arg-type]

    @property
    def gradients_too(self) -> list[Any]:
        """The same, with None for all gradients if the graph has no backward."""
        outputs = self.outputs
        return outputs if self.differentiable else outputs + [None] * len(self.primals)

    @property
    def differentiable(self) -> bool:
        return any(result.differentiable for result in self.results)


def _is_tangent(node: fx.Node) -> bool:
    return "tangents" in str(node.target)
