"""Process groups by name: one per mesh axis, found from inside graphs.

A graph names the group of every collective by a string. torch resolves that name to a process group
when the collective runs; `find_group` gives the size of the group and this rank's position, which
shapes depend on. So one program runs on any backend, and a mesh can be planned for without any
process group (`planning_groups`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

_GROUPS: dict[str, Group] = {}
# The group of all ranks, by the groups of the mesh axes of more than one rank.
_ALL_RANKS: dict[frozenset[str], str] = {}


@dataclass(frozen=True)
class Group:
    """Ranks along one mesh axis, or all ranks of a mesh.

    Args:
        name: of the process group, as `torch.distributed` and graphs know it.
        size: number of ranks.
        index: this rank's position.
        axis: of the mesh; None for a group of all ranks of a mesh of several axes.
    """

    name: str
    size: int
    index: int
    axis: int | None


def find_group(name: str) -> Group:
    """The group of that name."""
    try:
        return _GROUPS[name]
    except KeyError:
        raise KeyError(f"no process group named {name!r}; registered: {sorted(_GROUPS)}") from None


def register_mesh(
    mesh: Sequence[int], coords: Sequence[int], names: Sequence[str], all_ranks: str
) -> tuple[str, ...]:
    """Register the groups of the rank at `coords`.

    Args:
        names: of the groups along the axes.
        all_ranks: name of the group of all ranks of the mesh.

    Returns:
        the names.
    """
    for axis, name in enumerate(names):
        _GROUPS[name] = Group(name, mesh[axis], coords[axis], axis)
    split = frozenset(name for name, size in zip(names, mesh, strict=True) if size > 1)
    if len(split) > 1:
        index = int(np.ravel_multi_index(tuple(coords), tuple(mesh)))
        _GROUPS.setdefault(all_ranks, Group(all_ranks, math.prod(mesh), index, None))
        _ALL_RANKS[split] = all_ranks
    return tuple(names)


def planning_groups(
    mesh: Sequence[int], coords: Sequence[int], prefix: str = "plan"
) -> tuple[str, ...]:
    """Names of groups that have sizes and positions, and no processes: programs can be written and
    costed with them, and not run."""
    where = f"{prefix}/{'x'.join(map(str, mesh))}/{','.join(map(str, coords))}"
    names = [f"{where}/axis{axis}" for axis in range(len(mesh))]
    return register_mesh(mesh, coords, names, f"{where}/all")


def group_of_all(names: Collection[str]) -> str | None:
    """The group of all ranks, if these are the groups along all axes of more than one rank."""
    return _ALL_RANKS.get(frozenset(names))


def forget_groups() -> None:
    """Forget all groups: their process groups are gone."""
    _GROUPS.clear()
    _ALL_RANKS.clear()
