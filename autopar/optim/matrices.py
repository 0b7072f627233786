"""Finds the matrices of a step that one rank can treat alone, and gives each an owner.

A *region* is a matrix product or decomposition, and what is connected to it by values: in Muon all
of Newton-Schulz on one parameter. Its operands go to the region's owner and its result comes back,
in one exchange each for all regions of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from autopar.optim.layout import coordinates
from autopar.optim.recording import Call, Recording, read_values, traits, written_values

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_DECOMPOSITIONS = {
    "linalg_eigh", "_linalg_eigh", "linalg_qr", "_linalg_svd", "linalg_svd", "geqrf",
    "linalg_cholesky_ex", "linalg_inv_ex", "linalg_matrix_exp", "_linalg_solve_ex", "cholesky",
    "linalg_solve_triangular", "cholesky_inverse", "linalg_householder_product", "_linalg_det",
    "linalg_eig", "linalg_eigvals", "_linalg_eigvals", "linalg_lu_factor_ex", "linalg_pinv",
}  # fmt: skip


def _name(call: Call) -> str:
    return call.op._schema.name.removeprefix("aten::")


def _is_of_matrices(recording: Recording, call: Call) -> bool:
    """Whether a call takes whole matrices. A product of a column and a row does not."""
    if _name(call) in _PRODUCTS:
        last = list(read_values(call))[-1]
        return recording.values[last].shape[-2] > 1
    return _name(call) in _DECOMPOSITIONS


def _cost(recording: Recording, call: Call) -> float:
    """About its multiplications."""
    if not _is_of_matrices(recording, call):
        return 0.0
    shapes = [recording.values[n].shape for n in read_values(call)]
    return math.prod(shapes[0]) * shapes[-1][-1] * (1.0 if _name(call) in _PRODUCTS else 10.0)


def matrix_regions(
    recording: Recording, calls: Sequence[int], mesh: tuple[int, ...]
) -> dict[int, tuple[int, ...]]:
    """Per call in a region the coordinates of its owner.

    Owners are chosen largest region first, each the rank with the least to do. Regions of
    parameters that one pipeline stage holds stay with it.

    Args:
        calls: positions of those that are needed.
    """
    region: dict[int, int] = {}  # of values
    of_call: dict[int, int] = {}
    same: list[int] = []

    def find(r: int) -> int:
        while same[r] != r:
            r = same[r]
        return r

    for position in calls:
        call = recording.calls[position]
        known = traits(call.op)
        operands = list(read_values(call))
        inside = [region[n] for n in operands if n in region]
        if _is_of_matrices(recording, call):
            if not inside:
                same.append(len(same))
                inside = [same[-1]]
        elif known.writes:
            if not all(n in region for n in written_values(call)):
                continue  # its result goes back
        elif (
            known.lists
            or not inside
            or any(n not in region and math.prod(recording.values[n].shape) > 1 for n in operands)
        ):
            continue
        first = find(inside[0])
        for other in inside[1:]:
            same[find(other)] = first
        of_call[position] = first
        region.update(dict.fromkeys((*call.results, *written_values(call)), first))
    costs: dict[int, float] = {}
    fixed: dict[int, dict[int, int]] = {}
    layouts = dict(zip(recording.inputs, recording.layouts, strict=True))
    stage: dict[int, tuple[tuple[int, int], ...]] = {
        n: layout.owner for n, layout in layouts.items() if layout.owner
    }
    for position in calls:  # which stage the values of a region come from
        call = recording.calls[position]
        owner = next((stage[n] for n in read_values(call) if n in stage), None)
        if owner is not None:
            for n in call.results:
                stage.setdefault(n, owner)
        if position in of_call:
            r = find(of_call[position])
            costs[r] = costs.get(r, 0.0) + _cost(recording, call)
            fixed.setdefault(r, {}).update(dict(owner or ()))
    busy = dict.fromkeys(coordinates(mesh), 0.0)
    owners: dict[int, tuple[int, ...]] = {}
    for r in sorted(costs, key=lambda r: (-costs[r], r)):
        able = [c for c in busy if all(c[axis] == at for axis, at in fixed[r].items())]
        owners[r] = min(able, key=busy.__getitem__)
        busy[owners[r]] += costs[r]
    return {position: owners[find(r)] for position, r in of_call.items()}
