"""Which modules are in which stage, as text that can be edited and given back.

    embed,h.0-h.3|h.4-h.7|h.8-h.11,norm,head

`|` separates stages, `,` names; `first-last` is everything from one name to another. Megatron's
`--pipeline-model-parallel-layout` is read as well, such as `Et*3|(tt|)*29,m|L`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from autopar.errors import PlanError

# Megatron's letters, and how many neighbouring blocks of that kind each is.
_ONE, _ALL = "tm", "EL"
_MEGATRON = re.compile(rf"[{_ONE}{_ALL}|,()*\d\s]+", re.ASCII)
_REPEATED = re.compile(r"(\([^()]*\)|[^()*\d])\*(\d+)", re.ASCII)


def layout_text(cuts: Sequence[int], names: Sequence[str]) -> str:
    """The names of the stages' blocks. Neighbours of one numbered list are a range.

    Args:
        cuts: the blocks at which stages after the first begin.
        names: of all blocks.
    """
    stages = []
    for first, end in pairwise((0, *cuts, len(names))):
        runs = (list(run) for _, run in itertools.groupby(names[first:end], _numbered_list))
        stages.append(",".join(r[0] if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs))
    return "|".join(stages)


def parse_layout(
    text: str, names: Sequence[str], kind_of: Callable[[str], str] | None = None
) -> tuple[int, ...]:
    """The reverse of `layout_text`.

    Args:
        kind_of: Megatron's letter for a name: E embedding, t decoder layer, m multi-token
            prediction, L loss; or "" for what belongs to the block before it. Without it, its
            layouts are not read.

    Raises:
        PlanError: blocks are unknown, missing, repeated or not in order, or a stage is empty.
    """
    if kind_of is not None and _MEGATRON.fullmatch(text) and not set(names) & set(text):
        stages = list(_megatron_stages(text, names, kind_of))
    else:
        stages = [
            [at for name in stage.split(",") if name.strip() for at in _range(name.strip(), names)]
            for stage in text.split("|")
        ]
    _check(text, stages, names)
    return tuple(stage[0] for stage in stages[1:])


def _numbered_list(name: str) -> str:
    """The name of the list that a block is in, `h` of `h.0.mlp`; otherwise its own name."""
    parts = name.split(".")
    at = next((k for k, part in enumerate(parts) if part.isdecimal() and k), len(parts))
    return ".".join(parts[:at]) + "." * (at < len(parts))


def _range(text: str, names: Sequence[str]) -> Sequence[int]:
    """The blocks that a name or a range is. Names may have a `-` themselves."""
    number = {name: at for at, name in enumerate(names)}
    if text in number:
        return (number[text],)
    dashes = [at for at, letter in enumerate(text) if letter == "-"]
    ends = [(text[:at].strip(), text[at + 1 :].strip()) for at in dashes]
    for first, last in ends:
        if first in number and last in number:
            if number[last] < number[first]:
                raise PlanError(
                    f"pipeline layout: {text} runs backwards; {last} is before {first} in the model"
                )
            return range(number[first], number[last] + 1)
    unknown = next((end for pair in ends for end in pair if end not in number), text)
    raise PlanError(
        f"pipeline layout: the model has no block {unknown!r} where it can be cut; its blocks are"
        f" {layout_text((), names)}"
    )


def _check(text: str, stages: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Whether the stages have all blocks once, in order."""
    for stage, blocks in enumerate(stages):
        if not blocks:
            raise PlanError(
                f"pipeline layout {text}: stage {stage} of {len(stages)} is empty; give it a block"
                " or remove its |"
            )
    every = [at for stage in stages for at in stage]
    missing = [at for at in range(len(names)) if at not in set(every)]
    if missing:
        raise PlanError(
            f"pipeline layout {text}: {_listed(missing, names)} in no stage; add each to one"
        )
    twice = sorted({at for at in every if every.count(at) > 1})
    if twice:
        raise PlanError(
            f"pipeline layout {text}: {_listed(twice, names)} in more than one stage, or twice in"
            " one; name each block once"
        )
    for before, at in pairwise(every):
        if at < before:
            raise PlanError(
                f"pipeline layout {text}: {names[at]} follows {names[before]}, but runs before it;"
                " keep the order of the model"
            )


def _listed(blocks: Sequence[int], names: Sequence[str]) -> str:
    shown = ", ".join(names[at] for at in blocks[:5])
    if len(blocks) > 5:
        shown += f" and {len(blocks) - 5} more"
    return f"{shown} {'is' if len(blocks) == 1 else 'are'}"


def _megatron_stages(
    text: str, names: Sequence[str], kind_of: Callable[[str], str]
) -> Iterator[list[int]]:
    """Each letter takes the next blocks of the model, if they are of its kind: t and m one, E and L
    all neighbours."""
    groups = _groups(names, kind_of)
    at = 0
    for stage in _repeat(text).split("|"):
        blocks: list[int] = []
        for letter in stage:
            if at == len(groups) or groups[at][0] != letter:
                found = "at its end" if at == len(groups) else f"at {names[groups[at][1][0]]}"
                kind = "" if at == len(groups) else f", of kind {groups[at][0]}"
                raise PlanError(
                    f"pipeline layout {text}: the model is {found}{kind} where the layout has"
                    f" {letter}; the kinds of the model are {_kinds(groups)}"
                )
            blocks += groups[at][1]
            at += 1
        yield blocks
    if at < len(groups):
        rest = [block for _, blocks in groups[at:] for block in blocks]
        raise PlanError(
            f"pipeline layout {text}: {_listed(rest, names)} in no stage; the kinds of the model"
            f" are {_kinds(groups)}"
        )


def _groups(names: Sequence[str], kind_of: Callable[[str], str]) -> list[tuple[str, list[int]]]:
    """Kinds and blocks, as letters take them."""
    groups: list[tuple[str, list[int]]] = []
    for at, name in enumerate(names):
        kind = kind_of(name)
        before = groups[-1][0] if groups else None
        if before is not None and (not (kind and before) or (kind == before and kind in _ALL)):
            groups[-1] = before or kind, [*groups[-1][1], at]
        else:
            groups.append((kind, [at]))
    return groups


def _kinds(groups: Sequence[tuple[str, list[int]]]) -> str:
    """Kinds in Megatron's notation."""
    runs = ((kind, len(list(run))) for kind, run in itertools.groupby(kind for kind, _ in groups))
    return "".join(f"{kind}*{count}" if count > 1 else kind for kind, count in runs)


def _repeat(text: str) -> str:
    """Without repetitions and the commas and spaces that Megatron ignores."""
    plain = re.sub(r"[,\s]", "", text)
    while match := _REPEATED.search(plain):
        plain = plain[: match.start()] + match[1].strip("()") * int(match[2]) + plain[match.end() :]
    wrong = next((letter for letter in plain if letter not in f"{_ONE}{_ALL}|"), None)
    if wrong:
        raise PlanError(
            f"pipeline layout {text}: {wrong} is not where it may be; repetitions are t*3 or"
            " (tt|)*3"
        )
    return plain
