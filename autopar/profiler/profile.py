"""Per-node costs, forward and backward, without running anything.

Each node's own ATen program is dispatched on fake tensors, once as is and once through autograd,
under a mode that counts; what autograd saves is seen by its saved-tensor hooks. Identical calls are
profiled once, so a deep model costs one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from autopar.tracer.graph import ModelGraph, map_operands, operands


@dataclass(frozen=True)
class NodeProfile:
    """Costs of one node at global shapes.

    Args:
        forward_flops, backward_flops: multiply and add count as two.
        forward_bytes, backward_bytes: bytes read and written by the kernels.
        forward_kernels, backward_kernels: operators launched.
        saves_inputs: operand indices whose storage autograd keeps for backward.
        saves_outputs: result indices likewise.
        saved_internal_bytes: kept storage that is neither.
        differentiable: some operand requires grad and the results carry a gradient.
        aliases_input: the first result shares its storage with an operand (a view).
    """

    forward_flops: int = 0
    backward_flops: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    forward_kernels: int = 0
    backward_kernels: int = 0
    saves_inputs: tuple[int, ...] = ()
    saves_outputs: tuple[int, ...] = ()
    saved_internal_bytes: int = 0
    differentiable: bool = False
    aliases_input: bool = False


def _cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch's table lacks attention on the CPU.
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _cpu_attention_backward_flops
    ),
}


def _nbytes(value: Any) -> int:
    return sum(
        t.numel() * t.element_size()
        for t in pytree.tree_leaves(value)
        if isinstance(t, torch.Tensor)
    )


class _Counter(TorchDispatchMode):
    """Sums FLOPs, bytes and kernels over everything dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _CPU_ATTENTION:
            shapes = pytree.tree_map_only(torch.Tensor, lambda t: t.shape, args)
            self.flops += _CPU_ATTENTION[packet](*shapes)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        if not func.is_view and func.namespace in ("aten", "autopar"):
            self.bytes += _nbytes((args, kwargs)) + _nbytes(out)
            self.kernels += 1
        return out


def requires_grad_map(graph: ModelGraph, trainable: set[str]) -> dict[fx.Node, bool]:
    """Which values carry a gradient: floating point, and computed from a trainable parameter.

    Args:
        trainable: placeholder names of the parameters that require grad.
    """
    found: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = node.target in trainable
        elif node.op == "call_function":
            values = [v for v in pytree.tree_leaves(node.meta["val"]) if torch.is_tensor(v)]
            floating = any(v.dtype.is_floating_point or v.dtype.is_complex for v in values)
            detached = str(node.target) == "aten.detach.default"
            reached = any(found[n] for n in node.all_input_nodes)
            found[node] = floating and reached and not detached
    return found


def _signature(node: fx.Node, grads: Sequence[bool]) -> Any:
    def describe(n: fx.Node) -> Any:
        value = n.meta["val"]
        return pytree.tree_map_only(
            torch.Tensor, lambda t: (tuple(t.shape), t.stride(), str(t.dtype)), value
        )

    args = pytree.tree_map_only(fx.Node, describe, (node.args, node.kwargs))
    return str(node.target), repr(args), tuple(grads)


def profile_graph(graph: ModelGraph, trainable: set[str]) -> dict[fx.Node, NodeProfile]:
    """Costs of every operator call of the graph.

    Args:
        trainable: placeholder names of the parameters that require grad.
    """
    needs_grad = requires_grad_map(graph, trainable)
    cache: dict[Any, NodeProfile] = {}
    found = {}
    for node in graph.compute_nodes():
        grads = [n is not None and needs_grad[n] for n in operands(node)]
        key = _signature(node, grads)
        if key not in cache:
            cache[key] = _profile_node(node, grads)
        found[node] = cache[key]
    return found


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


def _profile_node(node: fx.Node, grads: Sequence[bool]) -> NodeProfile:
    device = next(
        (v.device for v in pytree.tree_leaves(node.meta["val"]) if torch.is_tensor(v)),
        torch.device("cpu"),
    )
    with FakeTensorMode() as mode, torch.enable_grad():

        def fresh(t: torch.Tensor, grad: bool) -> torch.Tensor:
            made = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)
            # a value that was computed, not a leaf, as it will be in the graph
            return made.requires_grad_(grad and made.dtype.is_floating_point)

        wanted = iter(grads)
        inputs: list[torch.Tensor | None] = []
        made: dict[int, torch.Tensor] = {}
        for n in operands(node):
            grad = next(wanted)
            if n is None:
                inputs.append(None)
                continue
            if id(n) not in made:
                made[id(n)] = fresh(n.meta["val"], grad)
            inputs.append(made[id(n)])
        args, kwargs = map_operands(node, list(inputs))
        saved: list[torch.Tensor] = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), _Counter() as forward:
            out = node.target(*args, **kwargs)  # type: ignore[operator]
        outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        roots = [t for t in outputs if t.requires_grad]
        backward = _Counter()
        if roots:
            seeds = [torch.empty_like(t) for t in roots]
            leaves = list({id(t): t for t in inputs if t is not None and t.requires_grad}.values())
            with backward:
                torch.autograd.grad(roots, leaves, seeds, allow_unused=True)
        in_storage = {_storage(t): i for i, t in reversed(list(enumerate(inputs))) if t is not None}
        out_storage = {_storage(t): i for i, t in reversed(list(enumerate(outputs)))}
        aliases = bool(outputs) and _storage(outputs[0]) in in_storage
        saved_in, saved_out, internal = set(), set(), {}
        for t in saved:
            key = _storage(t)
            if key in in_storage:
                saved_in.add(in_storage[key])
            elif key in out_storage:
                saved_out.add(out_storage[key])
            else:
                internal[key] = t.untyped_storage().nbytes()
        del mode
    return NodeProfile(
        forward.flops,
        backward.flops,
        forward.bytes,
        backward.bytes,
        forward.kernels,
        backward.kernels,
        tuple(sorted(saved_in)),
        tuple(sorted(saved_out)),
        sum(internal.values()),
        bool(roots),
        aliases,
    )


def value_bytes(node: fx.Node) -> int:
    """Bytes of a node's tensors at global shape."""
    return _nbytes(node.meta["val"])
