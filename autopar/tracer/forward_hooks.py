"""Forward hooks and forward pre-hooks of a traced copy.

`copy.deepcopy` shares functions, so a hook of the copy would write fake tensors into the user's
dicts. `isolate` gives the copy hooks whose closures, defaults and globals hold copies. A hook that
returns a value, writes into a tensor, or assigns what the forward reads is part of the program. A
hook that does none of this observes: each run calls the user's hook with real tensors. A hook that
returns a value and keeps one does both.
"""

from __future__ import annotations

import copy
import dis
import logging
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.ir.effects import Held, HookCall
from autopar.ir.reads import global_hooks
from autopar.tracer.attributes import CONTAINERS, AttributeRecorder, contents, same_items
from autopar.tracer.gradient_hooks import ValueHooks
from autopar.tracer.numbers import TracedNumbers
from autopar.tracer.randomness import Restart

log = logging.getLogger(__name__)

KINDS = ("_forward_pre_hooks", "_forward_hooks")
_COPIED_GLOBALS = (list, dict, set)
# of transformers: where its hooks are made, and what says that a module has them
_COLLECTING = "transformers.utils.output_capturing"
_COLLECTS = "_output_capturing_hooks_installed"


def refuse_global_hooks() -> None:
    """Refuse hooks on all modules, which no program calls.

    Raises:
        CaptureError: naming the first.
    """
    for hook in global_hooks():
        raise CaptureError(
            f"the hook at {source_of(hook)} is on all modules (register_module_forward_hook or a "
            "sibling of it), and captured programs would not run it: register it on the modules "
            "that it is for"
        )


def isolate(model: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Put copies of the functions that are hooks of a model into the memo of `copy.deepcopy`.

    Raises:
        CaptureError: a hook holds something that cannot be copied.
    """
    for module in model.modules():
        for kind in KINDS:
            for hook in getattr(module, kind).values():
                try:
                    _isolated(hook, memo)
                except CaptureError:
                    raise
                except Exception as error:
                    raise CaptureError(
                        f"the forward hook at {source_of(hook)} holds something that cannot be "
                        f"copied for tracing: {error}. Let it hold containers, tensors and modules"
                    ) from error


def _isolated(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a function with what it holds; other values by `copy.deepcopy`."""
    if not isinstance(value, types.FunctionType):
        return copy.deepcopy(value, memo)
    if id(value) in memo:
        return memo[id(value)]
    if value.__module__.partition(".")[0] in ("torch", "autopar"):
        return value
    cells = tuple(types.CellType() for _ in value.__closure__ or ())
    used = {n: value.__globals__[n] for n in value.__code__.co_names if n in value.__globals__}
    held = {n: v for n, v in used.items() if isinstance(v, _COPIED_GLOBALS)}
    namespace = {**value.__globals__} if held else value.__globals__
    function = types.FunctionType(value.__code__, namespace, value.__name__, None, cells or None)
    memo[id(value)] = function
    memo.setdefault(id(memo), []).append(value)
    for name, container in held.items():
        namespace[name] = copy.deepcopy(container, memo)
    for cell, original in zip(cells, value.__closure__ or (), strict=True):
        try:
            content = original.cell_contents
        except ValueError:
            continue  # not assigned yet
        cell.cell_contents = _isolated(content, memo)
    function.__defaults__ = _all_isolated(value.__defaults__, memo)
    function.__kwdefaults__ = copy.deepcopy(value.__kwdefaults__, memo)
    function.__dict__.update(value.__dict__)
    return function


def _all_isolated(values: tuple[Any, ...] | None, memo: dict[int, Any]) -> Any:
    return None if values is None else tuple(_isolated(v, memo) for v in values)


@contextmanager
def copied_tensors() -> Iterator[list[torch.Tensor]]:
    """While on, `copy.deepcopy` copies tensors that have a gradient history, too; gives the list
    of these copies."""
    copies: list[torch.Tensor] = []
    plain: Any = torch.Tensor.__deepcopy__

    def deepcopy(t: torch.Tensor, memo: dict[int, Any]) -> Any:
        if t.is_leaf or id(t) in memo:
            return plain(t, memo)
        copies.append(memo.setdefault(id(t), t.detach().clone()))
        return copies[-1]

    with mock.patch.object(torch.Tensor, "__deepcopy__", deepcopy):
        yield copies


def root_hooks(clone: torch.nn.Module) -> Callable[..., Any]:
    """Take the hooks of the root off it, and give a function that calls forward with them.

    Results that the capture returns besides the user's must not reach the hooks.
    """
    namespace = vars(clone)
    own = {"forward": namespace["forward"]} if "forward" in namespace else {}
    taken = {kind: namespace[kind] for kind in KINDS}
    during = {**taken, "_backward_hooks": OrderedDict(), "_backward_pre_hooks": OrderedDict()}
    for kind in KINDS:
        namespace[kind] = OrderedDict()

    def call(*args: Any, **kwargs: Any) -> Any:
        outside = {name: namespace[name] for name in (*during, "forward") if name in namespace}
        namespace.pop("forward", None)
        namespace.update(during | own)
        before = dict(_hooks(clone))
        try:
            results = torch.nn.Module._call_impl(clone, *args, **kwargs)
            for key, hook in _hooks(clone):
                if key not in before:
                    hooked = [p for p, m in clone.named_modules() if vars(m).get(_COLLECTS)]
                    raise RegisteredHook(key[0], hook, hooked)
            return results
        finally:
            namespace.update(outside)

    return call


class RegisteredHook(Exception):
    """The forward has registered a hook on a module of the traced copy.

    Args:
        path: of the module.
        collecting: paths of modules that transformers has hooked to collect hidden states.
    """

    def __init__(self, path: str, hook: Any, collecting: Sequence[str]) -> None:
        super().__init__(path)
        self.path, self.hook, self.collecting = path, hook, collecting

    def check(self, known: Sequence[str]) -> None:
        """
        Args:
            known: modules that were hooked before the forward.

        Raises:
            CaptureError: it is no hook with which transformers collects hidden states.
        """
        collects = getattr(self.hook, "__module__", "") == _COLLECTING
        if not collects or set(known) >= set(self.collecting):
            raise CaptureError(
                f"the forward registers the hook at {source_of(self.hook)} on "
                f"{self.path or 'the model'}, and later calls of its program would not run it: "
                "register hooks before the model is called"
            )


def collect_outputs(clone: torch.nn.Module, paths: Iterable[str]) -> None:
    """Register the hooks of transformers on modules of a traced copy, as their first call that asks
    for hidden states would. `transformers.utils.output_capturing` is tested with 5.23."""
    for path in paths:
        import_module(_COLLECTING).maybe_install_capturing_hooks(clone.get_submodule(path))


def _hooks(model: torch.nn.Module) -> Iterator[tuple[tuple[str, str, int], Any]]:
    """The forward hooks of all modules, by path, kind and key."""
    for path, module in model.named_modules():
        for kind in KINDS:
            for key, hook in getattr(module, kind).items():
                yield (path, kind, key), hook


@dataclass(frozen=True)
class ObservedCall:
    """One call of a hook during the trace; see `HookCall`.

    Args:
        number: of the hook.
        arguments: fake.
        returns: it returned a value.
    """

    number: int
    path: str
    kind: str
    key: int
    source: str
    arguments: Any
    returns: bool

    def described(self, held: Held) -> HookCall:
        return HookCall(self.path, self.kind, self.key, held, self.source, self.returns)


class ObservedHooks:
    """Puts functions that note calls in the place of the hooks of a traced copy.

    Args:
        gradient_hooks: counts the hooks on values that the trace has registered.
        numbers: that vary; learn which hook asks for them.
    """

    def __init__(
        self,
        clone: torch.nn.Module,
        recorder: AttributeRecorder,
        gradient_hooks: ValueHooks,
        numbers: TracedNumbers,
    ) -> None:
        self._recorder, self._numbers = recorder, numbers
        self._gradient_hooks = gradient_hooks
        self._calls: list[ObservedCall] = []
        self._returning: set[int] = set()
        self._writing: set[int] = set()
        self._keeping: set[int] = set()
        self._count = 0
        for path, module in clone.named_modules():
            for kind in KINDS:
                hooks = getattr(module, kind)
                for key, hook in hooks.items():
                    if getattr(hook, "__module__", "") == _COLLECTING:
                        continue  # collects for the forward alone
                    hooks[key] = partial(self._call, self._count, path, kind, key, hook)
                    self._count += 1
        # the dicts, because export puts other tensors into them
        registries = (d for m in clone.modules() for d in (m._parameters, m._buffers))
        self._registries = [d for d in registries if d]

    def observing(self, acting: set[int]) -> set[int]:
        """Numbers of the hooks that each run calls.

        Args:
            acting: hooks that assigned what the forward read.

        Raises:
            CaptureError: a hook keeps values and changes others in place.
        """
        acting = acting | self._writing
        for call in self._calls:
            if call.number in acting & self._keeping:
                raise CaptureError(
                    f"the hook at {call.source} on {call.path or 'the model'} keeps values and "
                    "changes others in place, so it can be neither captured nor called later; "
                    "make it two hooks, or let it return the changed value"
                )
        return set(range(self._count)) - acting - (self._returning - self._keeping)

    def calls(self, observing: set[int]) -> Iterator[ObservedCall]:
        """The calls of these hooks, in order."""
        return (call for call in self._calls if call.number in observing)

    def _call(
        self, number: int, path: str, kind: str, key: int, hook: Callable[..., Any],
        module: torch.nn.Module, *arguments: Any,
    ) -> Any:  # fmt: skip
        recorder = self._recorder
        recorder.look_at_containers(None)
        versions = self._versions(arguments)
        registered = self._gradient_hooks.count
        held = _holdings(hook)
        outer, recorder.hook = recorder.hook, number
        self._numbers.hook = number
        try:
            result = hook(module, *arguments)
        except Restart:
            raise
        except Exception as error:
            if registered != self._gradient_hooks.count or versions != self._versions(arguments):
                raise  # called later, it would change or watch other values
            # it asks for values, in whatever way; it is called with real ones, and `HookCall`
            # checks that it changes nothing
            log.debug("%s is called with values only: %s", source_of(hook), error)
            result = None
        finally:
            recorder.hook = self._numbers.hook = outer
        recorder.look_at_containers(number)
        now = _holdings(hook)
        if held.keys() != now.keys() or not all(same_items(held[k], now[k]) for k in held):
            self._keeping.add(number)
        if versions != self._versions(arguments) or registered != self._gradient_hooks.count:
            self._writing.add(number)
        if result is not None:
            self._returning.add(number)
        used = tuple(
            x if i in _used_arguments(hook, len(arguments)) else None
            for i, x in enumerate(arguments)
        )
        call = ObservedCall(number, path, kind, key, source_of(hook), used, result is not None)
        self._calls.append(call)
        return result

    def _versions(self, arguments: Any) -> list[tuple[int, int]]:
        """Of the arguments, the parameters and the buffers."""
        held = chain.from_iterable(d.values() for d in self._registries)
        tensors = (x for x in chain(pytree.tree_leaves(arguments), held) if torch.is_tensor(x))
        return [(id(t), 0 if t.is_inference() else t._version) for t in tensors]


def _holdings(hook: Any) -> dict[int, list[Any]]:
    """Shallow copies of the containers and objects that a hook holds, by identity."""
    found: dict[int, list[Any]] = {}
    waiting = [hook]
    while waiting:
        value = waiting.pop()
        if id(value) in found or isinstance(value, torch.Tensor | torch.nn.Module | type):
            continue
        if isinstance(value, types.FunctionType):
            code, cells = value.__code__, value.__closure__ or ()
            waiting += [c.cell_contents for c in cells if c != types.CellType()]
            waiting += value.__defaults__ or ()
            names = (n for n in code.co_names if n in value.__globals__)
            used = (value.__globals__[n] for n in names)
            waiting += [x for x in used if isinstance(x, _COPIED_GLOBALS)]
        elif isinstance(value, types.MethodType):
            waiting += [value.__func__, value.__self__]
        elif isinstance(value, partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, CONTAINERS):
            found[id(value)] = contents(value)
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(getattr(value, "__dict__", None), dict):
            found[id(value)] = contents(vars(value))
            waiting += vars(value).values()
    return found


def _used_arguments(hook: Any, count: int) -> set[int]:
    """Which arguments after the module a hook looks at; all if it is no plain function.

    Args:
        count: of the arguments after the module.
    """
    function = getattr(hook, "__func__", hook)
    if not isinstance(function, types.FunctionType):
        return set(range(count))
    code = function.__code__
    names = code.co_varnames[: code.co_argcount][1 + (function is not hook) :][:count]
    loaded = {i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD")}
    loaded |= {*code.co_cellvars}
    if "locals" in code.co_names:
        return set(range(count))
    return {i for i in range(count) if i >= len(names) or names[i] in loaded}


def source_of(hook: Any) -> str:
    """`file:line` of a hook."""
    function = getattr(hook, "__func__", getattr(hook, "func", hook))
    code = getattr(function, "__code__", getattr(type(hook).__call__, "__code__", None))
    return repr(hook) if code is None else f"{code.co_filename}:{code.co_firstlineno}"
