"""The pass that substitutes autopar's kernels for ATen operators."""

from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from autopar.kernels import kernels_run_on

aten = torch.ops.aten


def substitute_kernels(gm: fx.GraphModule, *, device_type: str) -> fx.GraphModule:
    """Replace LayerNorm over the last dim, and its backward, by one Triton kernel each.

    Works in place on the forward and backward graphs of AOTAutograd. A node is replaced if it is on
    a device of this type and the kernel's outputs have the node's shapes, strides and dtypes.
    """
    if not kernels_run_on(device_type):
        return gm
    for target in (aten.native_layer_norm.default, aten.native_layer_norm_backward.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if _is_row_norm(node, device_type):
                _replace(node, *_kernel_call(node))
    return gm


def _is_row_norm(node: fx.Node, device_type: str) -> bool:
    """Whether the node normalizes rows that the kernels support, on such a device."""
    from autopar.kernels.layer_norm import MAX_WIDTH

    vals = [arg.meta.get("val") for arg in node.all_input_nodes]
    if node.kwargs or not all(
        isinstance(val, FakeTensor) and val.device.type == device_type for val in vals
    ):
        return False
    backward = node.target is aten.native_layer_norm_backward.default
    normalized_shape = node.args[2 if backward else 1]
    assert isinstance(normalized_shape, list | tuple)
    match normalized_shape:
        case [int(width)]:
            return width <= MAX_WIDTH
    return False


def _kernel_call(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """The custom op that does the node's work, and its arguments."""
    import autopar.kernels.layer_norm  # noqa: F401 - registers the ops

    if node.target is aten.native_layer_norm.default:
        x, _, weight, bias, eps = node.args
        return torch.ops.autopar.layer_norm_fwd.default, (x, weight, bias, eps)
    grad, x, _, mean, rstd, weight, bias, output_mask = node.args
    args = (grad, x, mean, rstd, weight, bias, output_mask)
    return torch.ops.autopar.layer_norm_bwd.default, args


def _replace(node: fx.Node, op: Any, args: tuple[Any, ...]) -> None:
    """Replace the node by `op(*args)` if the used outputs have the same layout."""
    with torch.no_grad():
        outputs = op(*fx.map_arg(args, lambda arg: arg.meta["val"]))
    if not _same_to_users(node, outputs):
        return
    with node.graph.inserting_before(node):
        kernel = node.graph.call_function(op, args)
    kernel.meta = node.meta | {"val": outputs}
    node.replace_all_uses_with(kernel)
    node.graph.erase_node(node)


def _same_to_users(node: fx.Node, outputs: tuple[Tensor, ...]) -> bool:
    """Whether the kernel's outputs match every used output of the node.

    They may differ: on CPUs ATen rounds the statistics of low-precision inputs, and an output that
    the mask excludes is None.
    """
    for user in node.users:
        if not user.users:
            continue
        if user.target is not getitem:
            return False
        index = user.args[1]
        assert isinstance(index, int)
        expected, actual = node.meta["val"][index], outputs[index]
        if expected is None or _layout(expected) != _layout(actual):
            return False
    return True


def _layout(val: Tensor) -> tuple[Any, ...]:
    return val.shape, val.stride(), val.dtype, val.device
