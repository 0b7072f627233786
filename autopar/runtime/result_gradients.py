"""Which gradients each result of a program has a part in.

A program computes the gradients of all arguments at once. In eager PyTorch, a result that the loss
does not use gives none: the gradients of what serves it alone are None, and optimizers skip them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from autopar.errors import EngineError
from autopar.ir.graph import ModelGraph
from autopar.profiler.profile import requires_grad_map


@dataclass(frozen=True)
class ResultGradients:
    """
    Args:
        reached: per output of the graph, positions of the arguments whose gradients it has.
        feeding: positions of outputs from which other outputs are computed.
    """

    reached: Sequence[frozenset[int]]
    feeding: frozenset[int]
    _used: dict[tuple[bool, ...], frozenset[int]] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(graph: ModelGraph, trainable: frozenset[str]) -> ResultGradients:
        """Args:
        trainable: placeholder names of what requires grad.
        """
        carries = requires_grad_map(graph, set(trainable))
        arguments = [n for n in graph.nodes if n.op == "placeholder" and "val" in n.meta]
        arguments = [n for n in arguments if isinstance(n.meta["val"], torch.Tensor)]
        position = {n: k for k, n in enumerate(arguments)}
        outputs = list(graph.output.args[0])  # type: ignore[arg-type]
        reached, feeding = [], set()
        for i, output in enumerate(outputs):
            before = _sources(output, carries) if isinstance(output, fx.Node) else set()
            reached.append(frozenset(position[n] for n in before if n in position))
            feeding |= {k for k, other in enumerate(outputs) if k != i and other in before}
        return ResultGradients(tuple(reached), frozenset(feeding))

    def used(self, present: tuple[bool, ...]) -> frozenset[int]:
        """Positions of the arguments that get a gradient.

        Args:
            present: per output, whether its gradient has come.
        """
        if present not in self._used:
            pairs = zip(self.reached, present, strict=True)
            self._used[present] = frozenset().union(*(r for r, there in pairs if there))
        return self._used[present]


def _sources(output: fx.Node, carries: dict[fx.Node, bool]) -> set[fx.Node]:
    """What a gradient of the output flows to, without the output itself."""
    found: set[fx.Node] = set()
    waiting = [output]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if carries.get(node) and node not in found:
                found.add(node)
                waiting.append(node)
    return found if carries.get(output) else set()


def refuse_hooks(result: torch.Tensor) -> None:
    """Refuse what would see a part of the gradient of a result that feeds another result."""

    def refused(*_: object) -> None:
        raise EngineError(
            "this result of the model is also the source of another result (a loss), and its "
            "gradient within the program is not to be had; register the hook inside of the "
            "forward, or by register_full_backward_hook of the module that computes it"
        )

    for name in ("register_hook", "retain_grad"):
        setattr(result, name, refused)
