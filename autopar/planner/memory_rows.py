"""Rows over classes of copies, made when choices violate them.

There are as many rows as liveness, and few matter. In repeated blocks most items of a series have a
copy's values under a copy's class: these are counted, not added one by one, so that a row costs as
much for 126 blocks as for 12.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autopar.planner.liveness import Liveness, Series
from autopar.solver import Row
from autopar.solver.reductions import Groups, Kept, Shared

# below this a millionth of the whole, a row is not violated but rounded
_TOLERANCE = 1e-9
# of the largest violation of a series; of several rows those that are violated less are left out
_NOTABLE = 0.2


class SharedRows:
    """The rows of `liveness` for a problem in which copies share their choices; a `Separate`.

    Args:
        segments: into which the step is divided: choices get the row of each series that they
            violate most in every one of them.
        kept: of the classes only some choices.
    """

    def __init__(
        self, liveness: Liveness, shared: Shared, segments: int = 1, kept: Kept | None = None
    ) -> None:
        self._space, self._shared, self._segments = liveness.space, shared, segments
        self._kept = kept
        self._series = {s.name: s for s in (liveness.memory, *liveness.late)}
        self._groups: dict[str, Groups] = {}
        self._rows: dict[tuple[str, int], Row] = {}

    def __call__(self, choices: Sequence[int]) -> list[Row]:
        """The rows violated most by the choices of the classes."""
        whole = self._shared.expand(self._kept.expand(choices) if self._kept else choices)
        return [
            self._row(series, moment)
            for series in self._series.values()
            for moment in self._violated(series, whole)
        ]

    def named(self, name: str) -> Row:
        """The row of this name."""
        series, _, moment = name.rpartition(" ")
        return self._row(self._series[series], int(moment))

    def _violated(self, series: Series, choices: Sequence[int]) -> list[int]:
        """Liveness, of each segment the latest or fullest, if it is notable."""
        values = series.values(self._space, choices)
        least = series.limit + _TOLERANCE * max(1.0, abs(series.limit))
        if values.max(initial=-np.inf) <= least:
            return []
        least = max(least, series.limit + _NOTABLE * (values.max() - series.limit))
        parts = [p for p in np.array_split(np.arange(len(values)), self._segments) if len(p)]
        worst = [int(part[np.argmax(values[part])]) for part in parts]
        return [moment for moment in worst if values[moment] > least]

    def _row(self, series: Series, moment: int) -> Row:
        key = series.name, moment
        if key not in self._rows:
            if series.name not in self._groups:
                places = (self._shared.place(i.index, i.is_link) for i in series.items)
                values = (item.values for item in series.items)
                cut = (self._kept.cut,) if self._kept else ()
                self._groups[series.name] = Groups(zip(places, values, strict=True), *cut)
            groups = self._groups[series.name]
            nodes, edges = groups.sums(groups.counts(series.alive(moment)))
            name = f"{series.name} {moment}"
            self._rows[key] = Row(name, series.limit, nodes, edges, series.slack)
        return self._rows[key]
