"""A stand-in for SciPy's assignment solver, so that detection losses run where SciPy is missing.

transformers matches predicted to true boxes by `scipy.optimize.linear_sum_assignment`. The zoo has
a few boxes per image, for which the shortest augmenting paths below are as good.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from typing import Any

import numpy as np


def linear_sum_assignment(cost_matrix: Any, maximize: bool = False) -> tuple[Any, Any]:
    """Rows, in order, and the columns assigned to them, of least total cost."""
    cost = np.asarray(cost_matrix, dtype=np.float64)
    cost = -cost if maximize else cost
    if cost.shape[0] <= cost.shape[1]:
        return np.arange(cost.shape[0]), _columns(cost)
    rows = _columns(cost.T)
    order = np.argsort(rows)
    return rows[order], order


def _columns(cost: np.ndarray) -> np.ndarray:
    """The column of each row, one row after another by the shortest augmenting path."""
    rows, columns = cost.shape
    u, v = np.zeros(rows + 1), np.zeros(columns + 1)
    row_of = np.full(columns + 1, -1)  # the last column is where each path starts
    for row in range(rows):
        row_of[columns] = row
        column, slack = columns, np.full(columns + 1, math.inf)
        back, done = np.full(columns + 1, -1), np.zeros(columns + 1, dtype=bool)
        while row_of[column] >= 0:
            done[column] = True
            at = row_of[column]
            reduced = np.append(cost[at] - u[at] - v[:columns], math.inf)
            closer = ~done & (reduced < slack)
            slack[closer], back[closer] = reduced[closer], column
            nearest = int(np.argmin(np.where(done, math.inf, slack)))
            gap = slack[nearest]
            u[row_of[done]] += gap
            v[done] -= gap
            slack[~done] -= gap
            column = nearest
        while column != columns:
            row_of[column] = row_of[back[column]]
            column = int(back[column])
    result = np.empty(rows, dtype=np.int64)
    for column in range(columns):
        if row_of[column] >= 0:
            result[row_of[column]] = column
    return result


def install(module: str) -> None:
    """Give a model's module, and the library's losses, what SciPy would have given them."""
    if importlib.util.find_spec("scipy") is not None:
        return
    import transformers.loss.loss_utils  # noqa: F401  (loads the losses)

    for name, loaded in list(sys.modules.items()):
        if name != module and not name.startswith("transformers.loss."):
            continue
        if not hasattr(loaded, "linear_sum_assignment"):
            loaded.linear_sum_assignment = linear_sum_assignment  # type: ignore[attr-defined]
        if hasattr(loaded, "requires_backends"):
            loaded.requires_backends = _available  # type: ignore[attr-defined]


def _available(*_: Any) -> None:
    """In place of the check that would refuse."""
