"""`ModelGraph`: the captured model, a functional ATen graph with global shapes."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from autopar.ir.aliasing import tensors_of
from autopar.ir.effects import Assignment, Effects
from autopar.ir.guards import Guard
from autopar.ir.numbers import Numbers, Values, evaluate
from autopar.ir.precision import Cast, Precision, without_autocast
from autopar.ir.randomness import draws
from autopar.ir.reads import Reads
from autopar.ir.result_objects import has_nodes, realized


@dataclass(frozen=True)
class NodeInfo:
    """Origin of a node.

    Args:
        module: qualified name.
        source: `file:line`.
        leaf: the forward sets `requires_grad` on this value, so eager PyTorch computes a gradient
            for it although the graph does not.
    """

    module: str
    source: str
    leaf: bool = False


@dataclass(frozen=True)
class ModelGraph:
    """One training graph of a model, as the author wrote it (linear, layer_norm, ...).

    Placeholders come in the order parameters, buffers, inputs; outputs in the order mutated
    buffers, results, tensors of `effects`. Node `meta["val"]` holds fake tensors of global shape.

    Args:
        gm: the graph.
        parameters: placeholder name to the parameter's qualified name (each tied weight once).
        buffers: placeholder name to the buffer's qualified name.
        inputs: placeholder names of the flattened inputs, in order; None where an input is not a
            tensor and was specialized.
        mutations: per mutated buffer the qualified name, in output order.
        in_spec: pytree of (args, kwargs).
        out_spec: pytree of the results.
        constants: tensors that the model holds but that are neither parameter nor buffer.
        aliases: qualified names of tied parameters to the one name used in `parameters`.
        guards: assumptions about values.
        updates: pointwise changes of parameters (clamped weights), by qualified name, that the
            forward makes before it uses them; made in place before each run.
        reads: what the program depends on in its model besides tensors that are its arguments.
        effects: attributes that each run assigns, and hooks that it calls.
        numbers: Python numbers that vary; some of the constants take their values at each run.
        casts: by placeholder name, arguments that the caller holds in another dtype than that of
            the placeholder, or whose gradients are summed in another one.
        precision: the policy that it was captured under.
        donated: by placeholder name, inputs whose memory the caller gives to a result (a cache of
            keys and values), and the position of that result among the outputs. Both have one
            layout, and stay sharded.
    """

    gm: fx.GraphModule
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    inputs: tuple[str | None, ...]
    mutations: tuple[str, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()
    updates: Mapping[str, fx.GraphModule] = field(default_factory=dict)
    reads: Reads = field(default_factory=Reads)
    effects: Effects = field(default_factory=Effects)
    numbers: Numbers = field(default_factory=Numbers)
    casts: Mapping[str, Cast] = field(default_factory=dict)
    precision: Precision | None = None
    donated: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        return tuple(self.gm.graph.nodes)

    @cached_property
    def output(self) -> fx.Node:
        return self.nodes[-1]

    @cached_property
    def placeholders(self) -> dict[str, fx.Node]:
        return {str(n.target): n for n in self.nodes if n.op == "placeholder"}

    @property
    def input_arguments(self) -> slice:
        """Where its inputs are among the tensors that its program takes."""
        first = len(self.parameters) + len(self.buffers) + len(self.constants)
        return slice(first, first + sum(name is not None for name in self.inputs))

    def compute_nodes(self) -> Iterator[fx.Node]:
        """Operator calls, without `getitem`s of multiple results and arithmetic on symbolic
        sizes."""
        for node in self.nodes:
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            if any(map(torch.is_tensor, pytree.tree_leaves(node.meta["val"]))):
                yield node

    def storage_dtype(self, placeholder: str) -> torch.dtype:
        """In which the caller holds an argument."""
        cast = self.casts.get(placeholder)
        return self.placeholders[placeholder].meta["val"].dtype if cast is None else cast.storage

    @cached_property
    def sum_dtypes(self) -> dict[fx.Node, torch.dtype]:
        """In which the gradients of parameters, and of values that are computed from parameters and
        no inputs, are summed over ranks."""
        dtypes: dict[fx.Node, torch.dtype] = {}
        of_inputs: set[fx.Node] = {self.placeholders[n] for n in self.inputs if n is not None}
        for node in self.nodes:
            sources = node.all_input_nodes
            if any(source in of_inputs for source in sources):
                of_inputs.add(node)
            elif node.op == "placeholder" and node.target in self.parameters:
                cast = self.casts.get(str(node.target))
                dtypes[node] = node.meta["val"].dtype if cast is None else cast.reductions
            elif known := [dtypes[source] for source in sources if source in dtypes]:
                dtypes[node] = max(known, key=lambda dtype: dtype.itemsize)
        return dtypes

    def sum_dtype(self, node: fx.Node, result: int = 0) -> torch.dtype:
        """In which the gradient of a value, one of the results of a node, is summed over ranks."""
        dtype = tensors_of(node.meta["val"])[result].dtype
        sums = self.sum_dtypes.get(node, dtype)
        if node.op != "placeholder" and sums.itemsize <= dtype.itemsize:
            return dtype
        return sums if dtype.is_floating_point and sums.is_floating_point else dtype

    @property
    def mutated_placeholders(self) -> list[str]:
        """Placeholder names of the buffers that the step updates."""
        return [k for k, name in self.buffers.items() if name in self.mutations]

    @property
    def mutated_in_order(self) -> list[str]:
        """The same in the order of `mutations`."""
        placeholders = {name: k for k, name in self.buffers.items()}
        return [placeholders[name] for name in self.mutations]

    @cached_property
    def symbols(self) -> dict[str, str]:
        """Names of the symbolic sizes of inputs: "batch" for dim 0, "sequence" for dim 1, and
        `<input>_<dim>` where the size differs from that of the first such dim."""
        names: dict[str, str] = {}
        first: dict[str, int] = {}
        for name in self.inputs:
            if name is None:
                continue
            value = self.placeholders[name].meta["val"]
            for role, size in zip(("batch", "sequence"), value.shape, strict=False):
                if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                    hint = size.node.hint
                    same = first.setdefault(role, hint) == hint
                    dim = ("batch", "sequence").index(role)
                    names[str(size.node.expr)] = role if same else f"{name}_{dim}"
        return names

    @cached_property
    def random(self) -> bool:
        """Whether some operator draws random numbers."""
        return any(draws(node) for node in self.nodes)

    @property
    def assigned(self) -> tuple[Assignment, ...]:
        """Attributes of modules that each run assigns."""
        return self.effects.assigned

    def info(self, node: fx.Node) -> NodeInfo:
        return node.meta["autopar"]

    def carry_out(
        self,
        model: torch.nn.Module,
        results: Sequence[Any],
        leaves: Sequence[Any],
        values: Values,
    ) -> Any:
        """The user's results, after the effects of a run on the user's model.

        Args:
            results: of the program, after the mutated buffers.
            leaves: the flattened inputs, as the caller passed them.
            values: of the numbers that vary, from before the run.
        """
        count = self.out_spec.num_leaves
        self.effects.carry_out(model, results[count:], leaves, values)
        own = list(results[:count])
        for position, number in self.effects.numbers.items():
            own[position] = evaluate(number, values)
        results = own[0] if self._returns_one else pytree.tree_unflatten(own, self.out_spec)
        return realized(results) if self._returns_objects else results

    @cached_property
    def _returns_one(self) -> bool:
        """A single result, nested in nothing."""
        return self.out_spec.is_leaf()

    @cached_property
    def _returns_objects(self) -> bool:
        return has_nodes(self.out_spec)

    def bind(self, model: torch.nn.Module) -> Callable[..., Any]:
        """The captured program bound to a model's tensors, with the model's call signature.

        Parameters and buffers are those of `model` at each call; mutated buffers are updated.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
            buffers = dict(model.named_buffers(remove_duplicate=False))
            tensors |= buffers
            with torch.no_grad():
                for name, update in self.updates.items():
                    tensors[name].copy_(update(tensors[name]))
            # copies: backward may keep what is about to be overwritten
            tensors |= {name: tensors[name].clone() for name in self.mutations}
            state = [tensors[n] for n in (*self.parameters.values(), *self.buffers.values())]
            leaves = pytree.tree_leaves((args, kwargs))
            values = self.numbers.values(model, leaves)
            state += self.numbers.fill(self.constants, values).values()
            arguments = [*state, *leaves]
            for i, name in enumerate(self.placeholders):
                if name in self.casts:
                    arguments[i] = arguments[i].to(self.casts[name].compute)
            with without_autocast():
                results = self.gm(*arguments)
            with torch.no_grad():
                for name, value in zip(self.mutations, results, strict=False):
                    buffers[name].copy_(value)
            return self.carry_out(model, results[len(self.mutations) :], leaves, values)

        return run

    @cached_property
    def fingerprint(self) -> str:
        """Hash of operators, edges and shapes; graphs with equal hashes can use the same plans."""
        digest = hashlib.sha256()
        number = {node: i for i, node in enumerate(self.nodes)}
        for node in self.nodes:
            value = node.meta.get("val")
            shapes = pytree.tree_map_only(
                torch.Tensor, lambda t: (tuple(t.shape), str(t.dtype)), value
            )
            args = pytree.tree_map_only(fx.Node, number.__getitem__, (node.args, node.kwargs))
            # a plan may run on another device type
            args = pytree.tree_map_only(torch.device, lambda d: None, args)
            # a placeholder's name may depend on how the batch was passed
            target = "in" if node.op == "placeholder" else str(node.target)
            if node.op == "placeholder" and node.target in self.casts:
                target = f"in {self.casts[str(node.target)]}"
            digest.update(repr((node.op, target, shapes, args)).encode())
        return digest.hexdigest()[:16]


_LEAF = "autopar_leaf"


def mark_leaf(node: fx.Node) -> None:
    """Mark a node of a graph being captured whose value was set to require grad.

    Export copies "custom" metadata to the nodes that replace this one.
    """
    node.meta.setdefault("custom", {})[_LEAF] = node.name


def is_marked_leaf(node: fx.Node) -> bool:
    """Whether the node is the marked value: the last of the nodes that replace the marked one."""

    def mark(n: fx.Node) -> Any:
        return n.meta.get("custom", {}).get(_LEAF)

    return mark(node) is not None and all(mark(user) != mark(node) for user in node.users)


def producer(node: fx.Node) -> tuple[fx.Node, int]:
    """The operator call or placeholder behind a value, and which of its results it is."""
    if node.op == "call_function" and node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        return source, index
    return node, 0


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a node's tensor value as plain integers."""
    return tuple(int(n) for n in value.shape)


def operands(node: fx.Node) -> list[fx.Node | None]:
    """Tensor operands of an operator call in schema order; lists flattened, None where absent."""
    return [value for _, value in named_operands(node)]


def operand_at(node: fx.Node, index: int) -> fx.Node:
    """One of the `operands`, which must not be absent."""
    value = operands(node)[index]
    assert value is not None
    return value


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by schema name, without defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(node.kwargs)
    return dict(zip(_schema(node.target), node.args, strict=False)) | dict(node.kwargs)


@cache
def _schema(op: torch._ops.OpOverload) -> dict[str, bool]:
    """Names of an operator's arguments, and whether they are tensors."""
    return {a.name: "Tensor" in str(a.type) for a in op._schema.arguments}


def named_operands(node: fx.Node) -> list[tuple[str, fx.Node | None]]:
    """As `operands`, each with the name of its argument."""
    assert isinstance(node.target, torch._ops.OpOverload), node.format_node()
    arguments = bound_arguments(node)
    tensors: list[tuple[str, fx.Node | None]] = []
    for name, is_tensor in _schema(node.target).items():
        if not is_tensor:
            continue
        value = arguments.get(name)
        items = value if isinstance(value, list | tuple) else [value]
        tensors += [(name, i) for i in items if i is None or isinstance(i, fx.Node)]
    return tensors


def map_operands(node: fx.Node, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's args and kwargs with its tensor operands replaced, in the order of `operands`."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = _schema(node.target)
    arguments = bound_arguments(node)
    queue = iter(values)
    replaced: dict[str, Any] = {}
    for name, is_tensor in schema.items():
        value = arguments.get(name)
        if not is_tensor:
            continue
        if isinstance(value, list | tuple):
            items = [next(queue) if i is None or isinstance(i, fx.Node) else i for i in value]
            replaced[name] = items
        elif value is None or isinstance(value, fx.Node):
            replaced[name] = next(queue)
    args = tuple(replaced.get(n, v) for n, v in zip(schema, node.args, strict=False))
    kwargs = {n: replaced.get(n, v) for n, v in node.kwargs.items()}
    return args, kwargs
