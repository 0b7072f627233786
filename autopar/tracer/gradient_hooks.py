"""Hooks on gradients inside of a model: of values (`h.register_hook`) and of modules.

Capture runs on fake tensors, and the gradients that its hooks would see never come. So a hooked
value goes through an operator that copies it, and whose derivative is another operator, which calls
the hooks with the whole gradient at each step. Hooks of modules (`register_full_backward_hook`,
`register_full_backward_pre_hook`) are such operators around the module's inputs and results.

The hooks are those of the user's module, not of the traced copy. A captured tensor that a hook
refers to is an operand.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from autopar.errors import CaptureError
from autopar.tracer.functions import capturing, operator_for
from autopar.tracer.modes import replaced
from autopar.tracer.numbers import TracedNumber
from autopar.tracer.proxies import current_tracer, slot_of, stand_for
from autopar.tracer.source import current_line

# Gradients in, gradients out; None where there is none.
Gradients = Sequence[torch.Tensor | None]
OnGradients = Callable[[Gradients, Sequence[torch.Tensor]], Gradients]


def watched(
    name: str, tensors: Sequence[torch.Tensor], on_gradients: OnGradients,
    operands: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Copies of tensors, of whose gradients a function is told, and which it may change.

    Args:
        name: of the operator.
        operands: other tensors, which the function takes.
    """
    count = len(tensors)
    called: dict[tuple[bool, ...], Any] = {}

    def call(grads: Gradients, others: Sequence[torch.Tensor]) -> Gradients:
        given = tuple(g is not None for g in grads)
        if given not in called:
            called[given] = _gradient_operator(name, given, len(others), on_gradients)
        present = [g for g in grads if g is not None]
        changed = iter(called[given](*present, *others))
        return [next(changed) if g is not None else None for g in grads]

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_Watched.apply(call, count, *values))

    def fake(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(v) for v in values[:count])

    op = operator_for(_named(name), [object()], count + len(operands), count, run, fake)
    return tuple(op(*tensors, *operands))


def _gradient_operator(
    name: str, given: Sequence[bool], operands: int, on_gradients: OnGradients
) -> Any:
    """The operator that calls a function on the gradients that there are."""
    count = sum(given)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # copies, because a hook may keep what it sees, and the program writes over its values
        queue = iter(values[:count])
        grads = [next(queue).clone() if present else None for present in given]
        changed = on_gradients(grads, values[count:])
        results = []
        for before, after in zip(grads, changed, strict=True):
            if before is None:
                continue
            if after is not None and after.shape != before.shape:
                raise ValueError(
                    f"a hook ({name}) returned a gradient of shape {tuple(after.shape)} for one "
                    f"of shape {tuple(before.shape)}"
                )
            result = torch.zeros_like(before) if after is None else after.to(before).clone()
            results.append(result)
        return tuple(results)

    def fake(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(v) for v in values[:count])

    function = _named(f"{name}_gradient")
    return operator_for(function, [object()], count + operands, count, run, fake, opaque=True)


def _named(name: str) -> Any:
    return types.SimpleNamespace(__qualname__=name, __module__=__name__)


class _Watched(torch.autograd.Function):
    """Copies `count` tensors; their gradients go through `call`, with the other operands."""

    @staticmethod
    def forward(ctx: Any, call: Any, count: int, *values: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.others = call, len(values) - count
        ctx.save_for_backward(*values[count:])
        return tuple(v.clone() for v in values[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if all(g is None for g in grads):
            return (None, None, *grads, *[None] * ctx.others)
        return (None, None, *ctx.call(grads, ctx.saved_tensors), *[None] * ctx.others)


# -- hooks of values ----------------------------------------------------------------------


class ValueHooks:
    """Registers the hooks of captured values.

    Args:
        originals: the user's modules and containers, by the ids of those that are traced.
    """

    def __init__(self, originals: Mapping[int, Any]) -> None:
        self.count = 0  # of hooks that the trace registers, refused ones included
        self._originals = originals
        self._hooks: dict[fx.Node, OrderedDict[int, Any]] = {}

    def register(self, t: torch.Tensor, hook: Callable[..., Any]) -> RemovableHandle:
        """`t.register_hook(hook)` for a captured tensor.

        Raises:
            CaptureError: the hook cannot be called at each step.
        """
        self.count += 1
        if not t.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        if isinstance(t, torch.nn.Parameter):
            raise _refusal(
                "registers a hook on a parameter at each forward; register it once, outside"
            )
        operands: list[torch.Tensor] = []
        made = _rebuilt(hook, self._originals, operands)
        node = slot_of(t, current_tracer()).proxy.node
        hooks = self._hooks.get(node)
        if hooks is None:
            hooks = OrderedDict()
            self._hooks[_hooked(t, node, hooks, operands)] = hooks
        elif operands:
            raise _refusal(
                "registers another hook on a value, which refers to captured tensors; let the "
                "first hook do what both do"
            )
        handle = RemovableHandle(hooks)
        hooks[handle.id] = made
        return handle


def _hooked(
    t: torch.Tensor, node: fx.Node, hooks: Mapping[int, Any], operands: Sequence[torch.Tensor]
) -> fx.Node:
    """Put a copy whose gradient goes through hooks, in their order, in a value's place."""

    def on_gradients(grads: Gradients, values: Sequence[torch.Tensor]) -> Gradients:
        (grad,) = grads
        for made in list(hooks.values()):
            changed = made(values)(grad)
            grad = grad if changed is None else changed
        return [grad]

    (copy,) = watched("hook", [t], on_gradients, operands)
    copied = slot_of(copy, current_tracer()).proxy.node
    _take_over(node, copied)
    stand_for(t, copy)
    return copied


def _take_over(node: fx.Node, copy: fx.Node) -> None:
    """Move the copy behind the node; it serves all users, those before the hook as well."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    copied = copy
    while copied.op != "call_function" or copied.all_input_nodes[:1] != [node]:
        copied = copied.all_input_nodes[0]  # from the result to the operator's call
    moved = [n for n in node.graph.nodes if n in (copied, copy)]
    operands = [n for n in copied.all_input_nodes if n.op != "placeholder"]
    if operands:
        last = max(operands, key=order.__getitem__)
    else:
        last = node.graph.find_nodes(op="placeholder")[-1]
    users = [u for u in node.users if u is not copied]
    early = [u for u in users if order[u] < order[last] or u is last]
    if any(u.target is not torch.ops.aten.detach.default for u in early):
        raise _refusal(
            "registers a hook that refers to a tensor computed after the value was used; register "
            "it right after the value, or write a torch.autograd.Function"
        )
    for n in moved:
        last.append(n)
        last = n
    for user in users:
        if user not in early:
            user.replace_input_with(node, copy)


def _rebuilt(
    value: Any, originals: Mapping[int, Any], operands: list[torch.Tensor]
) -> Callable[[Sequence[torch.Tensor]], Any]:
    """From the values of the operands to a hook, or a part of one, as it is called at a step.

    Modules and containers become the user's; captured tensors are added to the operands.
    """
    if isinstance(value, FakeTensor):
        operands.append(value)
        index = len(operands) - 1
        return lambda values: values[index]
    if id(value) in originals and not _holds_captured(value):
        return lambda _: originals[id(value)]
    if type(value) is TracedNumber:
        number = value.settled()
        return lambda _: number
    rebuild = functools.partial(_rebuilt, originals=originals, operands=operands)
    if isinstance(value, types.MethodType):
        function, owner = rebuild(value.__func__), rebuild(value.__self__)
        return lambda values: types.MethodType(function(values), owner(values))
    if isinstance(value, functools.partial):
        function = rebuild(value.func)
        args, kwargs = map(rebuild, value.args), {k: rebuild(v) for k, v in value.keywords.items()}
        given = list(args)
        return lambda values: functools.partial(
            function(values),
            *(a(values) for a in given),
            **{k: v(values) for k, v in kwargs.items()},
        )
    if isinstance(value, types.FunctionType) and _refers(value, originals):
        cells = [rebuild(cell.cell_contents) for cell in value.__closure__ or ()]
        defaults = [rebuild(d) for d in value.__defaults__ or ()]
        return lambda values: types.FunctionType(
            value.__code__, value.__globals__, value.__name__,
            tuple(d(values) for d in defaults) or None,
            tuple(types.CellType(c(values)) for c in cells),
        )  # fmt: skip
    if _refers(value, originals):
        raise _refusal(
            f"registers a hook that refers to captured tensors or modules inside of a "
            f"{type(value).__name__}; let it refer to them directly, or write a "
            "torch.autograd.Function"
        )
    return lambda _: value


def _holds_captured(value: Any) -> bool:
    """Whether a container has taken captured tensors in, which the user's has not."""
    leaves = pytree.tree_leaves(value) if isinstance(value, list | dict | set) else ()
    return any(isinstance(x, FakeTensor) for x in leaves)


def _refers(value: Any, originals: Mapping[int, Any], depth: int = 4) -> bool:
    """Whether a value leads to captured tensors, what is traced, or the autograd graph."""
    if isinstance(value, FakeTensor | torch.autograd.graph.Node | torch.SymInt | torch.SymFloat):
        return True
    if id(value) in originals or type(value) is TracedNumber:
        return True
    inner: list[Any] = []
    if isinstance(value, types.FunctionType):
        inner = [*_contents(value), *(value.__defaults__ or ())]
    elif isinstance(value, types.MethodType):
        inner = [value.__func__, value.__self__]
    elif isinstance(value, list | tuple | dict | set):
        inner = list(value.values()) if isinstance(value, dict) else list(value)
    elif not isinstance(value, type | types.ModuleType | torch.nn.Module | torch.Tensor):
        inner = list(getattr(value, "__dict__", {}).values())
    return depth > 0 and any(_refers(x, originals, depth - 1) for x in inner)


def _contents(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _refusal(what: str) -> CaptureError:
    line = current_line()
    return CaptureError(f"{line}: `{line.text}` {what}")


class GradientNode:
    """`h.grad_fn` of a captured tensor, whose hooks would be lost."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        if name in ("register_hook", "register_prehook"):
            raise _refusal(
                "registers a hook on a node of the autograd graph; register it on the value "
                "(h.register_hook)"
            )
        return getattr(self._node, name)


# -- hooks of modules ------------------------------------------------------------------------------


def originals(model: torch.nn.Module, clone: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """A model's modules, by the ids of those of its copy."""
    users = dict(model.named_modules())
    return {id(m): users[name] for name, m in clone.named_modules()}


@contextmanager
def module_hooks(model: torch.nn.Module, clone: torch.nn.Module) -> Iterator[None]:
    """While on, the full backward hooks of a traced copy's modules are operators of the graph.

    Raises:
        CaptureError: a module has a hook by the deprecated `register_backward_hook`.
    """
    users = originals(model, clone)
    for name, module in model.named_modules():
        if module._backward_hooks and module._is_full_backward_hook is False:
            raise CaptureError(
                f"{name or type(module).__name__} has a hook by register_backward_hook, which sees "
                "the gradients of one operator inside of the module; register it by "
                "register_full_backward_hook"
            )

    def make(original: Any) -> Any:
        def hook(module: torch.nn.Module, *hooks: Any) -> Any:
            if not capturing() or id(module) not in users:
                return original(module, *hooks)
            return _ModuleHook(users[id(module)])

        return hook

    with replaced(torch_module, "BackwardHook", make):
        yield


class _ModuleHook:
    """torch's `BackwardHook` for one call of a module, by operators of the graph."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._grad_outputs: tuple[Any, ...] | None = None
        self._inputs: list[int] = []
        self._count = 0

    def setup_input_hook(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._inputs, self._count = _graded(args), len(args)
        return tuple(self._around(args, self._inputs, self._on_inputs))

    def setup_output_hook(self, result: Any) -> Any:
        results = result if isinstance(result, tuple) else (result,)
        at = _graded(results)
        self._outputs, self._results = at, len(results)
        changed = self._around(results, at, self._on_outputs)
        if not isinstance(result, tuple):
            return changed[0]
        return type(result)(*changed) if hasattr(result, "_fields") else tuple(changed)

    def _around(self, values: Sequence[Any], at: list[int], function: OnGradients) -> list[Any]:
        values = list(values)
        if at:
            name = type(self._module).__name__
            for i, t in zip(at, watched(name, [values[i] for i in at], function), strict=True):
                values[i] = t
        return values

    def _on_outputs(self, grads: Gradients, _: Any) -> Gradients:
        every = _spread(grads, self._outputs, self._results)
        for hook in self._module._get_backward_pre_hooks():
            changed = hook(self._module, every)
            if changed is not None:
                every = changed if isinstance(changed, tuple) else (changed,)
        if self._inputs:
            self._grad_outputs = every
        else:
            for hook in self._module._get_backward_hooks()[0]:
                hook(self._module, (None,) * self._count, every)
        return [every[i] for i in self._outputs]

    def _on_inputs(self, grads: Gradients, _: Any) -> Gradients:
        every = _spread(grads, self._inputs, self._count)
        if self._grad_outputs is None:  # no gradient came through the results
            return grads
        for hook in self._module._get_backward_hooks()[0]:
            changed = hook(self._module, every, self._grad_outputs)
            if changed is not None:
                every = changed if isinstance(changed, tuple) else (changed,)
        self._grad_outputs = None
        return [every[i] for i in self._inputs]


def _graded(values: Sequence[Any]) -> list[int]:
    """Positions of tensors with gradients."""
    if not torch.is_grad_enabled():
        return []
    return [i for i, t in enumerate(values) if isinstance(t, torch.Tensor) and t.requires_grad]


def _spread(grads: Gradients, at: Sequence[int], count: int) -> tuple[Any, ...]:
    every: list[Any] = [None] * count
    for i, grad in zip(at, grads, strict=True):
        every[i] = grad
    return tuple(every)
