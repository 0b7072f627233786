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
`questions.py` has the operators that ask, `hidden_writes.py` takes writes that autograd does not
see, `hooks.py` hooks on gradients, and `proxies.py` reaches the graph being built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from autopar.errors import CaptureError
from autopar.ir.guards import Guard, Slice, as_python, on_own_thread, same_value
from autopar.tracer.gradient_hooks import ValueHooks
from autopar.tracer.hidden_writes import HiddenWrites
from autopar.tracer.numbers import TracedNumbers, has_numbers, substituted
from autopar.tracer.proxies import current_tracer, slot_of
from autopar.tracer.questions import HANDLERS, UNCHECKED
from autopar.tracer.ranges import only_value
from autopar.tracer.source import asking_frame, current_line, harmless_side

# An outcome of a draw with at most this probability is a rare event (layer drop).
_RARE = 0.3
_TRIALS = 400

Role = tuple[str, Any]


class BranchResolver(TorchFunctionMode):
    """Answers questions about values; see the module's text.

    Args:
        examples: values on the example batch by role, ("input", position) or ("buffer", name);
            None where there are none.
        assume: answers by `file.py:line` or by a piece of the line's text.
        originals: the user's modules and containers, by the ids of those that are traced.
        numbers: that vary.

    Attributes:
        guards: assumptions, in order.
        draws: captured values that were decided by a random draw.
        writes: those that autograd does not see.
        hooks: of values.
        numbers: Python numbers that vary.
    """

    def __init__(
        self,
        examples: Mapping[Role, torch.Tensor | None],
        assume: Mapping[str, Any],
        originals: Mapping[int, Any],
        numbers: TracedNumbers,
    ) -> None:
        super().__init__()
        self.numbers = numbers
        self._examples = examples
        self._assume = assume
        self.hooks = ValueHooks(originals)
        self._roles: dict[fx.Node, Role] = {}
        self._known: dict[fx.Node, Any] = {}
        self.guards: list[Guard] = []
        self.draws: list[torch.Tensor] = []
        self._depth = 0
        self.writes = HiddenWrites()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.numbers.present and has_numbers(args, kwargs):
            func, args, kwargs = substituted(func, args, kwargs)
        if self.writes.hides(func, args, kwargs):
            return self.writes.write(func, args, kwargs)
        handler = HANDLERS.get(getattr(func, "__name__", ""))
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
        self.numbers.settle(part.constants(tracer.root))
        if part.random and scalar:
            self.draws.append(t)
        if scalar and (value := only_value(node)) is not None:
            return _cast(value, t.dtype)
        if part.random and not part.sources:
            rare = self._rare(part, tracer) if t.dtype == torch.bool and scalar else None
            if rare is not None:
                value, share = rare
                return self.record(
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
                return self.record(
                    "input", value, "checked on every batch; one that differs is captured anew",
                    tuple(part.sources.values()), program,
                )  # fmt: skip
        if scalar and t.dtype == torch.bool:
            side = harmless_side(asking_frame())
            if side is not None:
                return self.record("check", side, UNCHECKED)
            value = only_value(node, finite=True)
            if value is not None:
                return self.record("check", bool(value), "activations are taken to be finite")
        for key, value in self._assume.items():
            if str(line).endswith(key) or key in line.text:
                return self.record("assumed", value, f"by assume[{key!r}]")
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

    def record(
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


def _cast(value: float, dtype: torch.dtype) -> Any:
    return bool(value) if dtype == torch.bool else value if dtype.is_floating_point else int(value)
