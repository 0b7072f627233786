"""The rows of `liveness` over classes of tied decisions, made when choices violate them.

There are as many rows as program points, and few of them bind. In repeated blocks most items of a
series have equal values and the same class: these are counted, not added one by one, so that a row
costs as much for 126 blocks as for 12.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autopar.planner.liveness import Liveness
from autopar.planner.series import Series
from autopar.solver import Row
from autopar.solver.reductions import RestrictedDomains, TermGroups, TiedVariables

# An excess below this share of the limit is a rounding error.
_TOLERANCE = 1e-9
# Of several rows, those violated by less than this share of the largest excess are left out.
_NOTABLE = 0.2


class LivenessRows:
    """A separation oracle (`solver.problem.Separate`) for a problem with tied variables.

    Args:
        segments: of the step; choices get the row of each series that they violate most in each.
        restricted: the classes have these choices only.
    """

    def __init__(
        self,
        liveness: Liveness,
        tied: TiedVariables,
        segments: int = 1,
        restricted: RestrictedDomains | None = None,
    ) -> None:
        self._tied, self._segments, self._restricted = tied, segments, restricted
        self._series = {s.name: s for s in (liveness.memory, *liveness.exposed)}
        self._groups: dict[str, TermGroups] = {}
        self._rows: dict[tuple[str, int], Row] = {}

    def __call__(self, choices: Sequence[int]) -> list[Row]:
        """The rows that the choices of the classes violate most."""
        if self._restricted is not None:
            choices = self._restricted.expand(choices)
        expanded = self._tied.expand(choices)
        return [
            self._row(series, point)
            for series in self._series.values()
            for point in self._violated(series, expanded)
        ]

    def named(self, name: str) -> Row:
        """The row of this name."""
        series, _, point = name.rpartition(" ")
        return self._row(self._series[series], int(point))

    def _violated(self, series: Series, choices: Sequence[int]) -> list[int]:
        """The program point of the largest excess in each segment, where it is notable."""
        values = series.values(choices)
        least = series.limit + _TOLERANCE * max(1.0, abs(series.limit))
        if values.max(initial=-np.inf) <= least:
            return []
        least = max(least, series.limit + _NOTABLE * (values.max() - series.limit))
        parts = [p for p in np.array_split(np.arange(len(values)), self._segments) if len(p)]
        largest = [int(part[np.argmax(values[part])]) for part in parts]
        return [point for point in largest if values[point] > least]

    def _row(self, series: Series, point: int) -> Row:
        key = series.name, point
        if key not in self._rows:
            if series.name not in self._groups:
                terms = (
                    (self._tied.target(i.index, i.is_edge), i.values_class, i.values)
                    for i in series.items
                )
                restrict = (self._restricted.restrict,) if self._restricted else ()
                self._groups[series.name] = TermGroups(terms, *restrict)
            nodes, edges = self._groups[series.name].sums(series.alive(point))
            name = f"{series.name} {point}"
            self._rows[key] = Row(name, series.limit, nodes, edges, series.slack)
        return self._rows[key]
