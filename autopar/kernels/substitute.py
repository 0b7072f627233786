"""The pass that substitutes kernels for ATen operators, in a forward program.

It runs before differentiation: a kernel's operator has its derivative, so that the backward has the
backward kernel, and a schedule sees the sizes and times of both. What is kept for the backward is
what the kernels need. All that decides is the program and the plan's device, so ranks with the same
program decide alike.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from autopar.cluster.device import Device
from autopar.ir.aliasing import is_view
from autopar.ir.graph import bound_arguments
from autopar.kernels import kernels_run_on
from autopar.profiler.time_model import Kernel, KernelLog

if TYPE_CHECKING:
    from autopar.kernels.patterns import Matched
    from autopar.kernels.table import KernelRow

log = logging.getLogger(__name__)

aten = torch.ops.aten

# The least time of a kernel on a GPU, assumed: the host's, for a call of an operator that is
# registered in Python and launches a Triton kernel. On a slow host (2-core VM) the call takes 53 us
# without the launch, one of ATen's operators 7.
HOST_US = 50.0


def substitute_kernels(
    gm: fx.GraphModule, *, device: Device, scheduled: bool = False
) -> fx.GraphModule:
    """Replace what the rows of the table match, where the kernels are faster.

    Args:
        gm: a forward program, with fake tensors as `meta["val"]`; is changed in place.
        device: whose numbers both sides are priced by.
        scheduled: a schedule will decide what is recomputed. A kernel that adds a residual would
            keep it from recomputing a norm alone, from the sum that it keeps.
    """
    if not kernels_run_on(device.kind):
        return gm
    from autopar.kernels.table import ROWS

    prices: dict[Any, bool] = {}
    counts: Counter[str] = Counter()
    gone: set[fx.Node] = set()
    for node in reversed(list(gm.graph.nodes)):
        if node.op != "call_function" or node in gone:
            continue
        for row in ROWS:
            if scheduled and row.added:
                continue
            match = _match(row, node)
            if match is not None and _is_better(row, match, device, prices):
                gone |= _write(row, match)
                counts[row.name] += 1
                break
    if counts:
        log.info("kernels: %s", ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))
    return gm


def _match(row: KernelRow, node: fx.Node) -> Matched | None:
    from autopar.kernels.patterns import Matched, matched

    for pattern in row.patterns:
        if isinstance(pattern, torch._ops.OpOverload):
            if node.target is pattern:
                of_call = _widened(row, Matched((node,), bound_arguments(node)))
                return _added(row, of_call) if row.added else of_call
        elif node.target in pattern.fns and (match := matched(pattern, node)) is not None:
            return _added(row, match) if row.added else match
    return None


def _added(row: KernelRow, match: Matched) -> Matched | None:
    """The same, from before the addition of a residual; None if there is none that the kernel can
    do in its place."""
    from autopar.kernels.patterns import Matched

    node: Any = match.bound[row.added]
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs:
        return None
    if not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    values = [_value(arg) for arg in (*node.args, node)]
    if not all(isinstance(value, Tensor) for value in values):
        return None
    if len({(value.shape, value.dtype) for value in values}) > 1:
        return None
    bound = {**match.bound, row.added: node.args[0], "residual": node.args[1]}
    whole = Matched((node, *match.nodes), bound, added=node)
    before = _place(whole)
    given = [n for n in bound.values() if isinstance(n, fx.Node)]
    return whole if all(n < before for n in given) else None


def _place(match: Matched) -> fx.Node:
    """The node before which the kernel runs: the first that reads a result, or is replaced by one
    and not the addition."""
    added = match.added
    if added is None:
        return match.nodes[-1]
    inside = set(match.nodes)
    return min([match.nodes[-1], *(user for user in added.users if user not in inside)])


def _widened(row: KernelRow, match: Matched) -> Matched:
    """The same, from before a cast that the kernel does itself, and the views of it."""
    from autopar.kernels.patterns import Matched

    cast: Any = match.bound.get(row.widened)
    views: list[fx.Node] = []
    while isinstance(cast, fx.Node) and is_view(cast) and len(cast.users) == 1:
        views.insert(0, cast)
        cast = cast.args[0]
    if (
        not isinstance(cast, fx.Node)
        or cast.target is not aten._to_copy.default
        or dict(cast.kwargs) != {"dtype": torch.float32}
        or len(cast.users) != 1
        or any(v.kwargs or v.all_input_nodes != [v.args[0]] for v in views)
    ):
        return match
    (source,) = cast.args
    if _value(source).dtype not in (torch.bfloat16, torch.float16):
        return match
    bound = {**match.bound, row.widened: source}
    return Matched((cast, *views, *match.nodes), bound, tuple(views))


def _value(bound: Any) -> Any:
    return bound.meta.get("val") if isinstance(bound, fx.Node) else bound


def _results(
    row: KernelRow, match: Matched, call: Callable[..., Any], bound: Any
) -> tuple[Any, ...]:
    """The kernel's results, as those of the match."""
    results = row.write(call, **_viewed(row, match, call, bound))
    return results if match.added is not None else (results,)


def _viewed(row: KernelRow, match: Matched, call: Callable[..., Any], bound: Any) -> Any:
    """What is bound, with the views of the widened operand."""
    for view in match.views:
        operand = call(view.target, bound[row.widened], *view.args[1:])
        bound = {**bound, row.widened: operand}
    return bound


def _is_better(row: KernelRow, match: Matched, device: Device, prices: dict[Any, bool]) -> bool:
    """Whether the kernel does the same in less time. Cached by the operands' layouts."""
    values = {name: _value(x) for name, x in match.bound.items()}
    result = _value(match.nodes[-1])
    operands = [values[k] for k, x in match.bound.items() if isinstance(x, fx.Node)]
    if not all(
        isinstance(x, FakeTensor) and x.device.type == device.kind for x in (result, *operands)
    ):
        return False
    key = (
        row.name,
        _key(result),
        tuple(sorted((name, _key(x)) for name, x in values.items())),
        tuple(n.target for n in _only_here(match)),
        _used(match),
    )
    if key not in prices:
        with result.fake_mode:
            viewed = _viewed(row, match, lambda op, *args: op(*args), values)
        prices[key] = row.applies(out=result, **viewed) and _is_faster(row, match, values, device)
    return prices[key]


def _key(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_layout(value)} {value.requires_grad}"
    return repr(value)


def _layout(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.stride(), value.dtype, value.device


def _is_faster(row: KernelRow, match: Matched, values: Mapping[str, Any], device: Device) -> bool:
    """Time both sides, forward and backward, by the bytes and the launches of their operators. The
    kernel's results must lie as the operators' do."""
    used = _used(match)
    names = [name for name, x in match.bound.items() if isinstance(x, fx.Node)]

    def kernel(*operands: Tensor) -> Any:
        given = {**values, **dict(zip(names, operands, strict=True))}
        results = _results(row, match, lambda op, *args: op(*args), given)
        return [result for result, use in zip(results, used, strict=True) if use]

    replaced = _only_here(match)
    inside = set(replaced)
    read = dict.fromkeys(operand for node in replaced for operand in node.all_input_nodes)
    outer = [n for n in read if n not in inside]

    def operators(*operands: Tensor) -> Any:
        known = dict(zip(outer, operands, strict=True))
        for node in replaced:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [known[node] for node, use in zip(match.results, used, strict=True) if use]

    ours_us, results = _step_us(kernel, [values[name] for name in names], device)
    atens_us, expected = _step_us(operators, [_value(n) for n in outer], device)
    if list(map(_layout, results)) != list(map(_layout, expected)):
        return False
    atens_us += float(Kernel(row.hidden(**values), "float32").us(device))
    log.debug("%s: %.1f us by ATen, %.1f us by the kernel", row.name, atens_us, ours_us)
    return ours_us < atens_us


def _used(match: Matched) -> tuple[bool, ...]:
    """Which results of the match are read by others."""
    inside = set(match.nodes)
    return True, *(any(user not in inside for user in node.users) for node in match.results[1:])


def _only_here(match: Matched) -> list[fx.Node]:
    """The nodes that nothing else needs once the kernel gives the results, in order."""
    nodes, gone = match.nodes, set(match.results)
    for node in reversed(nodes[:-1]):
        if all(user in gone for user in node.users):
            gone.add(node)
    return [n for n in nodes if n in gone]


class _Costs(KernelLog):
    """Adds up the time of kernels on a device.

    Attributes:
        us: microseconds.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.us = device, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = len(self.kernels)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        on_host = func.namespace == "autopar" and self.device.kind == "cuda"
        for _, kernel in self.kernels[known:]:
            self.us += max(float(kernel.us(self.device)), HOST_US if on_host else 0.0)
        return out


def _step_us(
    function: Callable[..., Any], values: Sequence[Tensor], device: Device
) -> tuple[float, list[Tensor]]:
    """Microseconds of a forward and a backward on tensors like these; and the results."""
    mode = next(x.fake_mode for x in values if isinstance(x, FakeTensor))
    with mode, torch.enable_grad():
        copies = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            .requires_grad_(x.requires_grad)
            for x in values
        ]  # fmt: skip
        with _Costs(device) as forward:
            results = function(*copies)
        us = forward.us
        leaves = [x for x in copies if x.requires_grad]
        ends = [result for result in results if result.requires_grad]
        if leaves and ends:
            seeds = [torch.empty_like(end) for end in ends]
            with _Costs(device) as backward:
                torch.autograd.grad(ends, leaves, seeds, allow_unused=True)
            us += backward.us
    return us, results


def _write(row: KernelRow, match: Matched) -> set[fx.Node]:
    """Write the kernel's operator, and let all read its results.

    Returns:
        the nodes that are gone.
    """
    last = match.nodes[-1]
    meta = {k: v for k, v in last.meta.items() if k not in ("val", "local_shape", "spec")}

    def call(op: Any, *args: Any) -> fx.Node:
        node = last.graph.call_function(op, args)
        node.meta = dict(meta)
        return node

    replaced = _only_here(match)
    with last.graph.inserting_before(_place(match)):
        results = _results(row, match, call, match.bound)
    for node, result in zip(match.results, results, strict=True):
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
    for node in reversed(replaced):
        last.graph.erase_node(node)
    for result in results:
        if not result.users:  # a sum that the norm alone reads
            last.graph.erase_node(result)
    return set(replaced)
