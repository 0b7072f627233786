"""`ColoTracer`: captures a module as a functional ATen training graph on fake tensors.

The module is cloned with fake tensors as parameters and buffers. So the user's module is not read,
moved or modified, and a model on the meta device is traced like one on the target device.
`torch.export` (non-strict) captures the clone. Functionalization with an empty decomposition table
does not decompose linear, layer_norm, attention and losses, and turns in-place buffer updates into
outputs. `branches.py` answers Python's questions about values during the trace.

`torch.fx._lazy_graph_module._use_lazy_graph_module` is private (the same in torch 2.11 and 2.13).
Without it, each of export's passes generates Python source, a third of the time of a capture.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.gc_utils import collection_paused
from autopar.ir.graph import ModelGraph
from autopar.ir.guards import Guard
from autopar.ir.numbers import Origin
from autopar.ir.precision import Precision
from autopar.ir.randomness import keep_draws
from autopar.tracer import fakes
from autopar.tracer.arguments import Arguments, check_inputs, examples
from autopar.tracer.attributes import AttributeRecorder
from autopar.tracer.autocast_products import AutocastProducts
from autopar.tracer.branches import BranchResolver
from autopar.tracer.casts import keep_modules, with_casts
from autopar.tracer.causal_bias import causal_biases, causal_biases_as_masks
from autopar.tracer.effects import Carried, Originals, check_state, collect
from autopar.tracer.fakes import quiet_fakes
from autopar.tracer.flex_attention import flex_attention_as_products
from autopar.tracer.forward_hooks import (
    ObservedHooks,
    RegisteredHook,
    collect_outputs,
    copied_tensors,
    isolate,
    refuse_global_hooks,
    root_hooks,
)
from autopar.tracer.functional import make_functional
from autopar.tracer.functions import opaque_functions
from autopar.tracer.gradient_hooks import module_hooks, originals
from autopar.tracer.modes import regions_as_run
from autopar.tracer.names import retraced
from autopar.tracer.normalize import (
    detach_no_grad_regions,
    model_graph,
    rebuild_users,
    refuse_strided_writes,
)
from autopar.tracer.numbers import TracedNumbers, refuse_types
from autopar.tracer.randomness import HostFunction, Restart, host_randomness
from autopar.tracer.results import plain_results
from autopar.tracer.settings import (
    apply_settings,
    computed_tensors,
    masks_as_run,
    masks_can_be_skipped,
)
from autopar.tracer.shared_buffers import merge_shared_buffers, refuse_changes
from autopar.tracer.slots import refuse_slots
from autopar.tracer.source import failing_line
from autopar.tracer.stack_traces import lines_only

log = logging.getLogger(__name__)

fakes.register()

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


class ColoTracer:
    """Traces modules into `ModelGraph`s.

    Args:
        device: device type of the captured program; ops may branch on it.
        assume: values of tensors that Python asks for and that nothing else decides, by
            `file.py:line` or a piece of that line's text.
        precision: dtypes in which the model computes; None for those of its tensors.
        cast_first: whether parameters that the model only casts (under autocast) are cast where the
            program begins, before their gathers.
        dynamic: keep the first two dims of every input symbolic if the model allows it, or the dims
            that are given by the position of an input among the flattened ones; the graph's
            `symbols` names them. Such a graph can be profiled for any size, but not planned; of
            one with given dims, only sizes are of use.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        assume: Mapping[str, Any] | None = None,
        precision: Precision | None = None,
        cast_first: bool = True,
        dynamic: bool | Mapping[int, Collection[int]] = False,
    ) -> None:
        self.device = device
        self.assume = dict(assume or {})
        self.precision, self.cast_first = precision, cast_first
        self.dynamic = dynamic

    def trace(
        self,
        model: torch.nn.Module,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        varying: Collection[Origin] = (),
    ) -> ModelGraph:
        """Capture `model(*args, **kwargs)` in the model's current train/eval mode.

        The model is neither run nor changed. The values of inputs are read only if the model's
        Python branches on them; each such branch is one of the graph's `guards`.

        Args:
            varying: origins of Python numbers that are inputs of the graph, not constants.

        Raises:
            CaptureError: a construct cannot be captured; the message has the user's source line.
        """
        example = (tuple(args), dict(kwargs or {}))
        check_inputs(model, example)
        refuse_global_hooks()
        if self.precision is not None:
            self.precision.check(model)
        try:
            with collection_paused(), quiet_fakes():
                if masks_can_be_skipped():
                    try:
                        with masks_as_run():
                            return self._lifting(model, example, varying)
                    except CaptureError:
                        pass  # the condition has no value: build masks for every case
                return self._lifting(model, example, varying)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(_explain(model, error, example)) from error

    def _lifting(
        self, model: torch.nn.Module, example: Any, varying: Collection[Origin]
    ) -> ModelGraph:
        """Capture, starting over with functions that draw host random numbers as operators, and
        with hooks that transformers registers in a forward."""
        lifted: set[HostFunction] = set()
        collecting: list[str] = []
        while True:
            try:
                return self._capture(model, example, varying, lifted, collecting)
            except Restart as restart:
                lifted.add(restart.function)
            except RegisteredHook as registered:
                registered.check(collecting)
                collecting += registered.collecting

    def _capture(
        self,
        model: torch.nn.Module,
        example: Any,
        varying: Collection[Origin],
        lifted: set[HostFunction],
        collecting: Sequence[str],
    ) -> ModelGraph:
        mode = FakeTensorMode(
            shape_env=ShapeEnv(), allow_non_fake_inputs=True, static_shapes=not self.dynamic
        )
        copied = self._fake_clone(model, mode)
        clone = copied.clone
        collect_outputs(clone, collecting)
        settings = apply_settings(clone)
        keep_modules(clone, self.precision)
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: self._fake_input(mode, t), example
        )
        if varying:
            refuse_types(model)
        numbers = TracedNumbers(varying)
        resolver = BranchResolver(
            examples(model, example),
            self.assume,
            originals(model, clone) | copied.originals.containers(),
            numbers,
        )
        carried: list[Carried] = []
        with (
            numbers.substituted(clone),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            opaque_functions(),
            flex_attention_as_products(),
            AutocastProducts(),
            causal_biases_as_masks(),
            regions_as_run(),
            module_hooks(model, clone),
            host_randomness(resolver, lifted),
        ):
            warnings.simplefilter("ignore")
            _watch(copied, resolver, carried, self.precision)
            with _use_lazy_graph_module(True), lines_only():
                dims = self._dynamic_shapes(model, example)
                program = torch.export.export(
                    clone, args, kwargs, dynamic_shapes=dims, strict=False
                )
            rebuild_users(program.graph_module)
            merge_shared_buffers(program, model)
            detach_no_grad_regions(program.graph_module)
            # The second trace writes the casts of an autocast into the graph, and for every symbol
            # the nodes that compute it, which a graph needs if more than its sizes is read.
            again = self.dynamic is True or torch.is_autocast_enabled(self.device)
            if again or not make_functional(program):
                keep_draws(program.graph_module)
                program = retraced(program)
            refuse_strided_writes(program.graph_module)
            refuse_changes(program, model)
        guards = (*settings, *resolver.guards)
        for guard in guards:
            # a layer that is never dropped trains differently, so warn
            log.log(logging.WARNING if guard.kind == "random" else logging.INFO, "%s", guard)
        graph = model_graph(model, program, (args, kwargs), guards, len(resolver.draws))
        graph = with_casts(
            graph, self.precision, model, example, cast_first=self.cast_first and not self.dynamic
        )
        effects = carried[-1]
        check_state(effects.kept, copied.histories, graph.constants)
        found = numbers.of_graph(graph.constants, effects.observing)
        return dataclasses.replace(
            graph,
            # the user's own, so that values that change without a version are seen
            constants={k: copied.originals.of_copy(t) for k, t in graph.constants.items()},
            reads=effects.reads_of(model, copied.originals, graph.constants, found),
            effects=effects.effects,
            numbers=found,
        )

    def _dynamic_shapes(self, model: torch.nn.Module, example: Any) -> Any:
        """Symbolic dims of every input; None if none is."""
        if not self.dynamic:
            return None
        leaves, spec = pytree.tree_flatten(example)
        args, kwargs = pytree.tree_unflatten(list(map(self._dims, count(), leaves)), spec)
        if not args or not kwargs:
            return kwargs or args
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise CaptureError("dynamic sizes need keyword inputs where forward takes *args")
        return dict(zip((p.name for p in parameters), args, strict=False)) | kwargs

    def _dims(self, position: int, value: Any) -> Any:
        """Which dims of an input are symbolic."""
        if not isinstance(value, torch.Tensor):
            return None
        if isinstance(self.dynamic, Mapping):
            return dict.fromkeys(self.dynamic.get(position, ()), torch.export.Dim.AUTO)
        if value.ndim and value.shape[0] < 2:
            raise CaptureError(
                f"dynamic=True needs an example batch of at least 2, got an input of shape "
                f"{tuple(value.shape)}: sizes 0 and 1 behave unlike the others"
            )
        return dict.fromkeys(range(min(2, value.ndim)), torch.export.Dim.AUTO)

    def _fake(
        self, mode: FakeTensorMode, t: torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        with mode:
            return torch.empty_strided(
                t.size(), t.stride(), dtype=dtype or t.dtype, device=self.device
            )

    def _fake_input(self, mode: FakeTensorMode, t: torch.Tensor) -> torch.Tensor:
        dtype = t.dtype if self.precision is None else self.precision.input_dtype(t)
        return self._fake(mode, t, dtype).requires_grad_(t.requires_grad)

    def _fake_clone(self, model: torch.nn.Module, mode: FakeTensorMode) -> _Copied:
        refuse_slots(model)
        memo: dict[int, Any] = {id(b): self._fake(mode, b) for b in model.buffers()}
        casts = {} if self.precision is None else self.precision.casts(model)
        for name, p in model.named_parameters():
            dtype = casts[name].compute if name in casts else p.dtype
            memo[id(p)] = torch.nn.Parameter(self._fake(mode, p, dtype), p.requires_grad)
        for t in computed_tensors(model):
            memo[id(t)] = self._fake(mode, t)
        memo |= {id(bias): bias for bias in causal_biases(model)}
        try:
            with copied_tensors() as histories:
                isolate(model, memo)
                return _Copied(copy.deepcopy(model, memo), Originals(memo), histories)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be copied for tracing: {error}. Something that it "
                "holds besides parameters and buffers (a lock, a file, a process group) does not "
                "support copy.deepcopy; remove it, or give it a __deepcopy__."
            ) from error


@dataclasses.dataclass(frozen=True)
class _Copied:
    """A copy of a model to trace.

    Args:
        originals: of the objects in the copy.
        histories: copies of tensors that have a gradient history.
    """

    clone: torch.nn.Module
    originals: Originals
    histories: list[torch.Tensor]


def _watch(
    copied: _Copied,
    resolver: BranchResolver,
    carried: list[Carried],
    precision: Precision | None,
) -> None:
    """Run the clone's forward, with its hooks, under the resolver and an `AttributeRecorder`.

    Args:
        carried: gets what the forward did.
        precision: its dtype of results.
    """
    clone = copied.clone
    forward = clone.forward
    recorder = AttributeRecorder(clone)
    numbers = resolver.numbers
    hooks = ObservedHooks(clone, recorder, resolver.hooks, numbers)
    call = root_hooks(clone)
    copies = _named_tensors(clone)

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        roles: dict[tuple[str, Any], Any] = {
            ("input", i): value for i, value in enumerate(pytree.tree_leaves((args, kwargs)))
        }
        for name, p in clone.named_parameters(remove_duplicate=False):
            roles["parameter", name] = p
        shapes = {}
        for name, b in clone.named_buffers(remove_duplicate=False):
            roles["buffer", name] = b
            shapes[name] = b.shape
        resolver.begin(roles)
        args, kwargs = numbers.among((args, kwargs))
        inputs = Arguments((args, kwargs))
        now = _named_tensors(clone)
        recorder.substitute({id(t): now[name] for name, t in copies.items()})
        try:
            with resolver, recorder.recording():
                results, returned = plain_results(call(*args, **kwargs))
                if precision is not None:
                    results = pytree.tree_map(precision.output, results)
            changes = inputs.changes(collect(recorder, hooks, copied.originals))
            changes.effects = dataclasses.replace(changes.effects, numbers=returned)
            carried.append(changes)
        finally:
            recorder.restore()  # the copy may share objects with the model
        for name, b in clone.named_buffers(remove_duplicate=False):
            if shapes.get(name, b.shape) != b.shape:
                note = "the module keeps its own; the program makes the new one at each step"
                text = "buffer replaced by one of another shape"
                resolver.guards.append(Guard("setting", name, text, tuple(b.shape), note))
        # returned too, so that the effects' tensors and the draws stay in the program
        return results, carried[-1].tensors, resolver.draws

    clone.forward = watched


def _named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# Errors of capture, for all inputs; the model itself may raise others.
_UNCAPTURABLE = (
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


def _explain(model: torch.nn.Module, error: Exception, example: Any) -> str:
    """What failed, at which line of the user's code, and the remedy."""
    recorded = [f"{f}:{n}" for f, n in _FRAME.findall(str(error)) if "/torch/" not in f]
    line = failing_line(error)
    where = f"{line}: `{line.text}`" if line else (recorded or ["unknown line"])[-1]
    first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    if isinstance(error, _UNCAPTURABLE):
        remedy = (
            "Control flow that depends on tensor values, and operators without a fake "
            "implementation, cannot be captured: compute the decision from shapes or arguments, "
            "or register a fake implementation with torch.library.register_fake."
        )
    else:
        remedy = (
            f"The inputs were {_described(example)}. If the model fails on them without autopar "
            "too, correct the inputs (shapes, dtypes, names) or the model."
        )
    return (
        f"cannot capture {type(model).__name__} as one graph: {type(error).__name__}: {first}\n"
        f"  at {where}\n  {remedy}"
    )


def _described(example: Any) -> str:
    parts = []
    for path, value in pytree.tree_flatten_with_path(example)[0]:
        text = (
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            if isinstance(value, torch.Tensor)
            else repr(value)
        )
        parts.append(f"{pytree.keystr(path[1:]).strip('[]').strip(chr(39))}: {text}")
    return ", ".join(parts) or "none"
