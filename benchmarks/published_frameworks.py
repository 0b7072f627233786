"""What frameworks do otherwise than autopar, on a baseline's search space and chain.

Megatron and torchtitan choose layouts by rule, hide collectives beside products, compute and gather
again in the backward, and multiply in 8 or 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch.fx as fx

from autopar.cluster.software import SOFTWARE
from autopar.ir.graph import operands, shape_of
from autopar.planner.decisions import Edge
from autopar.planner.estimate import accumulation_us
from autopar.planner.op_costs import ACCUMULATION_PASSES, OpCosts
from autopar.planner.pipeline_blocks import OperatorChain
from autopar.planner.saved_values import SavedValues
from autopar.planner.space import SearchSpace
from autopar.sharding.node_rules import declared_of, results, rule_of
from benchmarks.published_rows import Run

# -- layouts --------------------------------------------------------------------------------------


def as_published(space: SearchSpace, key: Run) -> dict[int, np.ndarray]:
    """By decision, the candidates that a framework has. With tensor parallelism it splits all
    matrices of blocks and the vocabulary, as Megatron does, whether or not that is faster; between
    blocks' products it splits tokens, or nothing. Unless a run says so, its products do not run in
    steps beside their collective. Attention over split tokens is a ring."""
    mask = {}
    tensor = len(space.mesh) - 1 if key.tensor > 1 else None
    context = context_axis(space, key)
    for i, d in enumerate(space.decisions):
        allowed = np.ones(len(d.candidates), dtype=bool)
        strategies = [c.strategy for c in d.candidates] if d.kind == "op" else []
        if d.kind == "op" and context is not None and "attention" in str(d.node.target):
            rings = [s.splits.get("ring") if s is not None else None for s in strategies]
            allowed = np.array([axes == (context,) for axes in rings])
        elif d.kind == "op" and (key.megatron or not key.asynchronous):
            stepwise = {name for name, f in rule_of(d.node)[0].factors.items() if f.beside}
            allowed = np.array([s is None or not stepwise & {*s.splits} for s in strategies])
        if d.kind == "op" and tensor is not None and _between_products(space, d.node):
            dims = [c.outputs[0].dims for c in d.candidates]
            split = [[n for n, axes in enumerate(of) if tensor in axes] for of in dims]
            allowed &= np.array([of == [1] * key.sequence for of in split])
        if d.kind == "parameter" and tensor is not None:
            name = space.graph.parameters[str(d.node.target)]
            specs = [c.outputs[0] for c in d.candidates]
            if name in ("embedding.weight", "head.weight"):
                allowed = np.array([tensor in spec.dims[0] for spec in specs])
            elif name.startswith("layers.") and len(specs[0].dims) == 2:
                dim = 1 if name.split(".")[-2] in ("out", "down") else 0
                allowed = np.array([tensor in spec.dims[dim] for spec in specs])
        if not allowed.all():
            mask[i] = allowed
    return mask


def load_balanced(space: SearchSpace) -> None:
    """Leave out of attention on a ring what balances causal work: frameworks give each rank the
    tokens that it computes with when they load a sample."""
    for i, d in enumerate(space.decisions):
        if d.kind != "op" or "attention" not in str(d.node.target):
            continue
        width = operands(d.node)[0].meta["val"].element_size()
        moved = np.zeros(len(d.candidates))
        for c, candidate in enumerate(d.candidates):
            for move in declared_of(d.node, candidate.strategy, space.mesh).collectives:
                if move.kind == "exchange" and not move.beside:
                    link, size = space.cluster.links[move.axis], space.mesh[move.axis]
                    us = float(link.collective_us(move.kind, size, move.elements * width))
                    moved[c] += (move.forward + move.backward) * us
        parts = {**d.parts, "communication_us": d.parts["communication_us"] - moved}
        space.decisions[i] = replace(d, parts=parts, time_us=d.time_us - moved)


# Of a cast: how often it reads its operand (once more for the scale of a whole tensor), and bits
# of what it writes with its scales.
_CASTS = {"float8": (2, 8.0), "mxfp8": (1, 8.25), "nvfp4": (2, 4.5)}


def in_few_bits(space: SearchSpace, key: Run) -> None:
    """Price the products of blocks with their weights in 8 or 4 bits (`Run.short`): at the device's
    rate for them, and with casts. Input and weight are cast again for the backward, whose products
    read them the other way round. Transformer Engine casts weights once a step, which takes no time
    among many microbatches. With sequence parallelism, a rank casts its own tokens and gathers what
    is cast.
    """
    reads, bits = _CASTS[key.short]
    tensor = len(space.mesh) - 1 if key.sequence else None
    device, saved = space.cluster.device, SavedValues(space.graph, space.profile)
    rates = {**device.flops_by_size, "matmul.bfloat16": device.flops_curve("matmul", key.short)}
    faster = replace(space.cluster, device=replace(device, flops_by_size=rates))
    costs = OpCosts(faster, space.profile, saved)
    read, write = device.bytes_curve("read"), device.bytes_curve("write")
    for i, d in enumerate(space.decisions):
        if d.kind != "op" or "linear" not in str(d.node.target):
            continue
        if not _in_block(space, d.node):
            continue
        strategies = [c.strategy for c in d.candidates]
        forward, backward = costs.compute_us(d.node, strategies)
        values = [n.meta["val"] for n in (*operands(d.node)[:2], d.node)]
        cast = np.zeros((3, len(strategies)))
        for c, candidate in enumerate(d.candidates):
            specs = (*candidate.inputs[:2], candidate.outputs[0])
            for k, (value, spec) in enumerate(zip(values, specs, strict=True)):
                nbytes = space.local_bytes(shape_of(value), value.element_size(), spec)
                if tensor is not None and not any(tensor in axes for axes in spec.dims):
                    nbytes /= key.tensor
                cast[k, c] = reads * float(read.us(nbytes)) + float(write.us(nbytes * bits / 16))
        if key.megatron:
            cast[1] = 0.0
        forward, backward = forward + cast[0] + cast[1], backward + cast.sum(0)
        parts = {"forward_us": forward, "backward_us": backward, "compute_us": forward + backward}
        time = d.time_us + parts["compute_us"] - d.parts["compute_us"]
        space.decisions[i] = replace(d, parts={**d.parts, **parts}, time_us=time)


def recompute(space: SearchSpace, choices: Sequence[int], how: str) -> float:
    """Let the backward of every block compute operators again, and keep less for it.

    Args:
        how: "full" keeps the input of a block; "half" also every second product and attention, as
            torchtitan does per operator.

    Returns:
        bytes of what one block makes again, which is there while its backward runs.
    """
    again_bytes = 0.0
    seen: dict[str, int] = {}
    for i, d in enumerate(space.decisions):
        module = space.graph.info(d.node).module if d.kind == "op" else ""
        block = ".".join(module.split(".")[:2])
        if not block.startswith("layers."):
            continue
        c = choices[i]
        product = bool(space.profile[d.node].forward.flops)
        first, number = block not in seen, seen.setdefault(block, 0)
        seen[block] = number + product
        kept = how == "half" and product and ("attention" in str(d.node.target) or number % 2 == 0)
        held = 0.0
        for value, spec in zip(results(d.node), d.candidates[c].outputs, strict=True):
            if kept:
                held += space.local_bytes(shape_of(value), value.element_size(), spec)
        if first:
            source, spec = operands(d.node)[0].meta["val"], d.candidates[c].inputs[0]
            held += space.local_bytes(shape_of(source), source.element_size(), spec)
        if block == "layers.0":
            again_bytes += float(d.parts["activations_bytes"][c])
        more = 0.0 if kept else d.parts["forward_us"]
        parts = {key: d.parts[key] + more for key in ("compute_us", "backward_us")}
        parts["activations_bytes"] = np.full(len(d.candidates), held)
        space.decisions[i] = replace(d, parts={**d.parts, **parts})
    return again_bytes


def context_axis(space: SearchSpace, key: Run) -> int | None:
    """The axis that splits tokens of a sample."""
    return len(space.mesh) - 1 - (key.tensor > 1) if key.context > 1 else None


# -- chains ---------------------------------------------------------------------------------------


def as_run(
    chain: OperatorChain, space: SearchSpace, choices: Sequence[int], key: Run
) -> OperatorChain:
    """The chain with what Megatron computes and gathers again in the backward: attention between
    its products, if that is recomputed; with sequence parallelism, the inputs of products. What it
    communicates in the backward of a product runs beside the product (`Run.megatron`)."""
    costs = [dict(row) for row in chain.costs]
    number = {node: k for k, node in enumerate(chain.nodes)}
    if key.recompute == "attention":
        chosen = {d.node: d.candidates[c] for d, c in zip(space.decisions, choices, strict=True)}
        for node in filter(attends, chain.nodes):
            row = costs[number[node]]
            row["input_us"] += row["forward_us"]
            if not space.profile[node].forward.flops:
                row["held_bytes"] = 0.0
                continue
            for value, spec in zip(operands(node), chosen[node].inputs, strict=True):
                if value is not None and spec is not None and _square(value):  # scores
                    scores = value.meta["val"]
                    size = space.local_bytes(shape_of(scores), scores.element_size(), spec)
                    row["held_bytes"] = max(0.0, row["held_bytes"] - size)
    hides = SOFTWARE[key.software].hides
    shown = 1 - hides if key.megatron and key.asynchronous else 1.0
    for node, forward_us, backward_us in short_gathers(space, choices, key):
        costs[number[node]]["forward_us"] -= shown * forward_us
        costs[number[node]]["input_us"] -= shown * backward_us
    if key.megatron:
        product_us = {n: chain.costs[k]["weight_us"] for n, k in number.items()}
        for node, us in summed_gradients(space, choices):
            costs[number[node]]["input_us"] -= min(hides * us, product_us[node])
        if key.sequence:
            for node, us in gathers(space, choices):
                costs[number[node]]["forward_us"] -= (1 - shown) * us
                costs[number[node]]["input_us"] += us - min(hides * us, product_us[node])
                costs[number[node]]["held_bytes"] /= key.tensor
        if key.asynchronous:
            hide_sums(space, choices, key, costs, number)
    for row in costs:
        row["weight_bytes"] = min(row["weight_bytes"], row["held_bytes"])
    return replace(chain, costs=tuple(costs))


def hide_sums(
    space: SearchSpace, choices: Sequence[int], key: Run, costs: Sequence[dict[str, float]],
    number: Mapping[fx.Node, int],
) -> None:  # fmt: skip
    """Run sums of results over tensor ranks, and gathers of their gradients, beside the product
    that makes them; and add gradients of weights to their sums as they are written, which reads
    the sums and takes no other pass."""
    hides = SOFTWARE[key.software].hides
    for edge in space.edges:
        target = space.decisions[edge.target]
        if edge.weight and target.kind == "op":
            more = accumulation_us(space, edge, choices) * (1 - 1 / ACCUMULATION_PASSES)
            costs[number[target.node]]["weight_us"] -= more
    for edge, node in results_of_products(space):
        us, pair = space.edge_costs(edge), (choices[edge.source], choices[edge.target])
        costs[number[node]]["forward_us"] -= hides * float(us.forward_us[pair])
        costs[number[node]]["input_us"] -= hides * float(us.backward_us[pair])


def log_probabilities_bytes(space: SearchSpace, choices: Sequence[int]) -> float:
    """What torch's cross-entropy holds at the peak beyond autopar's operator, which saves one
    number per token: log-probabilities, and their gradient."""
    total = 0.0
    for d, c in zip(space.decisions, choices, strict=True):
        if d.kind == "op" and "cross_entropy" in str(d.node.target):
            logits, spec = operands(d.node)[0].meta["val"], d.candidates[c].inputs[0]
            total += 2.0 * space.local_bytes(shape_of(logits), logits.element_size(), spec)
    return total


def short_gathers(
    space: SearchSpace, choices: Sequence[int], key: Run
) -> Iterator[tuple[fx.Node, float, float]]:
    """By operator, what gathers of inputs, and of gradients of results, take less in few bits."""
    if not key.short or not key.sequence:
        return
    less = 1 - _CASTS[key.short][1] / 16
    for node, us in gathers(space, choices):
        yield node, less * us, 0.0
    for edge, node in results_of_products(space):
        pair = choices[edge.source], choices[edge.target]
        yield node, 0.0, less * float(space.edge_costs(edge).backward_us[pair])


def results_of_products(space: SearchSpace) -> Iterator[tuple[Edge, fx.Node]]:
    """Edges from products of blocks with weights to the operators that take their results."""
    for edge in space.edges:
        source, target = space.decisions[edge.source], space.decisions[edge.target]
        if edge.weight or source.kind != "op" or target.kind != "op":
            continue
        if "linear" in str(source.node.target) and _in_block(space, source.node):
            yield edge, target.node


def gathers(space: SearchSpace, choices: Sequence[int]) -> Iterator[tuple[fx.Node, float]]:
    """Products of blocks whose operand is gathered in the forward, and what that takes in us."""
    for edge, product in inputs_of_products(space):
        pair = choices[edge.source], choices[edge.target]
        us = float(space.edge_costs(edge).forward_us[pair])
        before = space.decisions[edge.source].candidates[pair[0]].outputs[edge.result]
        if us and not before.partial:
            yield product, us


def summed_gradients(space: SearchSpace, choices: Sequence[int]) -> Iterator[tuple[fx.Node, float]]:
    """Products of blocks whose input's gradient is summed over ranks, and what that takes in us."""
    for edge, product in inputs_of_products(space):
        us = float(space.edge_costs(edge).backward_us[choices[edge.source], choices[edge.target]])
        if us:
            yield product, us


def inputs_of_products(space: SearchSpace) -> Iterator[tuple[Edge, fx.Node]]:
    """Edges of activations, shared ones too, to products of blocks, and the first of these."""
    for edge in space.edges:
        target = space.decisions[edge.target]
        users = [target.node] if target.kind == "op" else list(target.node.users)
        products = [n for n in users if n in space.profile and space.profile[n].forward.flops]
        if products and not edge.weight and _in_block(space, products[0]):
            yield edge, products[0]


def attends(node: fx.Node) -> bool:
    """Whether an operator makes scores of attention, or takes them."""
    return any(_square(value) for value in (*node.all_input_nodes, node))


def _between_products(space: SearchSpace, node: fx.Node) -> bool:
    """Whether an operator of a block is on the residual stream: a norm, a sum or a dropout, on
    [samples, tokens, hidden]."""
    named = any(name in str(node.target) for name in ("norm", "add", "dropout"))
    return named and len(shape_of(results(node)[0])) == 3 and _in_block(space, node)


def _in_block(space: SearchSpace, node: fx.Node) -> bool:
    return space.graph.info(node).module.startswith("layers.")


def _square(node: fx.Node) -> bool:
    """Whether a value is scores: [samples, heads, tokens, tokens]."""
    value = node.meta["val"]
    shape = shape_of(value[0] if isinstance(value, tuple | list) else value)
    return len(shape) == 4 and shape[-1] == shape[-2]
