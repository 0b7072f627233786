"""`ColoTracer`: captures a module as a functional ATen training graph on fake tensors.

The module is cloned with its parameters and buffers replaced by fake tensors, so that nothing of
the user's is read, moved or modified, and a model on the meta device traces as one on the target
device. `torch.export` (non-strict) captures the clone; functionalizing it with an empty
decomposition table keeps linear, layer_norm, attention and losses whole and turns in-place buffer
updates into outputs.
"""

from __future__ import annotations

import copy
import operator
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.tracer.graph import ModelGraph, NodeInfo, shape_of

# Nodes that state what tracing already guarantees.
_ASSERTIONS = {"aten._assert_tensor_metadata.default", "aten._assert_async.msg"}
_OWN_FRAMES = ("/torch/", "<string>", "<eval_with_key>")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


class ColoTracer:
    """Traces modules into `ModelGraph`s.

    Args:
        device: device type the program is captured for; ops may branch on it.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def trace(
        self,
        model: torch.nn.Module,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> ModelGraph:
        """Capture `model(*args, **kwargs)` in the model's current train/eval mode.

        Raises:
            CaptureError: a construct cannot be captured; the message has the user's source line.
        """
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True, static_shapes=True)
        clone = self._fake_clone(model, mode)
        fake = self._faker(mode)
        args, kwargs = pytree.tree_map_only(torch.Tensor, fake, (tuple(args), dict(kwargs or {})))
        assert isinstance(args, tuple)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.export(clone, args, kwargs, strict=False)
                program = program.run_decompositions({})
        except Exception as error:
            raise CaptureError(_explain(model, error)) from error
        return _model_graph(model, program, (args, kwargs))

    def _faker(self, mode: FakeTensorMode) -> Any:
        def fake(t: torch.Tensor) -> torch.Tensor:
            with mode:
                return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=self.device)

        return fake

    def _fake_clone(self, model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
        fake = self._faker(mode)
        memo: dict[int, Any] = {}
        for p in model.parameters():
            memo[id(p)] = torch.nn.Parameter(fake(p), requires_grad=p.requires_grad)
        for b in model.buffers():
            memo[id(b)] = fake(b)
        try:
            return copy.deepcopy(model, memo)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be copied for tracing: {error}. Something that it "
                "holds besides parameters and buffers (a lock, a file, a process group, a tensor "
                "with a gradient history) does not support copy.deepcopy; remove it, or give it "
                "a __deepcopy__."
            ) from error


def _explain(model: torch.nn.Module, error: Exception) -> str:
    """What failed, at which line of the user's code."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not any(part in name for part in (*_OWN_FRAMES, "/autopar/")):
            frames.append(f"{name}:{trace.tb_lineno}")
        trace = trace.tb_next
    recorded = [f"{f}:{n}" for f, n in _FRAME.findall(str(error)) if "/torch/" not in f]
    where = (frames or recorded or ["unknown line"])[-1]
    first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    return (
        f"cannot capture {type(model).__name__} as one graph: {type(error).__name__}: {first}\n"
        f"  at {where}\n"
        "  Control flow that depends on tensor values, and operators without a fake "
        "implementation, cannot be captured: compute the decision from shapes or arguments, or "
        "register a fake implementation with torch.library.register_fake."
    )


def _model_graph(
    model: torch.nn.Module, program: torch.export.ExportedProgram, example: Any
) -> ModelGraph:
    gm = program.graph_module
    parameters, buffers, constants = {}, {}, {}
    inputs: list[str | None] = []
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.PARAMETER:
            parameters[name] = str(spec.target)
        elif spec.kind is InputKind.BUFFER:
            buffers[name] = str(spec.target)
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(name)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = program.constants[str(spec.target)]
        else:
            raise CaptureError(
                f"{type(model).__name__} holds {spec.target} of kind {spec.kind.name}, which is "
                "neither tensor, parameter nor buffer; pass it as an argument instead"
            )
    mutations = tuple(
        str(spec.target)
        for spec in program.graph_signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION
    )
    canonical = {id(p): n for n, p in model.named_parameters()}
    aliases = {
        n: canonical[id(p)]
        for n, p in model.named_parameters(remove_duplicate=False)
        if canonical[id(p)] != n
    }
    parameters = {k: aliases.get(v, v) for k, v in parameters.items()}
    _merge_tied(gm.graph, parameters)
    flat, in_spec = pytree.tree_flatten(example)
    inputs = [
        name if isinstance(value, torch.Tensor) else None
        for name, value in zip(inputs, flat, strict=True)
    ]
    _clean(gm)
    return ModelGraph(
        gm, parameters, buffers, tuple(inputs), mutations, in_spec,
        program.call_spec.out_spec, constants, aliases,
    )  # fmt: skip


def _merge_tied(graph: fx.Graph, parameters: dict[str, str]) -> None:
    """A tied weight may be lifted once per name; keep the first: its gradient is one sum."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.find_nodes(op="placeholder")):
        name = parameters.get(str(node.target))
        if name is None:
            continue
        if name in first:
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)
            del parameters[str(node.target)]
        else:
            first[name] = node


def _clean(gm: fx.GraphModule) -> None:
    """Drop assertions and dead code, annotate where every node came from, check what is left."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) in _ASSERTIONS:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta["autopar"] = NodeInfo(_module_of(node), _source_of(node))
        if node.op == "call_function" and node.target is not operator.getitem:
            if not isinstance(node.target, torch._ops.OpOverload):
                raise CaptureError(
                    f"{node.target} at {_source_of(node)} is not an operator (a higher-order op or "
                    "a symbolic size); autopar plans graphs of ATen and custom operators"
                )
        elif node.op == "get_attr":
            raise CaptureError(
                f"the model uses the constant {node.target} at {_source_of(node)}; "
                "register it as a buffer"
            )
    gm.recompile()


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values()))), "")


def _source_of(node: fx.Node) -> str:
    """Innermost frame outside of torch, as file:line."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not any(part in f[0] for part in _OWN_FRAMES)]
    chosen = own or frames
    return f"{chosen[-1][0]}:{chosen[-1][1]}" if chosen else "unknown source"


__all__ = ["ColoTracer", "shape_of"]
