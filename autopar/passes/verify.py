"""`verify`: what must hold of a program between passes, and across ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from autopar.comm.groups import group_of_all
from autopar.comm.steps import STEPS
from autopar.ir.aliasing import Storage, storages

_STEPS = set(STEPS.values())
_NAMESPACES = ("autopar", "_c10d_functional")


class VerifyError(AssertionError):
    """A pass produced a program that cannot be right: a bug of autopar, not of its user."""


def verify(gm: fx.GraphModule) -> None:
    """Check one program: SSA form, the shapes that the plan foretold, and that nothing reads what
    a collective still writes.

    Raises:
        VerifyError: naming the node.
    """
    gm.graph.lint()
    for node in gm.graph.nodes:
        expected, value = node.meta.get("local_shape"), node.meta.get("val")
        if expected is None or not isinstance(value, torch.Tensor):
            continue
        if tuple(value.shape) != tuple(expected):
            raise VerifyError(
                f"{node.format_node()}: the layout {node.meta.get('spec')} gives the local shape "
                f"{tuple(expected)}, the program computes {tuple(value.shape)}"
            )
    _check_waits(gm.graph)


def _check_waits(graph: fx.Graph) -> None:
    """A collective that was started may be shown, finished and returned, and nothing else may read
    it before it is finished."""
    if not any(_half(node) == "start" for node in graph.nodes):
        return
    where = storages(graph)
    started: set[Storage] = set()
    for node in graph.nodes:
        half = _half(node)
        if half == "start":
            started.add(where[node])
        if half in ("finish", "wait"):
            started -= {where[n] for n in node.all_input_nodes}
        elif node.op == "call_function" and where[node] not in started:
            early = [n for n in node.all_input_nodes if where[n] in started]
            if early:
                raise VerifyError(
                    f"{node.format_node()}: reads {early[0]} before its collective is finished"
                )


def _half(node: fx.Node) -> str:
    """Whether an operator starts a collective or finishes one; empty for others."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "autopar":
        return ""
    name = target._opname.split("_")[0]
    return name if name in ("start", "finish", "wait") else ""


class _Shapes(fx.Interpreter):
    """Runs a program and notes what every node gives."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def propagate_shapes(gm: fx.GraphModule, arguments: Sequence[torch.Tensor]) -> fx.GraphModule:
    """Set `meta["val"]` of every node by running the program on fake tensors."""
    _Shapes(gm).run(*arguments)
    return gm


def collective_signature(gm: fx.GraphModule, groups: Sequence[str]) -> str:
    """Hash of the sequence of communications: equal on all ranks, or they deadlock.

    Groups are identified by mesh axis, so that the signatures of different ranks compare.
    """
    axis: dict[Any, Any] = {name: i for i, name in enumerate(groups)} | {
        group_of_all(groups): "all"
    }
    digest = hashlib.sha256()
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        target = node.target
        is_op = isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES
        if target in _STEPS or is_op:
            used = [axis[a] for a in node.args if isinstance(a, str) and a in axis]
            digest.update(repr((str(getattr(target, "__name__", target)), used)).encode())
    return digest.hexdigest()[:16]
