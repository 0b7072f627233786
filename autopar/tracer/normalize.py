"""From an exported program to a `ModelGraph` in a normal form.

* Placeholders are parameters, buffers, constants and inputs, in this order; a tied weight is one.
* `view` becomes `reshape`: strides on fake tensors can differ from a kernel's, and a
  `contiguous` that was removed as redundant may be needed. Views that negate what they show when it
  is read (`conj`) become values, as messages are of memory.
* `copy` becomes a conversion and an expansion, because it has no derivative.
* Products whose result is cut into equal parts get a dim for the parts (`packed.py`).
* Losses of tokens keep the dims of the batch (`token_loss.py`).
* Attention knows its mask where positions decide it (`attention_masks.py`), and takes the keys that
  heads share unrepeated (`grouped_keys.py`).
* Results of `no_grad` regions are detached.
* Assertions and dead code are removed. Random draws stay, so that a generator has the same state
  after the graph as after the model.
"""

from __future__ import annotations

import itertools
import operator
import re
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.ir.graph import ModelGraph, NodeInfo, bound_arguments, is_marked_leaf
from autopar.ir.guards import Guard, is_mutating
from autopar.ir.randomness import draws
from autopar.tracer.attention_masks import name_masks
from autopar.tracer.functions import NAMESPACE
from autopar.tracer.grouped_keys import share_keys
from autopar.tracer.inplace import call_like
from autopar.tracer.packed import pack
from autopar.tracer.source import is_users
from autopar.tracer.token_loss import keep_token_dims
from autopar.tracer.writes import take_out_writes

aten = torch.ops.aten

# Nodes that assert what tracing already guarantees.
_ASSERTIONS = {"aten._assert_tensor_metadata.default", "aten._assert_async.msg"}
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_SAME_AS = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten._conj.default: aten.conj_physical.default,
    aten._neg_view.default: aten.neg.default,
}
_EMBEDDINGS = {
    aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx,
    aten._embedding_bag.default, aten._embedding_bag_forward_only.default,
}  # fmt: skip
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def model_graph(
    model: torch.nn.Module,
    program: torch.export.ExportedProgram,
    example: Any,
    guards: tuple[Guard, ...],
    extra: int,
) -> ModelGraph:
    """The graph of an exported and functionalized program.

    Args:
        example: the fake (args, kwargs) it was exported with.
        extra: number of values after the results that the program returns to keep draws alive.
    """
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
            if isinstance(constants[name], FakeTensor):
                users = gm.graph.find_nodes(op="placeholder", target=name)[0].users
                where = next(map(_source_of, users), "unknown source")
                raise CaptureError(
                    f"a value computed in {type(model).__name__} leaves the capture and comes back "
                    f"as a constant at {where}; compute with the tensor itself (not through NumPy, "
                    "a pickle or a C++ object)"
                )
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
    _order_placeholders(gm.graph, [parameters, buffers, constants])
    flat, in_spec = pytree.tree_flatten(example)
    inputs = [
        name if isinstance(value, torch.Tensor) else None
        for name, value in zip(inputs, flat, strict=True)
    ]
    placeholders = {n.target: n for n in gm.graph.find_nodes(op="placeholder")}
    updates = take_out_writes(
        gm,
        program.graph_signature.output_specs,
        {name: placeholders[target] for target, name in parameters.items()},
    )
    output = gm.graph.output_node()
    results: Any = output.args[0]
    output.args = (tuple(results[: len(results) - extra]),)
    dense = _dense_gradients(gm.graph)
    _clean(gm)
    out_spec, *_ = program.call_spec.out_spec.children()
    return ModelGraph(
        gm, parameters, buffers, tuple(inputs), mutations, in_spec,
        out_spec, constants, aliases, (*guards, *dense), updates,
    )  # fmt: skip


def _merge_tied(graph: fx.Graph, parameters: dict[str, str]) -> None:
    """Merge a tied weight that was lifted once per name, so that its gradient is one sum."""
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


def _order_placeholders(graph: fx.Graph, kinds: list[Any]) -> None:
    """Parameters, buffers, constants, then inputs; export mixes constants with buffers."""

    def rank(node: fx.Node) -> int:
        return next((i for i, k in enumerate(kinds) if node.target in k), len(kinds))

    placeholders = list(graph.find_nodes(op="placeholder"))
    for before, node in itertools.pairwise(sorted(placeholders, key=rank)):
        before.append(node)


def _rewrite(graph: fx.Graph) -> None:
    """Replace operators by equivalent ones that have rules and derivatives."""
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        source = node.args[1]
        value = node.meta["val"]
        with graph.inserting_before(node):
            if source.meta["val"].dtype != value.dtype:
                dtype = {"dtype": value.dtype}
                source = call_like(node, aten._to_copy.default, (source,), dtype, "to")
            if source.meta["val"].shape != value.shape:
                shape = list(value.shape)
                source = call_like(node, aten.expand.default, (source, shape), name="expand")
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        _drop_empty(node)
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _SAME_AS.get(node.target, node.target)


def _dense_gradients(graph: fx.Graph) -> tuple[Guard, ...]:
    """Have embeddings with `sparse=True` give dense gradients; a guard for each."""
    guards = []
    for node in graph.nodes:
        if node.target not in _EMBEDDINGS or not bound_arguments(node).get("sparse"):
            continue
        position = [a.name for a in node.target._schema.arguments].index("sparse")
        if "sparse" in node.kwargs:
            node.kwargs = {**node.kwargs, "sparse": False}
        else:
            node.args = (*node.args[:position], False, *node.args[position + 1 :])
        note = "gradients are dense, of the same values; an optimizer must take dense gradients"
        guards.append(Guard("setting", _source_of(node), "sparse gradients", False, note))
    return tuple(guards)


def _drop_empty(cat: fx.Node) -> None:
    """Leave empty tensors of one dim out of a concatenation.

    torch lets them stand beside tensors of any rank (`torch.tensor([])`, to start a loop).
    """
    tensors: Any = cat.args[0]
    kept = [t for t in tensors if t.meta["val"].shape != (0,)]
    if not kept or len(kept) == len(tensors):
        return
    dtype = cat.meta["val"].dtype
    with cat.graph.inserting_before(cat):
        kept = [
            t if t.meta["val"].dtype == dtype
            else call_like(t, aten._to_copy.default, (t,), {"dtype": dtype}, "to")
            for t in kept
        ]  # fmt: skip
    cat.args = (kept, *cat.args[1:])


def _clean(gm: fx.GraphModule) -> None:
    """Remove assertions and dead code, annotate the origin of every node, and check the rest."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) in _ASSERTIONS:
            graph.erase_node(node)
    _rewrite(graph)
    pack(graph)
    keep_token_dims(graph)
    name_masks(graph)
    share_keys(graph)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or draws(n))
    functions = (n for n in graph.nodes if getattr(n.target, "namespace", "") == NAMESPACE)
    for i, node in enumerate(functions):
        node._rename(f"function_{i}")  # the operator's own name depends on what was captured before
    for node in graph.nodes:
        node.meta["autopar"] = NodeInfo(_module_of(node), _source_of(node), is_marked_leaf(node))
        if node.op == "call_function" and node.target is not operator.getitem:
            number = isinstance(node.meta.get("val"), _NUMBERS)
            if not isinstance(node.target, torch._ops.OpOverload) and not number:
                _refuse_higher_order(node)
        elif node.op == "get_attr":
            for user in node.users:
                _refuse_higher_order(user)
            raise CaptureError(
                f"the model uses the constant {node.target} at {_source_of(node)}; "
                "register it as a buffer"
            )
        if free_unbacked_symbols(pytree.tree_leaves(node.meta.get("val"))):
            raise CaptureError(
                f"{node.name} at {_source_of(node)} has a size that depends on the values of "
                "activations, which a plan does not know; use a size that inputs or shapes decide "
                "(pad to the largest, and mask)"
            )
    gm.recompile()


def _refuse_higher_order(node: fx.Node) -> None:
    """Raise for a call of an operator that takes functions.

    Raises:
        CaptureError: naming the call and its line.
    """
    if isinstance(node.target, torch._ops.OpOverload) or node.op != "call_function":
        return
    raise CaptureError(
        f"{node.target} at {_source_of(node)} takes functions (torch.cond, while_loop, map, scan, "
        "flex_attention), and autopar plans graphs of plain operators. Write Python's if and for, "
        "which are captured if inputs decide; torch.where for both sides; torch.vmap for map; "
        "F.scaled_dot_product_attention for flex_attention"
    )


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values()))), "")


def _source_of(node: fx.Node) -> str:
    """Innermost frame outside of torch, as file:line."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if is_users(f[0])]
    chosen = own or frames
    return f"{chosen[-1][0]}:{chosen[-1][1]}" if chosen else "unknown source"


def refuse_strided_writes(gm: fx.GraphModule) -> None:
    """Refuse writes through `as_strided`: the derivative of the functional form
    (`as_strided_scatter`) keeps the gradients of the elements that are replaced, and drops those of
    the others (torch 2.13).

    Raises:
        CaptureError: naming the line.
    """
    written = torch.ops.aten.as_strided_scatter.default
    for node in gm.graph.find_nodes(op="call_function", target=written):
        raise CaptureError(
            f"{_source_of(node)}: a write through as_strided has no right gradient in a captured "
            "graph; write through slices, views or an index"
        )


def rebuild_users(gm: fx.GraphModule) -> None:
    """Rebuild a graph in which some node is not a user of its inputs.

    Export produces such graphs where it cuts regions out (torch 2.13), and erasing nodes fails
    there.
    """
    if all(node in source.users for node in gm.graph.nodes for source in node.all_input_nodes):
        return
    rebuilt = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = rebuilt.node_copy(node, copies.__getitem__)
    gm.graph = rebuilt


def detach_no_grad_regions(gm: fx.GraphModule) -> None:
    """Detach the results of `torch.no_grad()` regions, because inlining loses the grad mode."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or str(node.target) != "wrap_with_set_grad_enabled":
            continue
        body = getattr(gm, node.args[1].target)
        detach_no_grad_regions(body)
        if node.args[0]:
            continue
        output = body.graph.output_node()
        for value in output.all_input_nodes:
            t = value.meta.get("val")
            if not isinstance(t, torch.Tensor) or not t.dtype.is_floating_point:
                continue
            if _written_argument(value):  # a parameter, which keeps its gradient
                continue
            with body.graph.inserting_before(output):
                detached = call_like(value, aten.detach.default, (value,), name="detach")
            output.replace_input_with(value, detached)
        body.recompile()


def _written_argument(value: fx.Node) -> bool:
    """Whether a value is an argument of the graph after in-place writes into it."""
    written = False
    while is_mutating(value) and value.args:
        written = True
        value = value.args[0]  # type: ignore[assignment]
    return written and value.op == "placeholder"
