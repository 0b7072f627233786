"""Names of decisions for users, and patterns that stand for several of them.

transformer.h.0.mlp.c_fc.weight     a parameter: how it is stored
inputs.input_ids, inputs.0          an input, by name or position: how it is split
transformer.h.0.mlp                 a module: the value its last operator makes
addmm_2                             an operator, by the name that plans and reports give it
transformer.h.0.attn.scaled_dot_product_attention
                                    the first such operator of a module
transformer.h.*.mlp                 `*` stands for one part of a name, `**` for any number
transformer.h.{0,2-5}.mlp           these copies of a block, as reports write them
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

import torch.fx as fx

from autopar.errors import ConstraintError
from autopar.ir.graph import ModelGraph, shape_of
from autopar.ir.repeats import pattern
from autopar.planner.space import SearchSpace
from autopar.profiler.modules import with_parents

_MARK = re.compile(r"\*\*\.|\*\*|\*|\{[\d,\- ]+\}")


def matcher(name: str) -> re.Pattern[str]:
    """A name with wildcards as a regular expression over full names."""
    expression, position = "", 0
    for mark in _MARK.finditer(name):
        expression += re.escape(name[position : mark.start()])
        wildcard = {"*": r"[^.]+", "**": r".+", "**.": r"(?:.+\.)?"}.get(mark[0])
        expression += wildcard or f"(?:{'|'.join(map(str, sorted(copies_in(mark[0]))))})"
        position = mark.end()
    return re.compile(expression + re.escape(name[position:]))


def copies_in(mark: str) -> set[int]:
    """The numbers that `{0,2-5}` lists.

    Raises:
        ConstraintError: it is no such list.
    """
    numbers: set[int] = set()
    for part in mark.strip("{}").replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ConstraintError(f"cannot read {mark}; write numbers and ranges, as in {{0,2-5}}")
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


class Names:
    """Every name of a space's decisions.

    Attributes:
        decisions: name to index of a decision; parameters, inputs and modules take precedence over
            operators and shared layouts.
    """

    def __init__(self, space: SearchSpace) -> None:
        graph = space.graph
        self.decisions: dict[str, int] = {}
        positions = {name: i for i, name in enumerate(graph.inputs) if name is not None}
        modules: dict[str, int] = {}
        others: dict[str, int] = {}
        for i, decision in enumerate(space.decisions):
            target = str(decision.node.target)
            if decision.kind == "parameter":
                self.decisions[graph.parameters[target]] = i
            elif decision.kind == "input":
                self.decisions |= {f"inputs.{target}": i, f"inputs.{positions[target]}": i}
            elif decision.kind in ("op", "shared"):
                others[decision.name] = i
                if decision.kind == "op":
                    module = graph.info(decision.node).module
                    modules |= dict.fromkeys(with_parents(module), i)
                    others.setdefault(f"{module}.{_kind(decision.node)}".removeprefix("."), i)
        for alias, owner in graph.aliases.items():
            if owner in self.decisions:
                self.decisions.setdefault(alias, self.decisions[owner])
        modules.pop("", None)  # the model itself
        self.decisions = {**others, **modules, **self.decisions}

    def find(self, name: str) -> dict[str, int]:
        """The decisions that a name, or a pattern, stands for.

        Raises:
            ConstraintError: none; the message names the nearest.
        """
        if name in self.decisions:
            return {name: self.decisions[name]}
        expression = matcher(name)
        matches = {n: i for n, i in self.decisions.items() if expression.fullmatch(n)}
        if not matches:
            raise ConstraintError(f"nothing is called {name!r}{suggestion(name, self.decisions)}")
        return matches


def _kind(node: fx.Node) -> str:
    """An operator's name without its namespace and overload: `linear`."""
    return str(node.target).split(".")[-2] if str(node.target).count(".") > 1 else node.name


def operator_names(graph: ModelGraph) -> dict[fx.Node, str]:
    """Names that copies of a block share, such as `h.0.mlp.gelu`, of operators that have one."""
    modules = _modules(graph)
    last = {modules[path]: path for path in sorted(modules, key=len)}  # the innermost
    # of the model itself, unless another operator is called so
    reserved = {node.name: node for node in graph.compute_nodes()}
    names: dict[str, fx.Node] = {}
    for node in graph.compute_nodes():
        name = f"{graph.info(node).module}.{_kind(node)}".removeprefix(".")
        if reserved.get(name, node) is node:
            names.setdefault(name, node)
    return last | {node: name for name, node in names.items() if name not in modules}


def every_name(graph: ModelGraph) -> list[str]:
    """The names of parameters, modules and operators."""
    parameters = [*graph.parameters.values(), *graph.aliases]
    return list(dict.fromkeys([*parameters, *_modules(graph), *operator_names(graph).values()]))


def _modules(graph: ModelGraph) -> dict[str, fx.Node]:
    """The last operator of every module."""
    nodes = [(node, graph.info(node).module) for node in graph.compute_nodes()]
    return {path: node for node, module in nodes for path in with_parents(module) if path}


def output_shapes(graph: ModelGraph) -> dict[str, tuple[int, ...]]:
    """`outputs.0`, ...: the shapes of the results that are tensors, in order."""
    values = graph.output.args[0][len(graph.mutations) :]  # type: ignore[index]
    tensors = [v.meta["val"] for v in values if isinstance(v, fx.Node)]  # type: ignore[union-attr]
    return {f"outputs.{i}": shape_of(tensor) for i, tensor in enumerate(tensors)}


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'transformer.h.*.mlp.c_fc.weight'?`, or what kinds of names there are."""
    names = [n for n in known if not re.fullmatch(r"inputs\.\d+", n)]
    marked = _MARK.search(name) is not None
    pool = dict.fromkeys(pattern(n) if marked else n for n in names)
    # wildcards count for little in a comparison
    near = get_close_matches(
        _MARK.sub("*", name.replace("**.", "*.")) if marked else name, pool, n=2, cutoff=0.6
    )
    near = near or [n for n in pool if n.rpartition(".")[2] == name.rpartition(".")[2]]
    if near:
        return f"; did you mean {' or '.join(map(repr, near[:2]))}?"
    return (
        "; names are those of parameters (as in named_parameters()), of modules, "
        "inputs.NAME, outputs.NUMBER, and of operators in the plan"
    )
