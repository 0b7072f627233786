"""Answers Python's questions about tensor values while a module is being captured.

`if tensor:`, `int(tensor)`, `tensor.tolist()` and `x[mask]` need a value, which a captured tensor
does not have. `BranchResolver` answers in this order:

1. by value ranges, if only one answer is possible (a uniform draw is never below 0), and by the
   likelier side, if a random draw decides (layer drop);
2. by the example batch, if inputs and buffers alone decide;
3. that a check on activations passes, if it only raises or only replaces infinities;
4. by `assume`, keyed by `file.py:line` or by a piece of the line's text.

Otherwise it raises `CaptureError`. Every answer except those by value ranges becomes a `Guard`.

It is a torch-function mode that is on while the forward runs under `make_fx(pre_dispatch=True)`.
`torch.fx.experimental.symbolic_shapes.free_unbacked_symbols` is private (torch 2.11 and 2.13).
`proxies.py` reaches the graph being built, `hidden_writes.py` takes writes that autograd does not
see.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.ir.graph import mark_leaf
from autopar.ir.guards import Guard, Slice, as_python, on_own_thread, same_value
from autopar.tracer.hidden_writes import HiddenWrites
from autopar.tracer.hooks import GradientNode, ValueHooks
from autopar.tracer.proxies import current_tracer, slot_of
from autopar.tracer.ranges import only_value
from autopar.tracer.source import asking_frame, current_line, harmless_side, user_frame
from autopar.tracer.statistics import instance_norm

# An outcome of a draw with at most this probability is a rare event (layer drop).
_RARE = 0.3
_TRIALS = 400
_UNCHECKED = "a check that only raises; not made"

Role = tuple[str, Any]
_DATA: Any = vars(torch._C.TensorBase)["data"].__get__
_SET_DATA: Any = vars(torch._C.TensorBase)["data"].__set__
_GRAD_FN: Any = vars(torch._C.TensorBase)["grad_fn"].__get__
_REQUIRES_GRAD: Any = vars(torch._C.TensorBase)["requires_grad"].__set__


class BranchResolver(TorchFunctionMode):
    """Answers questions about values; see the module's text.

    Args:
        examples: values on the example batch by role, ("input", position) or ("buffer", name);
            None where there are none.
        assume: answers by `file.py:line` or by a piece of the line's text.
        modules: the user's modules, by the ids of those that are traced.

    Attributes:
        guards: assumptions, in order.
        draws: captured values that were decided by a random draw.
    """

    def __init__(
        self,
        examples: Mapping[Role, torch.Tensor | None],
        assume: Mapping[str, Any],
        modules: Mapping[int, torch.nn.Module],
    ) -> None:
        super().__init__()
        self._examples = examples
        self._assume = assume
        self._hooks = ValueHooks(modules)
        self._roles: dict[fx.Node, Role] = {}
        self._known: dict[fx.Node, Any] = {}
        self.guards: list[Guard] = []
        self.draws: list[torch.Tensor] = []
        self._depth = 0
        self._writes = HiddenWrites()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._writes.hides(func, args, kwargs):
            return self._writes.write(func, args, kwargs)
        handler = _HANDLERS.get(getattr(func, "__name__", ""))
        if handler is None or not args:
            return func(*args, **kwargs)
        return handler(self, func, args, kwargs)

    def begin(self, tensors: Mapping[Role, Any]) -> None:
        """Register parameters, buffers and inputs, before the forward runs."""
        tracer = current_tracer()
        for role, t in tensors.items():
            slot = slot_of(t, tracer)
            if slot is not None:
                self._roles[slot.proxy.node] = role

    def __enter__(self) -> BranchResolver:
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        super().__exit__(*error)

    @property
    def active(self) -> bool:
        """Whether the forward is running."""
        return self._depth > 0

    # -- values ---------------------------------------------------------------------------------

    def value(self, t: torch.Tensor) -> Any:
        """The value of a tensor: a number if it has no dims, else a tensor.

        Raises:
            CaptureError: nothing decides it.
        """
        tracer = current_tracer()
        slot = slot_of(t, tracer)
        constant = (
            t if not isinstance(t, FakeTensor) else t.constant if slot is None else slot.constant
        )
        if constant is not None:
            return on_own_thread(lambda: as_python(constant.detach().clone()))
        if slot is None:
            raise CaptureError(
                f"{current_line()}: `{current_line().text}` asks for the value of a tensor that "
                "is not part of the capture; an earlier call of the model stored it"
            )
        node = slot.proxy.node
        if node not in self._known:
            self._known[node] = self._resolve(node, t, tracer)
        return self._known[node]

    def is_random(self, t: torch.Tensor) -> bool:
        """Whether only random draws decide a tensor's value."""
        slot = slot_of(t, current_tracer())
        if slot is None or slot.constant is not None:
            return False
        part = Slice(slot.proxy.node, self._roles)
        return part.random and not part.sources

    def _resolve(self, node: fx.Node, t: torch.Tensor, tracer: Any) -> Any:
        scalar = t.ndim == 0
        line = current_line()
        part = Slice(node, self._roles)
        if part.random and scalar:
            self.draws.append(t)
        if scalar and (value := only_value(node)) is not None:
            return _cast(value, t.dtype)
        if part.random and not part.sources:
            rare = self._rare(part, tracer) if t.dtype == torch.bool and scalar else None
            if rare is not None:
                value, share = rare
                return self._record(
                    "random", value, f"drawn anew at each step otherwise, {not value} in about "
                    f"{share:.0%} of them; the captured model never takes that side",
                )  # fmt: skip
        elif not part.random and part.kinds <= {"input", "buffer"}:
            examples = [self._examples.get(role) for role in part.sources.values()]
            values = [v for v in examples if v is not None]
            if len(values) == len(examples):
                program = part.program(tracer.root)
                value = on_own_thread(lambda: as_python(program(*(v.clone() for v in values))))
                if not part.sources:  # made of shapes and constants alone
                    return value
                return self._record(
                    "input", value, "checked on every batch; one that differs is captured anew",
                    tuple(part.sources.values()), program,
                )  # fmt: skip
        if scalar and t.dtype == torch.bool:
            side = harmless_side(asking_frame())
            if side is not None:
                return self._record("check", side, _UNCHECKED)
            value = only_value(node, finite=True)
            if value is not None:
                return self._record("check", bool(value), "activations are taken to be finite")
        for key, value in self._assume.items():
            if str(line).endswith(key) or key in line.text:
                return self._record("assumed", value, f"by assume[{key!r}]")
        raise CaptureError(self._unresolved(part))

    def _rare(self, part: Slice, tracer: Any) -> tuple[bool, float] | None:
        """The usual outcome of a draw and the share of the other one, if that is rare."""

        def count() -> int:
            program = part.program(tracer.root)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return sum(bool(program()) for _ in range(_TRIALS))

        share = on_own_thread(count) / _TRIALS
        usual = share > 0.5
        rare = 1 - share if usual else share
        return (usual, rare) if rare <= _RARE else None

    def _record(
        self, kind: Any, value: Any, note: str, sources: Any = (), program: Any = None
    ) -> Any:
        line = current_line()
        guard = Guard(kind, str(line), line.text, value, note, sources, program)
        repeated = any(
            (g.kind, g.source, g.sources, g.code) == (kind, guard.source, sources, guard.code)
            and same_value(g.value, value)
            for g in self.guards
        )
        if not repeated:
            self.guards.append(guard)
        return value

    def _unresolved(self, part: Slice) -> str:
        line = current_line()
        kinds = part.kinds
        if part.random:
            why = "it depends on a random draw that goes either way"
        elif "parameter" in kinds:
            why = "it depends on activations"
        elif "unknown" in kinds:
            why = "it depends on values that are not inputs"
        else:
            why = (
                "it depends on the batch alone, but the example batch or a buffer has no values "
                "(meta or fake tensors); trace with a real batch"
            )
        name = line.file.rsplit("/", 1)[-1]
        return (
            f"Python asks for the value of a tensor at {line}: `{line.text}`; {why}.\n"
            "  A graph has one side of a branch only. Compute the decision from shapes or "
            f'arguments, or state it: ColoTracer(assume={{"{name}:{line.line}": ...}}).\n'
            "  (A loop over the experts of a mixture captures with the library's grouped or "
            "batched implementation.)"
        )  # fmt: skip

    # -- the operators that ask -----------------------------------------------------------------

    def _number(self, func: Any, args: Any, kwargs: Any) -> Any:
        t = args[0]
        if func.__name__ == "item" and self.is_random(t):
            return t  # so that a comparison with it is known to be random
        if t.numel() != 1:
            return func(*args, **kwargs)
        floating = isinstance(t, FakeTensor) and t.dtype.is_floating_point
        try:
            value = self.value(t.reshape(()) if t.ndim else t)
        except CaptureError:
            if floating and func.__name__ == "item":
                return t.detach().reshape(()).clone()  # arithmetic on it needs no number
            raise
        cast = _CASTS.get(func.__name__)
        return value if cast is None else cast(value)

    def _list(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = self.value(args[0])
        return on_own_thread(value.tolist) if isinstance(value, torch.Tensor) else value

    def _nonzero(self, func: Any, args: Any, kwargs: Any) -> Any:
        mask, rest = args[0], (*args[1:], *kwargs.values())
        if func.__name__ == "where" and (rest or len(args) > 1):
            return func(*args, **kwargs)
        as_tuple = func.__name__ == "where" or True in rest
        try:
            indices = self._indices(mask)
        except CaptureError as error:
            if as_tuple:  # writing at these places needs no count
                return _Places(mask != 0, error)
            raise
        return indices.unbind(1) if as_tuple else indices

    def _indices(self, mask: torch.Tensor) -> torch.Tensor:
        """`mask.nonzero()`, with a number of rows that the example batch decides."""
        count = int(self.value((mask != 0).sum()))
        return torch.ops.aten.nonzero_static(mask, size=count)

    def _select(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Indexing: masks by their indices, tensors as slice ends by their values."""

        def number(end: Any) -> Any:
            return int(self.value(end)) if isinstance(end, torch.Tensor) else end

        source, index = args
        items = list(index) if isinstance(index, tuple) else [index]
        plain: list[Any] = []
        for item in items:
            if isinstance(item, slice):
                plain.append(slice(*map(number, (item.start, item.stop, item.step))))
            elif _is_mask(item):
                plain += self._indices(item).unbind(1)
            else:
                plain.append(item)
        if not any(map(_is_mask, items)) and not any(isinstance(i, slice) for i in items):
            return func(*args, **kwargs)
        return func(
            source, tuple(plain) if isinstance(index, tuple) or len(plain) > 1 else plain[0]
        )

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x[torch.where(mask)] = value` is `x[mask] = value`."""
        target, index, value = args
        return func(target, index.mask if isinstance(index, _Places) else index, value)

    def _masked_select(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, mask = args
        shape = torch.broadcast_shapes(source.shape, mask.shape)
        return source.expand(shape)[tuple(self._indices(mask.expand(shape)).unbind(1))]

    def _property(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x.detach()` for `x.data`, which would leave the capture."""
        if func == _DATA:
            return self._detach(torch.Tensor.detach, args, {})
        value = func(*args, **kwargs)
        asked = func == _GRAD_FN and value is not None and asking_frame() is user_frame()
        return GradientNode(value) if asked else value

    def _hook(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x.register_hook(hook)`."""
        t, hook = args[0], args[1] if len(args) > 1 else kwargs["hook"]
        if slot_of(t, current_tracer()) is None:
            return func(*args, **kwargs)
        return self._hooks.register(t, hook)

    def _detach(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._writes.detached(args[0], func(*args, **kwargs))

    def _set(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x.data = value` is a write into x."""
        if func != _SET_DATA or slot_of(args[0], current_tracer()) is None:
            return self._leaf(func, args, kwargs)
        with self, torch.no_grad():
            args[0].copy_(args[1])
        return None

    def _leaf(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Mark the leaf of `x.requires_grad = True`: eager PyTorch computes its gradient."""
        t, rest = args[0], [*args[1:], *kwargs.values()]
        slot = slot_of(t, current_tracer())
        setter = func == _REQUIRES_GRAD or func.__name__ == "requires_grad_"
        if setter and rest in ([], [True]) and slot is not None and not t.requires_grad:
            mark_leaf(slot.proxy.node)
        return func(*args, **kwargs)

    def _within(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of torch that is written in Python and asks for values itself."""
        with self:
            return _body(func)(*args, **kwargs)

    def _instance_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        plain = func is torch.nn.functional.instance_norm
        return (instance_norm if plain else func)(*args, **kwargs)

    def _assert(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`torch._assert(condition, message)`."""
        condition, message = args[0], args[1] if len(args) > 1 else kwargs.get("message", "")
        if isinstance(condition, FakeTensor):
            try:
                condition = bool(self.value(condition))
            except CaptureError:
                condition = self._record("check", True, _UNCHECKED)
        assert condition, message

    def _equal(self, func: Any, args: Any, kwargs: Any) -> Any:
        a, b = args
        return a.shape == b.shape and bool(self.value((a == b).all()))

    def _contains(self, func: Any, args: Any, kwargs: Any) -> Any:
        return bool(self.value((args[0] == args[1]).any()))

    def _sizes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Operators that take numbers: tensors of no dims by their values."""

        unknown: list[CaptureError] = []

        def number(value: Any) -> Any:
            if not isinstance(value, FakeTensor) or value.ndim:
                return value
            try:
                return self.value(value)
            except CaptureError as error:
                unknown.append(error)
                return value  # the operator may take it as it is

        # not the object of a method, nor what torch.tensor copies
        keep = int(isinstance(args[0], torch.Tensor) and func.__name__ not in _RANGES)
        rest, kwargs = pytree.tree_map(number, (tuple(args[keep:]), kwargs))
        result = func(*args[:keep], *rest, **kwargs)
        if unknown and free_unbacked_symbols(pytree.tree_leaves(result)):
            raise unknown[0]  # the value is a size
        return result

    def _example_result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Operators whose result has a data-dependent shape: the result on the example batch."""
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
        known_size = isinstance(repeats, int) or kwargs.get("output_size") is not None
        if not tensors or (func.__name__ == "repeat_interleave" and known_size):
            return func(*args, **kwargs)
        values = iter([self.value(t) for t in tensors])

        def real(x: Any) -> Any:
            return torch.as_tensor(next(values)) if isinstance(x, FakeTensor) else x

        results = on_own_thread(
            lambda: func(*pytree.tree_map(real, args), **pytree.tree_map(real, kwargs))
        )
        # as constants of the graph
        return pytree.tree_map_only(
            torch.Tensor,
            lambda t: torch.tensor(t.tolist(), dtype=t.dtype, device=t.device),
            results,
        )


class _Places(tuple[Any, ...]):
    """Indices of a mask on activations, whose number is unknown: asking for it raises the error."""

    mask: torch.Tensor
    error: CaptureError

    def __new__(cls, mask: torch.Tensor, error: CaptureError) -> _Places:
        places = super().__new__(cls)
        places.mask, places.error = mask, error
        return places

    def __iter__(self) -> Any:
        raise self.error

    def __getitem__(self, key: Any) -> Any:
        raise self.error

    def __len__(self) -> int:
        return self.mask.ndim


@functools.cache
def _body(func: Any) -> Any:
    """A function of torch without its question whether a torch-function mode is on."""
    asked = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = func.__globals__ | dict.fromkeys(asked, lambda *_: False)
    body = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _is_mask(item: Any) -> bool:
    return isinstance(item, FakeTensor) and item.dtype in (torch.bool, torch.uint8)


def _cast(value: float, dtype: torch.dtype) -> Any:
    return bool(value) if dtype == torch.bool else value if dtype.is_floating_point else int(value)


_CASTS: dict[str, Callable[[Any], Any]] = {
    "__bool__": bool, "is_nonzero": bool, "__float__": float, "__int__": int, "__index__": int,
}  # fmt: skip
_RANGES = ("arange", "linspace", "zeros", "ones", "full", "empty")
_R = BranchResolver
_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("__bool__", "is_nonzero", "__int__", "__index__", "__float__", "item"), _R._number
    ),
    "tolist": _R._list,
    **dict.fromkeys(("nonzero", "argwhere", "where"), _R._nonzero),
    "__getitem__": _R._select,
    "__setitem__": _R._write,
    "masked_select": _R._masked_select,
    "equal": _R._equal,
    "gaussian_nll_loss": _R._within,
    "_assert": _R._assert,
    "instance_norm": _R._instance_norm,
    "__contains__": _R._contains,
    "__get__": _R._property,
    "detach": _R._detach,
    "register_hook": _R._hook,
    "__set__": _R._set,
    "requires_grad_": _R._leaf,
    **dict.fromkeys(
        (*_RANGES, "tensor", "narrow", "split", "view", "reshape", "expand", "repeat", "pad",
         "new_zeros", "new_ones", "new_full", "new_empty", "interpolate"),
        _R._sizes,
    ),
    **dict.fromkeys(
        ("unique", "unique_consecutive", "bincount", "repeat_interleave"), _R._example_result
    ),
}  # fmt: skip
