"""Names of the places at which a model is cut into stages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autopar.errors import ConstraintError
from autopar.ir.graph import ModelGraph
from autopar.planner.names import suggestion
from autopar.profiler.modules import with_parents
from autopar.schedule.pipeline.layout import layout_text, parse_layout

# A module up to the number of its block.
_BLOCK = re.compile(r"^(.*?\.)?\d+(?=\.|$)")


@dataclass(frozen=True)
class Part:
    """Operators of one module that follow each other.

    Args:
        name: of the module: a numbered block, or a module outside of blocks.
        first: number of its first operator.
        embeds: it looks up an embedding.
    """

    name: str
    first: int
    embeds: bool


def _parts(graph: ModelGraph) -> list[Part]:
    """The parts of a model in their order. Operators of modules around others, and of one that ran
    before, belong to the part before them."""
    parts: list[Part] = []
    modules = {graph.info(node).module for node in graph.compute_nodes()}
    around = {parent for m in modules for parent in with_parents(m) if parent != m}
    for k, node in enumerate(graph.compute_nodes()):
        module = graph.info(node).module
        block = _BLOCK.match(module)
        name = block[0] if block else "" if module in around else module
        embeds = node.target is torch.ops.aten.embedding.default
        if name and all(part.name != name for part in parts):
            parts.append(Part(name, k if parts else 0, embeds))
        elif parts and embeds and parts[-1].name == name:
            parts[-1] = Part(name, parts[-1].first, True)
    return parts


def _kinds(parts: Sequence[Part]) -> dict[str, str]:
    """Megatron's letters: E of embeddings, t of numbered blocks, L of what comes after them."""
    blocks = [k for k, part in enumerate(parts) if _BLOCK.match(part.name)]
    kinds = {}
    for k, part in enumerate(parts):
        after = bool(blocks) and k > blocks[-1]
        before = bool(blocks) and k < blocks[0]
        kinds[part.name] = "t" if k in blocks else "L" if after else "E" if before else ""
    return kinds


def layout_of(graph: ModelGraph, firsts: Sequence[int]) -> str | None:
    """All parts, with `|` between stages; None if a stage begins within one of them.

    Args:
        firsts: operators at which stages begin, without the first stage's.
    """
    parts = _parts(graph)
    number = {part.first: k for k, part in enumerate(parts)}
    if not all(first in number for first in firsts):
        return None
    return layout_text([number[first] for first in firsts], [part.name for part in parts])


def _first_operators(graph: ModelGraph) -> dict[str, int]:
    """By name of a module, the number of its first operator; and by name of an operator."""
    firsts: dict[str, int] = {}
    nodes = list(graph.compute_nodes())
    for k, node in enumerate(nodes):
        for name in with_parents(graph.info(node).module):
            firsts.setdefault(name, k)
    firsts.pop("", None)
    return {node.name: k for k, node in enumerate(nodes)} | firsts


def firsts_of(graph: ModelGraph, text: str) -> list[int]:
    """The operators at which stages begin, without the first stage's.

    Args:
        text: names of modules or operators at which they begin, separated by commas; or all of the
            model's parts, with `|` between stages, as `layout_of` writes them or as Megatron does.

    Raises:
        ConstraintError: a name is unknown, stands twice, or does not come after the one before.
    """
    if "|" in text:
        parts = _parts(graph)
        cuts = parse_layout(text, [part.name for part in parts], _kinds(parts).__getitem__)
        return [parts[k].first for k in cuts]
    known = _first_operators(graph)
    numbers: list[int] = []
    for name in (part.strip() for part in text.split(",")):
        if name not in known:
            raise ConstraintError(
                f"stages: the model has no module or operator {name!r}{suggestion(name, known)}"
            )
        number = known[name]
        if not number:
            raise ConstraintError(
                f"stages: {name!r} is the first of the model, where the first stage begins; name "
                "where the second and later stages begin"
            )
        if numbers and number <= numbers[-1]:
            raise ConstraintError(
                f"stages: {name!r} does not come after the stage before it begins; name modules in "
                "the order in which they run, each once"
            )
        numbers.append(number)
    return numbers


def name_of(graph: ModelGraph, operator: str) -> str:
    """How a user names the place of an operator: by the largest module that begins there, or by the
    operator."""
    known = _first_operators(graph)
    modules = [name for name, k in known.items() if k == known[operator] and name != operator]
    return min(modules, key=lambda name: name.count("."), default=operator)
